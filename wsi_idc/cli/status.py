"""`wsi-idc status`: what the store knows of each slide."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import DEFAULT_STORE, JsonOption, StoreOption, console_for


def status(
    manifest: Annotated[Path | None, typer.Argument(help="Show the slides of this manifest; else the store's.")] = None,
    store: StoreOption = DEFAULT_STORE,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with 1 where a slide or a map failed.")] = False,
    json_lines: JsonOption = False,
) -> None:
    """Show every slide: extracted, scored by which model, or failed and why; then totals, and a run in progress."""
    console = console_for(json_lines=json_lines)
    from wsi_idc.manifest import read_manifest
    from wsi_idc.status import holding_fields, store_state

    listed = [row.slide_id for row in read_manifest(manifest, away=True)] if manifest else None
    found = store_state(store, listed)
    for state in found.slides:
        console.record("status", **state.fields())
    console.record("totals", **found.totals())
    if found.holding is not None:
        console.record("run", **holding_fields(found.holding))
    rows = [
        [
            state.slide_id,
            state.extracted,
            str("" if state.tiles is None else state.tiles),
            ", ".join(state.scored),
            state.why,
        ]
        for state in found.slides
    ]
    console.table(["slide", "extracted", "tiles", "scored", "why"], rows)
    for line in found.lines():
        console.line(line)
    if fail and found.failed:
        raise typer.Exit(1)
