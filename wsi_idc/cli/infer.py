"""`wsi-idc infer`: from tiles to maps."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import (
    DEFAULT_STORE,
    DryRunOption,
    ForceOption,
    JsonOption,
    OnlyOption,
    QuietOption,
    SchedulerFileOption,
    SchedulerOption,
    StageGbOption,
    StageOption,
    StoreOption,
    ThreadsOption,
    VerboseOption,
    WaitOption,
    WorkersOption,
    check_place,
    console_for,
    finish,
)


def infer(
    manifest: Annotated[
        Path | None, typer.Argument(help="Score the slides of this manifest; else all of the store.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    model: Annotated[
        Path | None,
        typer.Option(
            envvar="WSI_IDC_MODEL", help="A model bundle's folder. [default: the one that ships]", metavar="BUNDLE"
        ),
    ] = None,
    workers: WorkersOption = 0,
    threads: ThreadsOption = None,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    wait: WaitOption = None,
    stage: StageOption = "",
    stage_gb: StageGbOption = None,
    gpus: Annotated[int, typer.Option(help="GPUs to use, one process each; 0: the CPU.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Tiles scored together. [default: 64]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto (int8 where the bundle has it), float32 or int8.", metavar="PRECISION")
    ] = None,
    only: OnlyOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score the tiles of a store, and write one probability map a slide."""
    console = console_for(json_lines=json_lines, quiet=quiet, verbose=verbose)
    from wsi_idc.settings import InferSettings, build

    settings = build(
        InferSettings,
        batch_size=batch_size,
        workers=workers,
        threads=threads,
        scheduler=scheduler,
        scheduler_file=scheduler_file,
        wait=wait,
        gpus=gpus,
        precision=precision,
        stage=stage,
        stage_gb=stage_gb,
    )
    check_place(settings)
    from wsi_idc import infer as command
    from wsi_idc.model.bundle import SHIPPED, read_bundle

    listed = None
    if manifest is not None:
        from wsi_idc.manifest import read_manifest

        listed = [row.slide_id for row in read_manifest(manifest, away=True)]
    bundle = read_bundle(model or SHIPPED)
    if dry_run:
        from wsi_idc.store import open_store

        form = bundle.form(settings.precision, cuda=settings.gpus > 0)
        planned = command.plan_maps(open_store(store), bundle, form, only=only or [], listed=listed, force=force)
        console.plans(planned.plans)
        return
    with console.progress("infer") as listener:
        summary = command.infer(store, bundle, settings, only=only or [], listed=listed, force=force, listener=listener)
    finish(console, "infer", summary)
