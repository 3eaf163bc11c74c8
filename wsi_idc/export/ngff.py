"""The map as OME-Zarr 0.5 (Zarr 3), as the store has it, but by itself."""

from pathlib import Path

from wsi_idc.export.ome_zarr import write_ome_zarr
from wsi_idc.results import Result

SUFFIX = ".ome.zarr"
VERSION = 1


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    write_ome_zarr(result, path, "0.5")
    return []
