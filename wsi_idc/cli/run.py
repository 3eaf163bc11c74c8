"""`wsi-idc run`: the whole night in one command."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wsi_idc import USE, __version__
from wsi_idc.cli.options import (
    ConfigOption,
    GpusOption,
    JsonOption,
    ModelSetting,
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
    load_settings,
    when_interrupted,
)
from wsi_idc.console import Console, duration

if TYPE_CHECKING:
    from wsi_idc.run import Night
    from wsi_idc.settings import RunSettings
    from wsi_idc.work.jobs import Listener


def run(
    manifest: Annotated[Path, typer.Argument(help="CSV with a column path; see the README for the others.")],
    config: ConfigOption = None,
    store: StoreSetting = None,
    model: ModelSetting = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Do nothing if a slide, annotation or mask of the manifest is missing.")
    ] = False,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Keep the tiles' pixels in the store, as training needs them.")
    ] = False,
    workers: WorkersOption = None,
    gpus: GpusOption = None,
    threads: ThreadsOption = None,
    scheduler: SchedulerOption = None,
    scheduler_file: SchedulerFileOption = None,
    wait: WaitOption = None,
    stage: StageOption = None,
    stage_gb: StageGbOption = None,
    log_file: Annotated[
        Path | None,
        typer.Option(help="Keep what is told, with times, in this file; 10 MB, five older ones.", metavar="FILE"),
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="Write figures of the run for Prometheus.", metavar="FILE.prom")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Write what became of the slides, as a text to be mailed.", metavar="FILE")
    ] = None,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Extract, infer, export and report what is new or changed, for cron. Settings: wsi-idc.toml, see docs/cron.md."""
    console = console_for(json_lines=json_lines, quiet=quiet, verbose=verbose)
    found = load_settings(
        {
            "store": store,
            "model": None if model is None else str(model),
            "extract.strict": strict or None,
            "extract.pixels": pixels or None,
            "workers": workers,
            "infer.gpus": gpus,
            "threads": threads,
            "scheduler": scheduler,
            "scheduler_file": scheduler_file,
            "wait": wait,
            "stage": stage,
            "stage_gb": stage_gb,
            "run.log_file": log_file,
            "run.metrics": metrics,
            "run.summary": summary,
        },
        manifest=manifest,
        file=config,
    )
    check_place(found.extract)
    check_place(found.infer)
    if found.run.log_file is not None:
        console.log_to(found.run.log_file)
    from wsi_idc import run as command

    command.check_outputs(found)
    night = command.Night(manifest, found.store)

    def stopped(number: int) -> None:
        night.end(f"interrupted by signal {number}; the same command goes on from there", 128 + number)
        _write(console, found.run, night)

    @contextmanager
    def progress(name: str) -> "Iterator[Callable[[Sequence[str]], Listener]]":
        with console.progress(name) as factory:

            def begin(slides: Sequence[str]) -> "Listener":
                console.line(f"{name}: {len(slides):,} slide{'s' if len(slides) != 1 else ''} to do")
                return factory(slides)

            yield begin

    when_interrupted(stopped)
    console.log(f"wsi-idc {__version__} run {manifest}, store {found.store}")
    try:
        command.run(night, found, progress=progress)
    except Exception as error:
        night.end(*command.error_line(error))
        _write(console, found.run, night)
        _tell(console, night)
        raise
    night.end()
    written = _write(console, found.run, night)
    _tell(console, night)
    console.line(f"run: {night.headline}, in {duration(night.seconds)}. {USE}")
    if night.exit_code or not written:
        raise typer.Exit(night.exit_code or 1)


def _tell(console: Console, night: "Night") -> None:
    """The closing table, and what is told beside it."""
    from wsi_idc.console import counts
    from wsi_idc.run import stage_rows

    for stage in night.stages:
        console.notes(stage.name, stage.summary)
    if night.stages:
        console.table(*stage_rows(night))
    console.record(
        "run",
        exit_code=night.exit_code,
        slides=len(night.slides),
        failed=len(night.failures),
        seconds=round(night.seconds, 1),
        stages={stage.name: counts(stage.summary) for stage in night.stages},
    )


def _write(console: Console, settings: "RunSettings", night: "Night") -> bool:
    """Write the files for those who were asleep; whether that went well."""
    from wsi_idc.errors import system_reason
    from wsi_idc.files import write_whole
    from wsi_idc.run import metrics_text, summary_text

    well = True
    for path, text_of in ((settings.metrics, metrics_text), (settings.summary, summary_text)):
        if path is None:
            continue
        try:
            write_whole(path, text_of(night).encode(errors="backslashreplace"))
        except OSError as error:
            console.trouble(f"wsi-idc: {path}: cannot be written ({system_reason(error)})")
            well = False
    return well
