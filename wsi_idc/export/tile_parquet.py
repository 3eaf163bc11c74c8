"""A row a tile as Parquet; the columns are those of the CSV."""

from pathlib import Path

from wsi_idc.export.tables import tile_columns, write_parquet
from wsi_idc.results import Result

SUFFIX = ".parquet"
VERSION = 1


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    import pyarrow as pa

    with path.open("wb") as stream:
        write_parquet(pa.table(tile_columns(result)), stream)
    return []
