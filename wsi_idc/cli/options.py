"""Options that several commands take, once, and what a command begins and ends with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wsi_idc.console import Console
from wsi_idc.errors import UsageError

if TYPE_CHECKING:
    from wsi_idc.settings import PlaceSettings
    from wsi_idc.work.jobs import Summary

StoreOption = Annotated[
    str,
    typer.Option(
        "--store", envvar="WSI_IDC_STORE", help="The tile store: a folder, or s3://BUCKET/PREFIX.", metavar="STORE"
    ),
]
OnlyOption = Annotated[
    list[str] | None, typer.Option("--only", metavar="ID", help="Limit to this slide; may be repeated.")
]
WorkersOption = Annotated[
    int, typer.Option("--workers", help="Local worker processes; 0: all in this process, by threads.")
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
    str,
    typer.Option(
        "--stage",
        envvar="WSI_IDC_STAGE",
        help="Copy slides to this local folder before they are read; s3://, gs:// and az:// need it.",
        metavar="DIR",
    ),
]
StageGbOption = Annotated[
    float | None,
    typer.Option("--stage-gb", envvar="WSI_IDC_STAGE_GB", help="GB that the stage holds at most. [default: 50]"),
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

DEFAULT_STORE = "tiles.zarr"


def console_for(*, json_lines: bool, quiet: bool = False, verbose: bool = False) -> Console:
    """The console of the command that runs; `main` tells errors there."""
    global _current
    _current = Console(json_lines=json_lines, verbosity=verbose - quiet)
    return _current


def current_console() -> Console:
    """Where the command that runs tells things."""
    return _current


_current = Console()


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
