"""`wsi-idc status`: what the store knows of each slide."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import DEFAULT_STORE, JsonOption, StoreOption, console_for


def status(
    manifest: Annotated[Path | None, typer.Argument(help="Show the slides of this manifest; else the store's.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json_lines: JsonOption = False,
) -> None:
    """Show every slide: extracted, scored by which model, or failed and why."""
    console = console_for(json_lines=json_lines)
    from wsi_idc.manifest import read_manifest
    from wsi_idc.status import slide_states

    names = [row.slide_id for row in read_manifest(manifest)] if manifest else None
    states = slide_states(store, names)
    for state in states:
        console.record("status", **state.fields())
    rows = [[state.slide_id, state.extracted, state.tiles, state.scored, state.reason] for state in states]
    console.table(["slide", "extracted", "tiles", "scored", "why"], rows)
