"""The tile grid: pure geometry, anchored at the slide's origin.

A tile is known by its cell (row, column). The cell's level-0 position is its ideal position, `index * step`, rounded
half up to a whole pixel; the step is `stride_px * mpp / slide mpp`, a float that is never accumulated, so the last tile
of a row is as exact as the first.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_idc.settings import TileSpec
from wsi_idc.units import Level0Px, Mpp


@dataclass(frozen=True)
class Grid:
    """Every tile of one slide.

    Args:
        spec: tile size, resolution and stride.
        size: level-0 (width, height) in pixels.
        mpp: level-0 um/px (x, y).
    """

    spec: TileSpec
    size: tuple[Level0Px, Level0Px]
    mpp: tuple[Mpp, Mpp]

    @property
    def step(self) -> tuple[float, float]:
        """Level-0 pixels (x, y) from one cell to the next."""
        length = self.spec.stride_px * self.spec.mpp
        return length / self.mpp[0], length / self.mpp[1]

    @property
    def extent(self) -> tuple[float, float]:
        """Level-0 pixels (x, y) that a tile covers."""
        length = self.spec.size_px * self.spec.mpp
        return length / self.mpp[0], length / self.mpp[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the grid.

        The edge rule `last`: "keep" takes each tile that starts inside the slide, and what lies beyond the edge is
        background; "drop" takes only tiles that lie wholly inside, to half a pixel.
        """
        counts = [
            _count(length, step, extent, self.spec.last)
            for length, step, extent in zip(self.size, self.step, self.extent, strict=True)
        ]
        return counts[1], counts[0]

    def __len__(self) -> int:
        return self.shape[0] * self.shape[1]

    def cells(self) -> NDArray[np.int32]:
        """Every cell, row by row: int32 (n, 2) of row, column."""
        rows, columns = self.shape
        grid = np.indices((rows, columns), dtype=np.int32)
        return grid.reshape(2, -1).T.copy()

    def image(self, cells: NDArray[np.integer], values: NDArray[np.floating]) -> NDArray[np.float32]:
        """Values in the places of their cells: float32 (rows, columns), or (k, rows, columns); NaN where there is none.

        Args:
            cells: int (n, 2) of row, column.
            values: (n,), or (n, k).
        """
        image = np.full((*values.shape[1:], *self.shape), np.nan, np.float32)
        image[..., cells[:, 0], cells[:, 1]] = values.T
        return image

    def position(self, cells: NDArray[np.integer]) -> NDArray[np.int32]:
        """Level-0 x, y of each cell's top-left pixel: int32 (n, 2), from cells (n, 2) of row, column."""
        ideal = cells[:, ::-1] * np.asarray(self.step)
        whole: NDArray[np.int32] = np.floor(ideal + 0.5).astype(np.int32)
        return whole


def _count(length: int, step: float, extent: float, last: str) -> int:
    """Cells along one axis whose rounded positions obey the edge rule."""
    room = length if last == "keep" else length - extent + 0.5
    count = max(0, math.ceil((room - 0.5) / step) if last == "keep" else math.floor(room / step) + 1)
    while count > 0 and not _fits(count - 1, length, step, extent, last):
        count -= 1
    while _fits(count, length, step, extent, last):
        count += 1
    return count


def _fits(index: int, length: int, step: float, extent: float, last: str) -> bool:
    position = math.floor(index * step + 0.5)
    return position < length if last == "keep" else position + extent <= length + 0.5
