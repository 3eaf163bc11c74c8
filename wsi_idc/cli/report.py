"""`wsi-idc report`: a page of all slides and their maps."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc import USE
from wsi_idc.cli.export import MapModelOption, ThresholdOption
from wsi_idc.cli.options import (
    DEFAULT_STORE,
    ConfigOption,
    JsonOption,
    OnlyOption,
    QuietOption,
    StoreOption,
    console_for,
    load_settings,
)


def report(
    config: ConfigOption = None,
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path | None, typer.Option(help="The page. [default: report.html]", metavar="FILE")] = None,
    model: MapModelOption = None,
    threshold: ThresholdOption = None,
    only: OnlyOption = None,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one page that shows each slide with its map, what failed, and what it was all made from."""
    console = console_for(json_lines=json_lines, quiet=quiet)
    from wsi_idc.report import write

    found = load_settings({"report.out": out, "report.threshold": threshold}, file=config)
    settings, model = found.report, model or (str(found.model) if found.model else None)
    with console.progress("report") as listener:
        told = listener if console.draws else None
        written = write(store, model, settings.out, threshold=settings.threshold, only=only or [], listener=told)
    console.record("report", page=str(written.page), folder=written.folder and str(written.folder), **written.counts)
    console.table(list(written.counts), [[f"{count:,}" for count in written.counts.values()]])
    beside = f" with its pictures in {written.folder.parent}, which belong together" if written.folder else ""
    console.line(f"wrote {written.page}{beside}. {USE}")
