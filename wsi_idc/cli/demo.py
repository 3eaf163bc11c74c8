"""`wsi-idc demo`: three made slides from end to end."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import JsonOption, QuietOption, console_for


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to make it.")] = Path("demo"),
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make three small slides, extract and score them, and draw their maps."""
    console = console_for(json_lines=json_lines, quiet=quiet)
    from wsi_idc.demo import run_demo

    run_demo(folder, console)
