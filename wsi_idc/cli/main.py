"""The application: its commands, errors to exit codes, and signals. Heavy imports happen inside commands.

Exit codes: 0 all slides done, 1 some failed, 2 bad usage, manifest, settings or model, 75 another run holds the store,
130 or 143 interrupted.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from wsi_idc import USE, __version__
from wsi_idc.cli.bench import bench
from wsi_idc.cli.config import config
from wsi_idc.cli.demo import demo
from wsi_idc.cli.doctor import doctor
from wsi_idc.cli.evaluate import evaluate
from wsi_idc.cli.export import export
from wsi_idc.cli.extract import extract
from wsi_idc.cli.infer import infer
from wsi_idc.cli.info import info
from wsi_idc.cli.manifest import make_manifest
from wsi_idc.cli.model import app as model
from wsi_idc.cli.options import console_for, current_console, tell_interrupted
from wsi_idc.cli.prune import prune
from wsi_idc.cli.report import report
from wsi_idc.cli.run import run
from wsi_idc.cli.status import status
from wsi_idc.cli.train import train
from wsi_idc.cli.verify import verify
from wsi_idc.cli.view import view
from wsi_idc.errors import WsiIdcError, system_reason

app = typer.Typer(
    name="wsi-idc",
    help=f"Probability maps of invasive ductal carcinoma (IDC) from whole-slide images. {USE}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

app.command("run")(run)
app.command("extract")(extract)
app.command("infer")(infer)
app.command("train")(train)
app.command("evaluate")(evaluate)
app.command("export")(export)
app.command("view")(view)
app.command("report")(report)
app.command("status")(status)
app.command("verify")(verify)
app.command("prune")(prune)
app.command("doctor")(doctor)
app.command("bench")(bench)
app.command("manifest")(make_manifest)
app.command("info")(info)
app.command("config")(config)
app.command("demo")(demo)
app.add_typer(model, name="model")


def _version(value: bool) -> None:
    if value:
        print(f"wsi-idc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Everything is in the commands."""


def _interrupted(number: int, _: FrameType | None) -> NoReturn:
    """End at once: the store is sound at any moment, and worker threads cannot be told to stop."""
    import multiprocessing

    again = "add --resume to go on" if "train" in sys.argv[1:2] else "the same command goes on from there"
    hint = f"interrupted: what was complete is kept, {again}"
    cursor = "\x1b[?25h\r\x1b[K" if sys.stderr.isatty() else ""
    os.write(2, f"{cursor}wsi-idc: {hint}\n".encode())
    with suppress(Exception):
        tell_interrupted(number, hint)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


def main(arguments: list[str] | None = None) -> Any:
    """The console script."""
    # What is wrong with the settings is found before a command has made its own.
    console_for(json_lines="--json" in (sys.argv[1:] if arguments is None else arguments))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        return app(args=arguments)
    except WsiIdcError as error:
        current_console().error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except OSError as error:
        current_console().error(WsiIdcError("", system_reason(error), "what was complete is kept"))
        sys.exit(1)
    except Exception as error:
        if os.environ.get("WSI_IDC_DEBUG"):
            raise
        advice = "a defect: please report it, with what WSI_IDC_DEBUG=1 prints"
        current_console().error(WsiIdcError("", f"{type(error).__name__}: {error}", advice))
        sys.exit(1)
