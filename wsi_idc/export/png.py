"""A picture of a slide and its map, for people."""

from pathlib import Path

from wsi_idc.export.pictures import draw_result
from wsi_idc.results import Result

SUFFIX = ".png"
VERSION = 2


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    draw_result(result, path)
    return []
