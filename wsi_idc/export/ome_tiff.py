"""The map as a pyramidal OME-TIFF: float32, NaN where there is no tile, its pixel's size and place in um."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE, __version__
from wsi_idc.results import Result
from wsi_idc.store.ngff import first_centre_um, pitch_um

SUFFIX = ".ome.tif"
VERSION = 1
_TILE = 256
_SMALLEST = 256
"""Levels are added until the longer side is no longer than this."""


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    import tifffile

    slide = result.slide
    pitch, (x, y) = pitch_um(slide), first_centre_um(slide)
    about = f"{slide.slide_id}: P({result.positive}) by {result.model}, threshold {result.threshold:g}. {USE}"
    metadata = {
        "axes": "YX",
        "Name": f"P({result.positive}) {result.model}",
        "Description": about,
        "PhysicalSizeX": pitch,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": pitch,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": f"P({result.positive})"},
        "Plane": {"PositionX": x, "PositionXUnit": "µm", "PositionY": y, "PositionYUnit": "µm"},
    }
    levels = _pyramid(result.image)
    options = {"tile": (_TILE, _TILE), "compression": "adobe_deflate", "photometric": "minisblack"}
    with tifffile.TiffWriter(path, ome=True, bigtiff=False) as out:
        for number, level in enumerate(levels):
            per_cm = (1e4 / (pitch * 2**number),) * 2
            out.write(
                level,
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=int(number > 0),
                metadata=metadata if number == 0 else None,
                resolution=per_cm,
                resolutionunit="CENTIMETER",
                software=f"wsi-idc {__version__}",
                **options,
            )
    return []


def _pyramid(image: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The map and its halvings: the mean of the pixels that have a value; NaN where none of the four has one."""
    levels = [image]
    while max(levels[-1].shape) > _SMALLEST:
        height, width = levels[-1].shape
        padded = np.pad(levels[-1], ((0, height % 2), (0, width % 2)), constant_values=np.nan)
        squares = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2)
        there = ~np.isnan(squares)
        count = there.sum(axis=(1, 3))
        total = np.where(there, squares, 0).sum(axis=(1, 3), dtype=np.float64)
        levels.append(np.where(count, total / np.maximum(count, 1), np.nan).astype(np.float32))
    return levels
