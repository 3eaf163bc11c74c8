"""`wsi-idc extract`: from slides to tiles."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wsi_idc.cli.options import (
    ConfigOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    MinTissueOption,
    OnlyOption,
    QuietOption,
    ReaderOption,
    SchedulerFileOption,
    SchedulerOption,
    StageGbOption,
    StageOption,
    StoreSetting,
    ThreadsOption,
    TissueOption,
    VerboseOption,
    WaitOption,
    WorkersOption,
    check_place,
    console_for,
    finish,
    load_settings,
)
from wsi_idc.errors import UsageError

if TYPE_CHECKING:
    from wsi_idc.manifest import Row


def extract(
    manifest: Annotated[Path, typer.Argument(help="CSV with a column path; see the README for the others.")],
    config: ConfigOption = None,
    store: StoreSetting = None,
    tile_size: Annotated[int | None, typer.Option(help="Tile side in pixels. [default: 50]")] = None,
    mpp: Annotated[float | None, typer.Option(help="Tile resolution in um/px. [default: 4.0]")] = None,
    stride: Annotated[int | None, typer.Option(help="Pixels from tile to tile. [default: the tile size]")] = None,
    last: Annotated[
        str | None, typer.Option(help="Tiles over the slide's edge: keep, or drop. [default: keep]", metavar="RULE")
    ] = None,
    reader: ReaderOption = None,
    tissue: TissueOption = None,
    min_tissue: MinTissueOption = None,
    annotation_class: Annotated[
        str | None, typer.Option(help="The annotations' class that is positive. [default: IDC]")
    ] = None,
    empty_annotation: Annotated[
        str | None,
        typer.Option(
            help="Tiles of an annotation that marks nothing: unknown, or negative. [default: unknown]", metavar="RULE"
        ),
    ] = None,
    no_pixels: Annotated[
        bool, typer.Option("--no-pixels", help="Store where the tiles are, not their pixels.")
    ] = False,
    icc: Annotated[
        bool | None, typer.Option("--icc", help="Bring slides to sRGB by their ICC profile, where they have one.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Do nothing if a slide, annotation or mask of the manifest is missing.")
    ] = False,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    wait: WaitOption = None,
    stage: StageOption = None,
    stage_gb: StageGbOption = None,
    only: OnlyOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Cut the tissue of a manifest's slides into tiles."""
    console = console_for(json_lines=json_lines, quiet=quiet, verbose=verbose)
    from wsi_idc.manifest import read_manifest

    found = load_settings(
        {
            "store": store,
            "extract.tile_size": tile_size,
            "extract.mpp": mpp,
            "extract.stride": stride,
            "extract.last": last,
            "extract.tissue": tissue,
            "extract.min_tissue": min_tissue,
            "extract.reader": reader,
            "extract.annotation_class": annotation_class,
            "extract.empty_annotation": empty_annotation,
            "extract.pixels": False if no_pixels else None,
            "extract.icc": icc,
            "extract.strict": strict or None,
            "extract.workers": workers,
            "extract.threads": threads,
            "extract.scheduler": scheduler,
            "extract.scheduler_file": scheduler_file,
            "extract.wait": wait,
            "extract.stage": stage,
            "extract.stage_gb": stage_gb,
        },
        manifest=manifest,
        file=config,
    )
    settings = found.extract
    check_place(settings)
    rows = _limit(read_manifest(manifest, strict=found.strict), only)
    from wsi_idc import extract as command

    if dry_run:
        from wsi_idc.store import find_store

        command.check_stage(rows, settings)
        planned = command.plan_slides(rows, find_store(found.store), settings.cut(), force=force, strict=found.strict)
        console.plans({slide.row.slide_id: slide.plan for slide in planned})
        return
    with console.progress("extract") as listener:
        summary = command.extract(rows, found.store, settings, force=force, strict=found.strict, listener=listener)
    finish(console, "extract", summary)


def _limit(rows: "list[Row]", only: list[str] | None) -> "list[Row]":
    """The rows asked for by `--only`."""
    import difflib

    known = [row.slide_id for row in rows]
    for name in only or []:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else ""
            raise UsageError(f"--only {name}", "no such slide_id in the manifest", hint)
    return [row for row in rows if not only or row.slide_id in only]
