"""The map as OME-Zarr 0.4 (Zarr 2), for programs that read no later one."""

from pathlib import Path

from wsi_idc.export.ome_zarr import write_ome_zarr
from wsi_idc.results import Result

SUFFIX = ".ome.zarr"
VERSION = 1


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    write_ome_zarr(result, path, "0.4")
    return []
