"""`wsi-idc info`: what one slide is."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import JsonOption, MinTissueOption, ReaderOption, TissueOption, console_for


def info(
    slide: Annotated[str, typer.Argument(help="A slide: a file; a DICOM, OME-NGFF or patch folder; or a URL.")],
    mpp: Annotated[float | None, typer.Option(help="um/px to use whatever the file says.")] = None,
    reader: ReaderOption = None,
    tissue: TissueOption = None,
    min_tissue: MinTissueOption = None,
    preview: Annotated[
        Path | None, typer.Option(help="Draw mask and kept tiles on the thumbnail.", metavar="OUT.png")
    ] = None,
    json_lines: JsonOption = False,
) -> None:
    """Say what a slide is: format, size, levels, um/px, tissue tiles."""
    console = console_for(json_lines=json_lines)
    from wsi_idc.info import describe_slide, info_lines
    from wsi_idc.settings import ExtractSettings, build
    from wsi_idc.sources import source_of
    from wsi_idc.units import Mpp

    settings = build(ExtractSettings, reader=reader, tissue=tissue, min_tissue=min_tissue)
    fields = describe_slide(source_of(slide), None if mpp is None else Mpp(mpp), settings, preview)
    console.record("info", **fields)
    for line in info_lines(fields):
        console.line(line)
