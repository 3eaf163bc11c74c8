"""Options that several commands take, once, and what a command begins and ends with."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_idc.console import Console
from wsi_idc.errors import UsageError

if TYPE_CHECKING:
    from wsi_idc.config import InForce
    from wsi_idc.settings import PlaceSettings
    from wsi_idc.work.jobs import Summary

DEFAULT_STORE = "tiles.zarr"
_STORE_HELP = "The tile store: a folder, or s3://BUCKET/PREFIX; or WSI_IDC_STORE."


def _store_in_force(context: typer.Context, parameter: typer.CallbackParam, value: str) -> str:
    """The store that was named, or the one of the settings, for commands that take no other setting from there."""
    source = context.get_parameter_source(str(parameter.name))
    if context.resilient_parsing or source is None or source.name != "DEFAULT":
        return value
    manifest, file = (
        None if context.params.get(name) is None else Path(context.params[name]) for name in ("manifest", "config")
    )
    return load_settings({}, manifest=manifest, file=file).store


StoreOption = Annotated[str, typer.Option("--store", help=_STORE_HELP, metavar="STORE", callback=_store_in_force)]
StoreSetting = Annotated[
    str | None, typer.Option("--store", help=f"{_STORE_HELP} [default: {DEFAULT_STORE}]", metavar="STORE")
]
ModelSetting = Annotated[
    Path | None,
    typer.Option(
        "--model", help="A model bundle's folder; or WSI_IDC_MODEL. [default: the one that ships]", metavar="BUNDLE"
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="File of settings; or WSI_IDC_CONFIG. [default: wsi-idc.toml beside the manifest]",
        metavar="FILE",
    ),
]
OnlyOption = Annotated[
    list[str] | None, typer.Option("--only", metavar="ID", help="Limit to this slide; may be repeated.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", help="Local worker processes; 0: all in this process, by threads. [default: 0]"),
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", help="GPUs to use, one process each; 0: the CPU. [default: 0]")
]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size", help="Tiles scored together. [default: 64]")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="auto (int8 where the bundle has it), float32 or int8. [default: auto]",
        metavar="PRECISION",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of each task. [default: the cores, shared evenly]")
]
SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", metavar="ADDRESS", help="Run on the Dask cluster of this scheduler.")
]
SchedulerFileOption = Annotated[
    Path | None,
    typer.Option("--scheduler-file", metavar="FILE", help="The same, by the file that the scheduler wrote."),
]
WaitOption = Annotated[
    float | None, typer.Option("--wait", metavar="SECONDS", help="Wait so long for a cluster's workers. [default: 60]")
]
StageOption = Annotated[
    str | None,
    typer.Option(
        "--stage",
        help="Copy slides to this local folder before they are read; s3://, gs:// and az:// need it. Or WSI_IDC_STAGE.",
        metavar="DIR",
    ),
]
StageGbOption = Annotated[
    float | None,
    typer.Option("--stage-gb", help="GB that the stage holds at most; or WSI_IDC_STAGE_GB. [default: 50]"),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do again what is up to date.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print only what went wrong.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Also say what was skipped, and why.")]
ReaderOption = Annotated[
    str | None,
    typer.Option(help="What reads slides: auto, openslide or tiatoolbox. [default: auto]", metavar="READER"),
]
TissueOption = Annotated[
    str | None,
    typer.Option(help="Tissue mask: default, otsu, morphological or none. [default: default]", metavar="METHOD"),
]
MinTissueOption = Annotated[float | None, typer.Option(help="Least part of a tile that is tissue. [default: 0.05]")]


def load_settings(said: Mapping[str, Any], *, manifest: Path | None = None, file: Path | None = None) -> "InForce":
    """The settings in force: see `config.in_force`. Nothing of it is imported before a command runs."""
    from wsi_idc.config import in_force

    return in_force(said, manifest=manifest, file=file)


def console_for(*, json_lines: bool, quiet: bool = False, verbose: bool = False) -> Console:
    """The console of the command that runs; `main` tells errors there."""
    global _current, _interrupted
    _interrupted = _nothing
    _current = Console(json_lines=json_lines, verbosity=verbose - quiet)
    return _current


def current_console() -> Console:
    """Where the command that runs tells things."""
    return _current


_current = Console()


def when_interrupted(tell: Callable[[int], None]) -> None:
    """Call this with the signal's number when the command is interrupted."""
    global _interrupted
    _interrupted = tell


def tell_interrupted(number: int, hint: str) -> None:
    """Say in files that the command is interrupted; on the terminal that was said."""
    _current.log(hint, logging.ERROR)
    _interrupted(number)


def _nothing(number: int) -> None:
    """What a command without files of its own does."""


_interrupted: Callable[[int], None] = _nothing


def check_place(settings: "PlaceSettings") -> None:
    """Refuse options that contradict each other about where work runs.

    Raises:
        UsageError: they do.
    """
    if settings.scheduler and settings.scheduler_file:
        raise UsageError("--scheduler", "cannot go with --scheduler-file", "leave one of them out")
    if settings.workers and settings.elsewhere:
        raise UsageError("--workers", "cannot go with --scheduler", "a cluster has the workers that were started there")
    if settings.workers and settings.gpus:
        raise UsageError("--gpus", "cannot go with --workers", "leave one of them out")


def finish(console: Console, command: str, summary: "Summary") -> None:
    """The closing table and the exit code."""
    console.summary(command, summary)
    if summary.failures:
        raise typer.Exit(1)
