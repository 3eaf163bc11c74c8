"""`wsi-idc prune`: out of the store with what left the manifest."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import DEFAULT_STORE, DryRunOption, JsonOption, QuietOption, StoreOption, console_for


def prune(
    manifest: Annotated[Path, typer.Argument(help="The manifest whose slides stay.")],
    store: StoreOption = DEFAULT_STORE,
    force: Annotated[bool, typer.Option("--force", help="Also where no slide would be left.")] = False,
    dry_run: DryRunOption = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove from the store slides that are no longer in the manifest, and their maps. Slide files are not touched."""
    console = console_for(json_lines=json_lines, quiet=quiet)
    from wsi_idc import prune as command
    from wsi_idc.manifest import read_manifest
    from wsi_idc.store import open_store

    rows = read_manifest(manifest, away=True)
    if dry_run:
        found = command.plan_prune(open_store(store), rows, force=force)
    else:
        found = command.prune(store, rows, force=force)
    verb = "would remove" if dry_run else "removed"
    for name in found.slides:
        models = found.models_of(name)
        console.record("pruned", slide=name, maps=models, dry_run=dry_run)
        console.line(f"{verb} {name}" + (f" and its maps by {', '.join(models)}" if models else ""))
    maps = sum(map(len, found.maps.values()))
    console.record("summary", command="prune", slides=len(found.slides), maps=maps, kept=found.kept, dry_run=dry_run)
    console.line(f"prune: {verb} {len(found.slides):,} slides and {maps:,} maps; {found.kept:,} slides stay")
