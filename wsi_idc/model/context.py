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
    alone = probability.astype(np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(alone / (1.0 - alone))
    surface = smooth_logits(logits, cell, spec, context) / context.temperature + context.shift
    with np.errstate(over="ignore"):
        return (1.0 / (1.0 + np.exp(-surface))).astype(np.float32)


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
    phase = cell[:, 0] % step * step + cell[:, 1] % step
    for part in np.unique(phase):
        own = np.flatnonzero(phase == part)
        surface[own] = _surface(readings[own], cell[own] // step, reach, context.spread) + context.mean
    return surface


def _surface(
    logits: NDArray[np.floating], cell: NDArray[np.integer], reach: float, spread: float
) -> NDArray[np.float64]:
    """The mean of a field about nought, its reach in cells, each reading of it with an error of 1: float64 (n,)."""
    kappa2 = 8.0 / reach**2
    # The domain reflects at its edge, which would make the surface stiffer there: keep the edge away from tissue.
    margin = math.ceil(reach)
    inside = cell.astype(np.int64) - cell.min(axis=0) + margin
    place = (inside[:, 0], inside[:, 1])
    rows, columns = (int(side) + 1 + margin for side in inside.max(axis=0))
    readings, weight = np.zeros((rows, columns)), np.zeros((rows, columns))
    readings[place], weight[place] = logits, 1.0
    surface = _solve(readings, weight, kappa2, 1.0 / (4.0 * math.pi * kappa2 * spread**2))
    return np.asarray(surface[place])


_ERROR = 1e-9
"""Of the surface, as a length over all tiles together, at which it counts as found."""
_MOST_ROUNDS = 2000
"""The usual context takes 25 to 35, the hardest that was tried 60."""


def _solve(
    readings: NDArray[np.float64], weight: NDArray[np.float64], kappa2: float, tau: float
) -> NDArray[np.float64]:
    """What `tau (kappa^2 + L)^2 + weight` makes the readings of, over a grid that reflects at its edge.

    Conjugate gradients, each round led by a multigrid cycle (Briggs, Henson and McCormick, A Multigrid Tutorial,
    2000), so that their number does not grow with the grid. Single precision and an edge a few cells off will do for
    the cycle, which decides how soon the surface is found and not which. Sums are numpy's own and not BLAS's: they are
    added up in the same order whatever the number of threads.

    Args:
        readings: float64 (rows, columns), nought where there is none.
        weight: float64 (rows, columns), 1 where there is a reading, and 0.
        kappa2: kappa squared, in 1/cell^2.
        tau: see above.

    Returns:
        float64 (rows, columns).

    Raises:
        ModelError: it was not found; that would be a fault of this module.
    """
    operator = _Level(weight, 1.0, kappa2, tau)
    count = 1 + max(0, math.ceil(math.log(4.0 / kappa2, 4.0)))  # on the last, the Laplacian is no more than kappa^2
    unit = 2 ** (count - 1)
    rows, columns = weight.shape
    padding = ((0, -rows % unit), (0, -columns % unit))
    levels = [_Level(np.pad(weight, padding).astype(np.float32), 1.0, kappa2, tau)]
    while len(levels) < count:
        levels.append(_Level(_halved(levels[-1].weight), levels[-1].scale / 4.0, kappa2, tau))

    def lead() -> NDArray[np.float64]:
        return _cycle(levels, np.pad(left, padding).astype(np.float32))[:rows, :columns].astype(np.float64)

    def dot(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return float(np.multiply(one, other, out=scratch).sum())

    surface, scratch, left = np.zeros_like(readings), np.empty_like(readings), readings.copy()
    direction = lead()
    # The square of the error, weighed by the operator, and so of no tile's less: the cycle nearly is the inverse.
    error = dot(left, direction)
    for _ in range(_MOST_ROUNDS):
        if error <= _ERROR**2:
            return surface
        if not math.isfinite(error):
            break
        applied = operator.times(direction)
        step = error / dot(direction, applied)
        surface += np.multiply(direction, step, out=scratch)
        left -= np.multiply(applied, step, out=scratch)
        better = lead()
        before, error = error, dot(left, better)
        direction *= error / before
        direction += better
    raise ModelError("context", f"no surface over {int(weight.sum()):,} tiles was found", "report this as a bug")


class _Level:
    """The operator on one of the grids, whose cells are 1, 2, 4 ... of the finest wide.

    Args:
        weight: float32 or float64 (rows, columns); the operator works at this precision.
        scale: one over the area of its cells.
        kappa2: kappa squared.
        tau: see `_solve`.
    """

    def __init__(self, weight: NDArray[np.floating], scale: float, kappa2: float, tau: float) -> None:
        self.weight, self.scale = weight, scale
        root = np.array([[0.0, -scale, 0.0], [-scale, 4.0 * scale + kappa2, -scale], [0.0, -scale, 0.0]])
        self._stencil = np.zeros((5, 5))
        for row, column in np.ndindex(3, 3):
            self._stencil[row : row + 3, column : column + 3] += tau * root[row, column] * root
        diagonal = self._stencil[2, 2]
        self._inverse = (1.0 / (diagonal + weight)).astype(weight.dtype)
        # Two steps of Chebyshev's iteration over the upper part of what the diagonal leaves of the spectrum.
        top = tau * (8.0 * scale + kappa2) ** 2 / diagonal
        middle, half = top * (1.0 + 1.0 / _SMOOTHED) / 2.0, top * (1.0 - 1.0 / _SMOOTHED) / 2.0
        ratio = middle / half
        self._first = 1.0 / middle
        self._second = 2.0 / (2.0 * ratio - 1.0 / ratio) / half
        self._again = 1.0 / (2.0 * ratio**2 - 1.0)

    def times(self, values: NDArray[Any]) -> NDArray[Any]:
        """The operator times a surface."""
        result = _filtered(values, self._stencil)
        result += self.weight * values
        return result

    def smooth(self, left: NDArray[Any]) -> NDArray[Any]:
        """What takes most of the rough part out of what is left."""
        step = left * self._inverse
        step *= self._first
        then = left - self.times(step)
        then *= self._inverse
        then *= self._second
        step *= 1.0 + self._again
        step += then
        return np.asarray(step)


_SMOOTHED = 6.0
"""The upper part of a spectrum is from its top to one over this: what the next grid, half as fine, cannot show. (Of the
squared Laplacian that would be 16; less, but better smoothed, is quicker.)"""


def _cycle(levels: list[_Level], left: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearly the inverse of the first level's operator, times what is left; symmetric, as conjugate gradients want."""
    level = levels[0]
    found = level.smooth(left)
    if len(levels) > 1:
        found += _doubled(_cycle(levels[1:], _halved(_filtered(left - level.times(found), _SOFT))))
    found += level.smooth(left - level.times(found))
    return found


_SOFT = np.outer((1.0, 2.0, 1.0), (1.0, 2.0, 1.0)) / 16.0
"""Before a grid is halved and after it is doubled: between cells, values lie on a straight line."""


def _filtered(values: NDArray[Any], stencil: NDArray[np.float64]) -> NDArray[Any]:
    import cv2

    return np.asarray(cv2.filter2D(values, -1, stencil, borderType=cv2.BORDER_REFLECT))


def _halved(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of each four cells."""
    import cv2

    rows, columns = values.shape
    return np.asarray(cv2.resize(values, (columns // 2, rows // 2), interpolation=cv2.INTER_AREA))


def _doubled(values: NDArray[np.float32]) -> NDArray[np.float32]:
    import cv2

    rows, columns = values.shape
    wide = cv2.resize(values, (columns * 2, rows * 2), interpolation=cv2.INTER_NEAREST)
    return _filtered(wide, _SOFT)
