"""The neighbours' part in a tile's probability.

IDC grows in regions, and pathologists outline regions: a tile among tumour is likelier tumour than its pixels alone
say. The logits of a slide are taken as noisy readings of a smooth surface over the grid, a Gaussian field of the Matern
kind with smoothness 1, whose precision on a grid is sparse (Lindgren, Rue and Lindstrom, J R Stat Soc B 2011;73:423):
`tau * (kappa^2 + L)^2`, L the grid's Laplacian. What is given back is the surface's mean given all readings. Where
neighbours are few, a tile's own logit counts for more; a tile without any keeps its own, drawn towards the mean.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import ModelError
from wsi_idc.model.config import Context
from wsi_idc.settings import TileSpec

MOST_TILES = 60
"""The longest reach in tiles; the time to find the surface grows with it."""


def in_context(
    probability: NDArray[np.floating], cell: NDArray[np.integer], spec: TileSpec, context: Context
) -> NDArray[np.float32]:
    """P(IDC) of one slide's tiles given all of them: float32 (n,).

    Args:
        probability: float (n,), of each tile alone.
        cell: int (n, 2), row and column in the grid, each once.
        spec: the grid's tile size, um/px and stride.
        context: how far neighbours reach and how much they weigh.

    Raises:
        ModelError: the reach is too long for tiles of this size.
    """
    from scipy.special import expit, logit

    surface = smooth_logits(logit(probability.astype(np.float64)), cell, spec, context)
    return np.asarray(expit(surface / context.temperature + context.shift), np.float32)


def by_slide(
    slide: NDArray[np.str_], of_one: Callable[[NDArray[np.int64]], NDArray[np.floating]]
) -> NDArray[np.float64]:
    """What a function gives for each slide, in the order of the tiles: float64 (n,).

    Args:
        slide: str (n,), slide ids.
        of_one: from int64 (m,), the places of one slide's tiles, to float (m,).
    """
    result = np.empty(len(slide))
    for name in np.unique(slide):
        own = np.flatnonzero(slide == name)
        result[own] = of_one(own)
    return result


def smooth_logits(
    logits: NDArray[np.floating], cell: NDArray[np.integer], spec: TileSpec, context: Context
) -> NDArray[np.float64]:
    """The surface's mean at the tiles, before temperature and shift: float64 (n,).

    Where tiles overlap, they are taken as several grids of tiles that do not, each by itself: the reach and the spread
    were learnt on such.

    Args:
        logits: float (n,), of each tile alone; may be infinite.
        cell: int (n, 2), row and column in the grid, each once.
        spec: the grid.
        context: reach, spread, mean and limit.

    Raises:
        ModelError: the reach is too long for tiles of this size.
    """
    step = max(1, round(spec.size_px / spec.stride_px))
    reach = context.reach_um / (step * spec.stride_px * spec.mpp)
    if reach > MOST_TILES:
        problem = f"{context.reach_um:g} um are {reach:.0f} tiles, more than {MOST_TILES}"
        raise ModelError("context.reach_um", problem, "the bundle was made for larger tiles")
    readings = np.clip(logits, -context.limit, context.limit) - context.mean
    surface = np.empty(len(logits))
    phase = cell % step
    for part in np.unique(phase, axis=0):
        own = np.flatnonzero((phase == part).all(axis=1))
        surface[own] = _surface(readings[own], cell[own] // step, reach, context.spread) + context.mean
    return surface


def _surface(logits: NDArray[np.floating], cell: NDArray[np.integer], reach: float, spread: float) -> Any:
    """The mean of a field about nought, its reach in cells, each reading of it with an error of 1: float64 (n,)."""
    import scipy.sparse
    from scipy.sparse.linalg import cg
    from threadpoolctl import threadpool_limits

    kappa = math.sqrt(8.0) / reach
    # The domain reflects at its edge, which would make the surface stiffer there: keep the edge away from tissue.
    margin = math.ceil(reach)
    inside = cell.astype(np.int64) - cell.min(axis=0) + margin
    rows, columns = (int(side) + 1 + margin for side in inside.max(axis=0))
    place = inside[:, 0] * columns + inside[:, 1]
    readings, weight = np.zeros(rows * columns), np.zeros(rows * columns)
    readings[place], weight[place] = logits, 1.0
    root = _laplacian(rows, columns) + kappa**2 * scipy.sparse.identity(rows * columns, format="csr")
    tau = 1.0 / (4.0 * math.pi * (kappa * spread) ** 2)
    matrix = (tau * (root @ root) + scipy.sparse.diags(weight)).tocsr()
    # One thread, so that sums are added up in the same order whatever else the process does.
    with threadpool_limits(1, "blas"):
        surface, failed = cg(
            matrix, readings, rtol=1e-8, maxiter=100_000, M=scipy.sparse.diags(1.0 / matrix.diagonal())
        )
    if failed:
        raise ModelError("context", f"no surface over {len(logits):,} tiles was found", "report this as a bug")
    return surface[place]


def _laplacian(rows: int, columns: int) -> Any:
    """Neighbours counted less neighbours added up, over a grid whose edge has none beyond: CSR float64."""
    import scipy.sparse

    def line(count: int) -> Any:
        ends = np.full(count, 2.0)
        ends[[0, -1]] -= 1.0
        beside = -np.ones(count - 1)
        return scipy.sparse.diags([beside, ends, beside], [-1, 0, 1], format="csr")

    return scipy.sparse.kronsum(line(columns), line(rows), format="csr")
