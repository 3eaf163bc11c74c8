"""A row a tile as CSV; the columns of WSInfer come first, so that what reads its tables reads ours."""

from pathlib import Path

from wsi_idc.export.tables import write_tiles_csv
from wsi_idc.results import Result

SUFFIX = ".csv"
VERSION = 1


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    write_tiles_csv(result, path)
    return []
