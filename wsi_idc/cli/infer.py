"""`wsi-idc infer`: from tiles to maps."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import (
    BatchSizeOption,
    ConfigOption,
    DryRunOption,
    ForceOption,
    GpusOption,
    JsonOption,
    ModelSetting,
    OnlyOption,
    PrecisionOption,
    QuietOption,
    SchedulerFileOption,
    SchedulerOption,
    StageGbOption,
    StageOption,
    StoreSetting,
    ThreadsOption,
    VerboseOption,
    WaitOption,
    WorkersOption,
    check_place,
    console_for,
    finish,
    load_settings,
)


def infer(
    manifest: Annotated[
        Path | None, typer.Argument(help="Score the slides of this manifest; else all of the store.")
    ] = None,
    config: ConfigOption = None,
    store: StoreSetting = None,
    model: ModelSetting = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    wait: WaitOption = None,
    stage: StageOption = None,
    stage_gb: StageGbOption = None,
    gpus: GpusOption = None,
    batch_size: BatchSizeOption = None,
    precision: PrecisionOption = None,
    only: OnlyOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score the tiles of a store, and write one probability map a slide."""
    console = console_for(json_lines=json_lines, quiet=quiet, verbose=verbose)
    found = load_settings(
        {
            "store": store,
            "model": None if model is None else str(model),
            "infer.batch_size": batch_size,
            "infer.precision": precision,
            "infer.gpus": gpus,
            "infer.workers": workers,
            "infer.threads": threads,
            "infer.scheduler": scheduler,
            "infer.scheduler_file": scheduler_file,
            "infer.wait": wait,
            "infer.stage": stage,
            "infer.stage_gb": stage_gb,
        },
        manifest=manifest,
        file=config,
    )
    settings = found.infer
    check_place(settings)
    from wsi_idc import infer as command
    from wsi_idc.model.bundle import SHIPPED, read_bundle

    listed = None
    if manifest is not None:
        from wsi_idc.manifest import read_manifest

        listed = [row.slide_id for row in read_manifest(manifest, away=True)]
    bundle = read_bundle(found.model or SHIPPED)
    if dry_run:
        from wsi_idc.store import open_store

        form = bundle.form(settings.precision, cuda=settings.gpus > 0)
        maps = open_store(found.store)
        planned = command.plan_maps(maps, bundle, form, only=only or [], listed=listed, force=force)
        console.plans(planned.plans)
        return
    with console.progress("infer") as listener:
        summary = command.infer(
            found.store, bundle, settings, only=only or [], listed=listed, force=force, listener=listener
        )
    finish(console, "infer", summary)
