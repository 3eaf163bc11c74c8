"""`wsi-idc manifest`: a folder of slides to a CSV."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wsi_idc.cli.options import console_for
from wsi_idc.console import Console
from wsi_idc.errors import ResolutionError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wsi_idc.manifest import Row


def make_manifest(
    folder: Annotated[str, typer.Argument(help="A folder of slides, or the IDC data set's folder.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The CSV to write; else it is printed.", metavar="FILE")
    ] = None,
    split_file: Annotated[
        Path | None, typer.Option(help="CSV of patient_id (or slide_id) and split.", metavar="FILE")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="um/px of slides that have none of their own.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Open every slide, and say what extract and infer would take.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the CSV if it is there already.")] = False,
) -> None:
    """Write a manifest of every slide in a folder."""
    console = console_for(json_lines=False)
    if output is not None and output.exists() and not force:
        raise UsageError(output, "is there already", "add --force to replace it, or name another file")
    from wsi_idc.objects import is_url
    from wsi_idc.scan import fill_mpp, read_split_file, scan, write_manifest
    from wsi_idc.slides import detect
    from wsi_idc.units import Mpp

    if is_url(folder):
        advice = "list its objects with its provider's tool, and write their URLs in a column path"
        raise UsageError(folder, "is a URL, and a manifest is made of a folder", advice)
    found = scan(Path(folder), detect, read_split_file(split_file) if split_file else None)
    if not found.rows:
        raise UsageError(folder, "no slide found in it", "see the formats in the README")
    rows, lines = (found.rows, []) if mpp is None else fill_mpp(found.rows, Mpp(mpp), _lacks_mpp)
    if output is not None or not check:
        write_manifest(output or sys.stdout, rows)
    for line in [*found.lines(), *lines]:
        console.trouble(line)
    console.trouble(f"{len(rows)} slide{'s' if len(rows) != 1 else ''}{f' in {output}' if output else ''}")
    if check:
        _check(console, rows)


def _check(console: Console, rows: "Sequence[Row]") -> None:
    """Say of each slide what it is, or why extract cannot cut it, and what all of them would take."""
    from wsi_idc.survey import Surveyed, survey

    def told(slide_id: str, found: Surveyed | str) -> None:
        if isinstance(found, str):
            console.trouble(f"failed {slide_id}: {found}")
            return
        console.line(f"{slide_id}: {found.line}")
        for warning in found.warnings:
            console.trouble(f"warning {slide_id}: {warning}")

    found = survey(rows, told)
    for line in found.lines():
        console.line(line)
    if found.failures:
        raise typer.Exit(1)


def _lacks_mpp(path: Path) -> bool:
    """Whether a slide's own um/px is absent or impossible.

    Raises:
        SlideError: it cannot be opened.
        OSError: likewise.
    """
    from wsi_idc.slides import open_slide

    try:
        open_slide(path).close()
    except ResolutionError:
        return True
    return False
