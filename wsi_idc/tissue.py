"""Where a slide holds tissue, and how good each tile is.

The default method knows colour by optical density relative to the slide's own glass, od = log10(glass / pixel)
(Beer-Lambert; Ruifrok and Johnston 2001, Anal Quant Cytol Histol 23:291). Grey things (dust, a coverslip's edge, black
ink, out-of-focus glass) absorb red, green and blue alike; haematoxylin and eosin absorb green more than blue or red;
each pen colour breaks that order in its own way. No weights are learned.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import AnnotationError, system_advice
from wsi_idc.grid import Grid
from wsi_idc.settings import TissueMethod
from wsi_idc.units import Mpp

MASK_MPP = Mpp(8.0)
"""um/px at which a mask is best computed: walls of fat still show, and a 100,000-px slide is a small picture."""

MAX_MASK_PIXELS = 2**26
"""Pixels that a mask picture may have: at 4 um/px, 32 x 32 mm."""
_GREY_MODES = ("1", "L", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes of one channel whose values are what they are."""

STAIN_PIXELS = 1000
"""Stained pixels of a thumbnail from which its stain can be told: at 8 um/px, 0.06 mm2."""
_STAIN_SAMPLE = 100_000
"""Of the pixels of tissue about so many are looked at, evenly spread."""
_STAINED = 0.05
"""Mean optical density from which a pixel of tissue is stained; what is paler is fat and the glass between cells."""

_BAND = 2**15
"""Pixels of a picture that are looked at together: a dozen planes of them fit a core's cache."""
_SQUARE = 5
"""Side in pixels of the squares that a disc is put together from."""
_GLASS_WHITE = 240.0
_DARK = 90.0
_BLACK = 0.7
"""Mean optical density from which ink is black."""


Steps: TypeAlias = dict[str, float]
"""Step of the mask -> by what part of the slide's area it grew (above 0) or shrank, in the order of the steps; the
first is what had the colours of tissue at all. Where there was nothing to begin with, the reason alone, with 0."""
DARK, PLAIN = "dark background", "one colour"
"""The reasons why there was nothing to begin with: no bright glass, or nothing on it."""


def tissue_mask(
    thumbnail: NDArray[np.uint8], mpp: Mpp, method: TissueMethod = "default", steps: Steps | None = None
) -> NDArray[np.bool_]:
    """Where the slide holds tissue.

    Args:
        thumbnail: uint8 (h, w, 3) RGB of the whole slide, on a background colour.
        mpp: um/px of the thumbnail.
        method: "default" (this module's), "otsu" or "morphological" (tiatoolbox's maskers), or "none" (all tissue).
        steps: is given what each step did; the other methods' steps are not known.

    Returns:
        bool (h, w), true where there is tissue.
    """
    steps = {} if steps is None else steps
    if method == "none":
        return np.ones(thumbnail.shape[:2], dtype=np.bool_)
    if min(thumbnail.shape[:2]) == 0 or not np.ptp(thumbnail):
        steps[PLAIN] = 0.0
        return np.zeros(thumbnail.shape[:2], dtype=np.bool_)
    if method == "default":
        return _default_mask(thumbnail, mpp, steps)
    from wsi_idc.slides.toolbox import without_log_handlers

    with without_log_handlers():
        from tiatoolbox.tools.tissuemask import MorphologicalMasker, OtsuTissueMasker

    masker = OtsuTissueMasker() if method == "otsu" else MorphologicalMasker(mpp=mpp)
    try:
        return np.asarray(masker.fit_transform([thumbnail])[0], dtype=np.bool_)
    except (ValueError, ZeroDivisionError, FloatingPointError):  # the maskers cannot fit a blank picture
        return np.zeros(thumbnail.shape[:2], dtype=np.bool_)


def _default_mask(rgb: NDArray[np.uint8], mpp: float, steps: Steps) -> NDArray[np.bool_]:
    """Strongly stained pixels, pale textured ones beside them (fat), without ink and without what is too small."""
    import cv2

    shape = rgb.shape[:2]
    if mpp < 4.0:
        size = (max(1, round(shape[1] * mpp / 4.0)), max(1, round(shape[0] * mpp / 4.0)))
        small = _default_mask(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), 4.0, steps)
        large = cv2.resize(small.view(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST)
        return np.asarray(large.view(np.bool_), dtype=np.bool_)
    glass = _glass(rgb)
    if glass is None:
        steps[DARK] = 0.0
        return np.zeros(shape, dtype=np.bool_)

    def told(step: str, before: float, mask: NDArray[np.bool_]) -> float:
        """Keep what a step did to the mask; gives the part of the slide that is left."""
        left = np.count_nonzero(mask) / mask.size
        steps[step] = round(left - before, 6)
        return left

    look = _look(rgb, glass, mpp)
    # Fat: thin pale walls stand out of what lies around them; smears of mounting medium do not.
    weak, textured = look.pale, look.textured
    for rows, opened in _opened(look.pink, 64.0 / mpp):
        wall = np.subtract(look.pink[rows], opened, out=opened)
        weak[rows] &= wall > 0.003
        np.greater(wall, 0.0015, out=textured[rows])
    weak &= _dense(weak, 150.0 / mpp, 0.15)
    mask = np.logical_or(look.strong, weak, out=weak)
    left = told("colours of tissue", 0.0, mask)
    inks = _inks(look, mpp)
    for ink in inks.values():
        mask &= ~ink
    left = told("ink", left, mask)
    mask &= look.own
    left = told("too pale", left, mask)
    pieces = _Pieces(mask)
    mask = pieces.where(pieces.pixels >= 1500.0 / mpp**2)
    left = told("specks", left, mask)
    mask = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_CLOSE, _disc(40.0 / mpp)).view(np.bool_)
    mask = _fill_holes(mask, textured, mpp)
    for ink in inks.values():
        mask &= ~ink
    left = told("holes filled", left, mask)
    # A pixel half on glass is no tissue: at 16 um/px it would add 4 % of an empty 200-um tile on each side.
    square = np.ones((3, 3), dtype=np.uint8)
    edge = mask & ~cv2.erode(mask.view(np.uint8), square).view(np.bool_)
    for rows in _bands(shape):
        if edge[rows].any():
            around, own = _with_halo(rows, 1, shape[0])
            mask[rows] &= ~(edge[rows] & (look.sharp(rows, 1) < 0.5 * cv2.dilate(look.g[around], square)[own]))
    left = told("half on glass", left, mask)
    mask = _remove_doubtful(mask, look, mpp, red_pen="red" in inks)
    told("small, grey or hardly stained pieces", left, mask)
    return mask


def _bands(shape: tuple[int, ...], least: int = 16) -> Iterator[slice]:
    """Rows of a picture, so many at a time that what is computed of them stays in a core's cache, but no fewer."""
    rows = max(least, _BAND // shape[1])
    return (slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows))


def _with_halo(rows: slice, halo: int, height: int) -> tuple[slice, slice]:
    """The rows with so many more on each side, as far as the picture has them; and where they lie in these."""
    around = slice(max(0, rows.start - halo), min(height, rows.stop + halo))
    return around, slice(rows.start - around.start, rows.stop - around.start)


@dataclass(frozen=True)
class _Look:
    """What is known of each pixel by its colour alone.

    Attributes:
        rgb: uint8 (h, w, 3): the colour.
        tables: float32 (3, 256): the optical density of each value of a channel.
        sigma: by which densities are blurred, in pixels.
        g: float32 (h, w): the optical density of green, blurred as all that follows.
        stain: float32 (h, w): by how much green is absorbed more than red or blue.
        pink: float32 (h, w): by how much green and blue are absorbed more than red.
        strong: bool (h, w): stained beyond doubt.
        pale: bool (h, w): the colours of walls of fat.
        own: bool (h, w): dark by itself, not by what blurring spread there.
        red_pen, sure_red, other_pen: bool (h, w): colours of a red pen, of one beyond doubt, and of other pens.
        textured: bool (h, w), to be filled in: brighter than what lies around.
    """

    rgb: NDArray[np.uint8]
    tables: NDArray[np.float32]
    sigma: float
    g: NDArray[np.float32]
    stain: NDArray[np.float32]
    pink: NDArray[np.float32]
    strong: NDArray[np.bool_]
    pale: NDArray[np.bool_]
    own: NDArray[np.bool_]
    red_pen: NDArray[np.bool_]
    sure_red: NDArray[np.bool_]
    other_pen: NDArray[np.bool_]
    textured: NDArray[np.bool_]

    def sharp(self, rows: slice, channel: int) -> NDArray[np.float32]:
        """Optical density of a channel in some rows, not blurred: float32 (rows, w)."""
        return _densities(self.rgb[rows][..., channel], self.tables[channel])

    def blurred(self, channel: int) -> NDArray[np.float32]:
        """Optical density of a channel, blurred: float32 (h, w)."""
        return _blurred(_densities(self.rgb[..., channel], self.tables[channel]), self.sigma)


def _densities(values: NDArray[np.uint8], table: NDArray[np.float32]) -> NDArray[np.float32]:
    import cv2

    return np.asarray(cv2.LUT(values, table), dtype=np.float32)


def _blurred(densities: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    import cv2

    return np.asarray(cv2.GaussianBlur(densities, (0, 0), sigma), dtype=np.float32)


def _look(rgb: NDArray[np.uint8], glass: NDArray[np.float64], mpp: float) -> _Look:
    import cv2

    shape = rgb.shape[:2]
    tables = _density_tables(glass)
    sigma = max(0.7, 6.0 / mpp)
    halo = math.ceil(4 * sigma)
    # In one piece each: the system gives large pieces faster, and what is never written costs nothing.
    green, stain, pink = np.empty((3, *shape), dtype=np.float32)
    strong, pale, own, brown, red, sure_red, other, textured = np.zeros((8, *shape), dtype=np.bool_)
    eosin = 0
    for rows in _bands(shape, least=12 * halo):
        around, inner = _with_halo(rows, halo, shape[0])
        sharp = [_densities(values, table) for values, table in zip(cv2.split(rgb[around]), tables, strict=True)]
        r, g, b = (_blurred(density, sigma)[inner] for density in sharp)
        green[rows] = g
        stained = np.subtract(g, np.minimum(r, b), out=stain[rows])
        pinkish = np.subtract((g + np.minimum(b, g)) * 0.5, r, out=pink[rows])
        no_more_blue = 1.1 * g
        sure = strong[rows] = (stained > 0.02) & (stained > 0.15 * g) & (b < no_more_blue)
        eosin += int(np.count_nonzero(sure & (g - r > 0.05)))
        pale[rows] = (pinkish > 0.002) & (pinkish > 0.2 * g) & (b < no_more_blue + 0.002)
        own[rows] = sharp[1][inner] > np.maximum(0.004, 0.5 * g)  # blurring must not spread tissue onto glass
        if (browner := b - r > 0.08).any():
            brown[rows] = browner & (b > no_more_blue)
        reds, others = _pen(r, g, b)
        if reds.any():
            red[rows] = reds
            sure_red[rows] = reds & (g > 0.4) & (r < 0.13 * g) & (b > 0.68 * g)
        if others.any():
            other[rows] = others
    browns = np.count_nonzero(brown)
    if browns > 0.5 * eosin and np.count_nonzero(strong) > 0.5 * browns:
        strong |= brown  # immunostained: brown is DAB; on an H&E slide it is the ink of a margin
    return _Look(rgb, tables, sigma, green, stain, pink, strong, pale, own, red, sure_red, other, textured)


class _Pieces:
    """The connected pieces of a mask, by number from 1; 0 is what lies outside it.

    They are known by their runs along the rows, which are few: sums over pieces, and masks of some of them, do not look
    up a number for every pixel.

    Attributes:
        labels: int32 (h, w): the number of each pixel's piece.
        pixels: float64 (n,): how many each has.
    """

    def __init__(self, mask: NDArray[np.bool_], connectivity: Literal[4, 8] = 8) -> None:
        import cv2

        self.labels: NDArray[np.int32] = np.empty(mask.shape, dtype=np.int32)
        self._count, _ = cv2.connectedComponents(mask.view(np.uint8), self.labels, connectivity)
        first = np.ones(mask.shape, dtype=np.bool_)
        np.not_equal(mask[:, 1:], mask[:, :-1], out=first[:, 1:])
        self._starts = np.flatnonzero(first)
        self._lengths = np.diff(self._starts, append=mask.size)
        self._numbers = self.labels.ravel()[self._starts]
        self.pixels = np.bincount(self._numbers, weights=self._lengths, minlength=self._count)

    def total(self, values: NDArray[np.float32] | NDArray[np.bool_]) -> NDArray[np.float64]:
        """The sum of the values (h, w) over each piece: float64 (n,)."""
        flat = values.ravel()
        if flat.dtype == np.bool_:
            runs = np.add.reduceat(flat.view(np.uint8), self._starts, dtype=np.int32)
        else:
            runs = np.add.reduceat(flat, self._starts)  # pairwise, and a run is no longer than a row
        return np.asarray(np.bincount(self._numbers, weights=runs, minlength=self._count), dtype=np.float64)

    def box(self, number: int, margin: int) -> tuple[slice, slice]:
        """The rows and columns of a piece, and so many pixels around it."""
        runs = np.flatnonzero(self._numbers == number)
        width = self.labels.shape[1]
        y, x = self._starts[runs] // width, self._starts[runs] % width
        right = (x + self._lengths[runs]).max()
        return slice(max(0, y[0] - margin), y[-1] + 1 + margin), slice(max(0, x.min() - margin), right + margin)

    def where(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool (h, w): the pieces that are chosen, bool (n,); never what lies outside the mask."""
        chosen[0] = False
        return np.repeat(chosen[self._numbers], self._lengths).reshape(self.labels.shape)


def _fill_holes(mask: NDArray[np.bool_], textured: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """The mask with its small holes filled, and larger ones where walls of fat cross them."""
    import cv2

    outside = ~mask
    holes = _Pieces(outside, connectivity=4)
    area = holes.pixels * mpp**2
    fill = area < 30_000.0
    if (~fill & (area < 500_000.0)).any():
        # The rim belongs to the mask beside it.
        inner = cv2.erode(outside.view(np.uint8), _disc(32.0 / mpp)).view(np.bool_)
        inner &= textured
        fill |= (holes.total(inner) * mpp**2 > 0.05 * area) & (area < 500_000.0)
    mask |= holes.where(fill)
    return mask


def _inks(look: _Look, mpp: float) -> dict[str, NDArray[np.bool_]]:
    """Strokes of a red pen, "red", and of others, "other", with the blur around them: bool (h, w), where there are any.

    A stroke is a dense area of an ink's colour that has a core of undoubted ink.
    """
    import cv2

    # Muscle and blood can have the colour of a red pen, in small areas: only beside a long stroke are small ones ink.
    least_red = 1_500.0 if np.count_nonzero(look.sure_red) * mpp**2 > 400_000.0 else 100_000.0
    found = {}
    for name, pen, sure, least in (
        ("red", look.red_pen, look.sure_red, least_red),
        ("other", look.other_pen, look.other_pen, 5_000.0),
    ):
        if np.count_nonzero(sure) * mpp**2 < least:  # all of it together: no stroke can have enough
            continue
        dense = _dense(pen, 150.0 / mpp, 0.2)
        dense &= pen
        near = cv2.dilate(dense.view(np.uint8), _disc(64.0 / mpp))  # joins the streaks of a dry pen
        dense &= sure
        if np.count_nonzero(dense) * mpp**2 < least:
            continue
        areas = _Pieces(near.view(np.bool_))
        ink = areas.total(dense) * mpp**2 >= least
        if ink[1:].any():
            found[name] = areas.where(ink)
    return found


def _remove_doubtful(mask: NDArray[np.bool_], look: _Look, mpp: float, *, red_pen: bool) -> NDArray[np.bool_]:
    """The mask without pieces that are too small, hardly stained, mostly grey, in grey surroundings, or a pen's."""
    import cv2

    pieces = _Pieces(mask)
    area = pieces.pixels * mpp**2
    g = pieces.total(look.g)
    keep = (
        (area >= 8_000.0) & (pieces.total(look.strong) >= 0.02 * pieces.pixels) & (pieces.total(look.stain) > 0.2 * g)
    )
    keep[0] = False
    # The coloured fringes of a coverslip's edge or a smear are hardly darker than the grey around them.
    for number in np.flatnonzero(keep & (area <= 300_000.0)).tolist():
        box = pieces.box(number, margin=4)
        grown = cv2.dilate(pieces.labels[box].astype(np.float32), np.ones((5, 5), dtype=np.uint8))
        around = look.g[box][(grown == number) & ~mask[box]]
        keep[number] = g[number] > 1.4 * around.mean(dtype=np.float64) * pieces.pixels[number] if around.size else True
    if red_pen:  # the pale ends of its strokes
        keep &= (
            (area > 300_000.0) | (pieces.total(look.blurred(2)) < 0.61 * g) | (pieces.total(look.blurred(0)) > 0.32 * g)
        )
    return pieces.where(keep)


def _disc(radius: float) -> NDArray[np.uint8]:
    import cv2

    side = 2 * max(1, round(radius)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), dtype=np.uint8)


def _opened(plane: NDArray[np.float32], radius: float) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Some rows at a time, the plane's grey opening by a disc: what is bright, and narrower than the disc, is gone."""
    import cv2

    reach = len(_disc(radius)) // 2
    for rows in _bands(plane.shape, least=16 * reach):
        around, own = _with_halo(rows, 2 * reach, plane.shape[0])
        eroded = _over_disc(plane[around], radius, cv2.erode, cv2.min, math.inf)
        yield rows, _over_disc(eroded, radius, cv2.dilate, cv2.max, -math.inf)[own]


def _over_disc(
    plane: NDArray[np.float32], radius: float, extreme: Callable[..., Any], pick: Callable[..., Any], beyond: float
) -> NDArray[np.float32]:
    """The least (or greatest) value within a disc around each pixel: the very pixels of `cv2.erode` (`cv2.dilate`).

    These compare a pixel with every other of the disc, 213 at 8 um/px; here it is compared with those of a square, and
    the squares' extremes with each other.

    Args:
        plane: float32 (h, w).
        radius: of the disc, in pixels.
        extreme: `cv2.erode` or `cv2.dilate`.
        pick: `cv2.min` or `cv2.max`.
        beyond: what lies outside the plane.
    """
    import cv2

    disc = _disc(radius)
    squares, rest = _squares_of(len(disc))
    reach = len(disc) // 2
    # Squares that only partly lie in the picture count with what is in it.
    padded = cv2.copyMakeBorder(plane, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=beyond)
    found = extreme(padded, rest)
    if squares.any():
        found = pick(found, extreme(extreme(padded, np.ones((_SQUARE, _SQUARE), dtype=np.uint8)), squares))
    return np.asarray(found[reach:-reach, reach:-reach], dtype=np.float32)


@lru_cache
def _squares_of(side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Squares that make up most of a disc, by their middles, and the pixels that they leave: uint8 (side, side) each.

    Chosen greedily, each to cover as many new pixels as it can.
    """
    disc = _disc(side // 2)
    left, half = disc.copy(), _SQUARE // 2
    squares = np.zeros_like(disc)
    inside = [
        (slice(y - half, y + half + 1), slice(x - half, x + half + 1))
        for y in range(half, side - half)
        for x in range(half, side - half)
        if disc[y - half : y + half + 1, x - half : x + half + 1].all()
    ]
    while inside:
        best = max(inside, key=lambda square: int(left[square].sum()))
        if left[best].sum() < 2:
            break
        left[best] = 0
        squares[best[0].start + half, best[1].start + half] = 1
    return squares, left


def _dense(mask: NDArray[np.bool_], side: float, part: float) -> NDArray[np.bool_]:
    """Where more than that part of the square of that side (pixels) around a pixel is in the mask."""
    import cv2

    length = max(3, round(side))
    counts = np.empty(mask.shape, dtype=np.uint16)
    cv2.boxFilter(mask.view(np.uint8), cv2.CV_16U, (length, length), counts, normalize=False)
    return np.asarray(counts > part * length**2, dtype=np.bool_)


def _glass(rgb: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Colour of the empty glass, float64 (3,), or None where the picture has a dark background.

    Glass is the brightest of the picture's common smooth colours. A picture without smooth bright pixels is all
    tissue: its glass is taken to be white.
    """
    import cv2

    square = np.ones((3, 3), dtype=np.uint8)
    smooth = np.empty(rgb.shape[:2], dtype=np.uint8)  # how bright, where it is smooth and bright; else 0
    for rows in _bands(smooth.shape):
        around, own = _with_halo(rows, 1, len(smooth))
        grey = cv2.cvtColor(rgb[around], cv2.COLOR_RGB2GRAY)
        flat = cv2.dilate(grey, square)[own] - cv2.erode(grey, square)[own] <= 6
        np.multiply(grey[own], flat & (grey[own] > 150), out=smooth[rows])
    counts = _histogram(smooth, 0, None)
    counts[0] = 0.0
    part = counts.sum() / smooth.size
    if part < 0.005:
        dark = np.median(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)) < _DARK
        return None if dark else np.full(3, _GLASS_WHITE)
    counts = np.convolve(counts, np.ones(3), mode="same")
    peak = int(np.flatnonzero(counts >= 0.5 * counts.max())[-1])
    common = cv2.inRange(smooth, peak - 2, peak + 2, smooth)
    glass = np.array([_middle(_histogram(rgb, channel, common)).mean() for channel in range(3)])
    pale_tissue = glass[1] < min(glass[0], glass[2]) - 6 and part < 0.5
    return np.full(3, _GLASS_WHITE) if pale_tissue else glass


def _histogram(picture: NDArray[np.uint8], channel: int, where: NDArray[np.uint8] | None) -> NDArray[np.float64]:
    """How often each value of a channel is there, where that is not 0: float64 (256,)."""
    import cv2

    counts = cv2.calcHist([picture], [channel], where, [256], [0, 256])
    return np.asarray(counts, dtype=np.float64).ravel()


def _middle(counts: NDArray[np.float64] | NDArray[np.intp]) -> NDArray[np.intp]:
    """The two in the middle, (2,), the mean of which is the median: of whole numbers from 0 on, each so often there."""
    before = np.cumsum(counts)
    return np.searchsorted(before, [(before[-1] - 1) // 2, before[-1] // 2], side="right")


def _density_tables(glass: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32 (channel, 256): log10 of (glass + 1) / (value + 1), the optical density of each value of a channel."""
    return np.log10((glass[:, None] + 1.0) / (np.arange(256.0) + 1.0)).astype(np.float32)


def _pen(
    r: NDArray[np.float32], g: NDArray[np.float32], b: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which have the colour of a red pen, and of a black, blue or green one, by optical density: bool, of r's shape."""
    mean = r + g
    mean += b
    mean /= 3
    other = mean > _BLACK
    if other.any():
        other &= g - np.minimum(r, b) < 0.25 * mean
    other |= _cold(r, g)
    red = _reddish(r, g)
    if red.any():
        red &= (b > 0.66 * g) & (b < 1.1 * g)  # eosin lets more blue through
    return red, other


def _cold(r: NDArray[np.float32], g: NDArray[np.float32]) -> NDArray[np.bool_]:
    return 0.85 * r - g > 0.03  # haematoxylin absorbs green as much as red


def _reddish(r: NDArray[np.float32], g: NDArray[np.float32]) -> NDArray[np.bool_]:
    return (g > 0.06) & (r < 0.18 * g)


def read_mask(path: Path, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A tissue mask from a picture of the whole slide: see `mask_picture` for what is tissue in it.

    Args:
        path: the picture.
        shape: (h, w) of the mask that is wanted; the picture is resized to it by nearest neighbour.

    Returns:
        bool (h, w).

    Raises:
        AnnotationError: as `mask_picture`.
    """
    h, w = shape
    pixels = mask_picture(path, (w, h))
    mask_h, mask_w = pixels.shape
    rows = ((np.arange(h) + 0.5) * mask_h / h).astype(np.intp)
    columns = ((np.arange(w) + 0.5) * mask_w / w).astype(np.intp)
    return pixels[np.ix_(rows, columns)]


def mask_picture(path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask, of tissue or of an annotation, from a picture of the whole slide at any resolution.

    What is on is every colour but black: of a palette the colours count, not their indices; of grey pictures any value
    but 0, whether they have 1, 8, 16 or 32 bits. What is wholly transparent is off, whatever its colour. JPEG has no
    exact black: there, what is brighter than half of the brightest pixel is on.

    Args:
        path: PNG, TIFF, BMP or JPEG of at most `MAX_MASK_PIXELS`; of more pages the first.
        size: (width, height) of the slide, in any unit: the picture must have its aspect ratio within 2 %.

    Returns:
        bool (h, w), of the picture's size.

    Raises:
        AnnotationError: it cannot be read, is larger, or of another aspect ratio.
    """
    from wsi_idc.slides.pictures import PictureSizeError, opened_picture

    try:
        with opened_picture(path, MAX_MASK_PIXELS) as picture:
            _check_aspect(path, picture.size, size)
            jpeg = picture.format == "JPEG"
            if picture.mode not in _GREY_MODES or (picture.mode in "1L" and picture.has_transparency_data):
                pixels: NDArray[Any] = np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
            else:
                pixels = np.asarray(picture)
    except PictureSizeError as error:
        advice = "save it smaller: it may have any size, and 4 um/px is plenty"
        raise AnnotationError(path, f"mask has {error}", advice) from error
    except OSError as error:
        if error.errno:
            raise AnnotationError(path, f"mask cannot be read ({error.strerror})", system_advice(error)) from error
        raise AnnotationError(path, f"mask cannot be read ({error})", "give a PNG or TIFF picture") from error
    except (ValueError, SyntaxError) as error:
        raise AnnotationError(path, f"mask cannot be read ({error})", "give a PNG or TIFF picture") from error
    if pixels.ndim == 3:
        opaque = pixels[..., 3] > 0 if pixels.shape[2] == 4 else np.True_
        pixels = pixels[..., :3].max(axis=2) * opaque
    elif pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels)
    return np.asarray(pixels > pixels.max() / 2 if jpeg else pixels != 0, dtype=np.bool_)


def _check_aspect(path: Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    (width, height), (w, h) = found, size
    # Both are rounded to whole pixels: half a pixel a side is no fault of the picture's.
    slack = 0.02 + 0.5 / h + 0.5 / w + 0.5 / height + 0.5 / width
    if abs(width * h / (height * w) - 1.0) > slack:
        raise AnnotationError(
            path,
            f"mask of {width} x {height} px has another aspect ratio than the slide ({w} x {h})",
            "give a mask of the whole slide",
        )


def tile_fraction(mask: NDArray[np.bool_], grid: Grid, cells: NDArray[np.integer]) -> NDArray[np.float32]:
    """Part of each tile's area that is tissue; what lies beyond the slide is not.

    Exact for any mask resolution: the integral image of a mask is bilinear inside each mask pixel.

    Args:
        mask: bool (h, w) over the whole slide.
        grid: the slide's grid.
        cells: int (n, 2) of row, column.

    Returns:
        float32 (n,), 0 to 1.
    """
    import cv2

    height, width = mask.shape
    integral = cv2.integral(
        np.ascontiguousarray(mask).view(np.uint8)
    )  # int32: of masks this module refuses larger ones

    def area(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tissue above and left of a point, in mask pixels."""
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        i, j = np.minimum(y.astype(np.intp), height - 1), np.minimum(x.astype(np.intp), width - 1)
        u, v = y - i, x - j
        top = integral[i, j] * (1 - v) + integral[i, j + 1] * v
        bottom = integral[i + 1, j] * (1 - v) + integral[i + 1, j + 1] * v
        return np.asarray(top * (1 - u) + bottom * u, dtype=np.float64)

    scale = np.array([width / grid.size[0], height / grid.size[1]])
    start = grid.position(cells) * scale
    extent = np.asarray(grid.extent) * scale
    (x0, y0), (x1, y1) = start.T, (start + extent).T
    covered = area(x1, y1) - area(x0, y1) - area(x1, y0) + area(x0, y0)
    return np.asarray(np.clip(covered / extent.prod(), 0.0, 1.0), dtype=np.float32)


def tile_quality(tiles: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Focus and pen figures of each tile.

    Args:
        tiles: uint8 (n, s, s, 3) RGB.

    Returns:
        blur: float32 (n,), the variance of the Laplacian of the luminance (Pech-Pacheco 2000,
            doi:10.1109/ICPR.2000.903548) in squared grey levels; larger is sharper. Its scale depends on the um/px.
        pen: float32 (n,), part of the tile's pixels that look like pen ink, 0 to 1.
    """
    import cv2

    count, side = tiles.shape[:2]
    blur, pen = np.zeros(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
    block = max(1, 200_000 // max(1, side * side))  # what a core's cache holds
    for first in range(0, count, block):
        part = np.ascontiguousarray(tiles[first : first + block])
        rows = part.reshape(len(part), -1, 3)  # a tile a row
        grey = cv2.cvtColor(rows, cv2.COLOR_RGB2GRAY)
        # One tall picture: one call instead of one a tile.
        laplacian = cv2.Laplacian(grey.reshape(-1, side), cv2.CV_16S).reshape(part.shape[:3])
        # The outermost ring would mix neighbouring tiles of the stack.
        blur[first : first + block] = laplacian[:, 1:-1, 1:-1].astype(np.float32).var(axis=(1, 2))
        ink = _ink_pixels(rows)
        pen[first : first + block] = np.bincount(ink // side**2, minlength=len(part)) / side**2
    return blur, pen


def _ink_pixels(rgb: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Which pixels have the colour of ink on white glass: their places in the picture, (n,), in order.

    Each colour of ink needs a relation of two channels, or one that is dark: that a pixel has none of these is quickly
    said of whole bytes, and is true of nearly all.
    """
    import cv2

    table, coldest, reddest, darkest = _white_limits()
    channels = cv2.split(rgb)
    r, g, b = channels
    maybe = cv2.compare(g, cv2.LUT(r, coldest), cv2.CMP_GT)
    cv2.bitwise_or(maybe, cv2.compare(r, cv2.LUT(g, reddest), cv2.CMP_GT), maybe)
    cv2.bitwise_or(maybe, cv2.compare(cv2.min(cv2.min(r, g), b), darkest, cv2.CMP_LT), maybe)
    places = np.flatnonzero(maybe > 0)
    red, other = _pen(*(table[channel.ravel()[places]] for channel in channels))
    return places[red | other]


@lru_cache
def _white_limits() -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8], float]:
    """What a pixel on white glass must be to have the colour of ink.

    Returns:
        float32 (256,): the optical density of each value.
        uint8 (256,): green must be above this, for each value of red, to be a cold pen's.
        uint8 (256,): red must be above this, for each value of green, to be a red pen's.
        a channel must be below this to be a black pen's.
    """
    table = _density_tables(np.full(1, _GLASS_WHITE))[0]
    first, second = table[:, None], table[None]
    # Density falls as the value grows, so that all above a limit are as well.
    cold = 255 - _cold(first, second).sum(axis=1)
    red = 255 - _reddish(second, first).sum(axis=1)
    return table, cold.astype(np.uint8), red.astype(np.uint8), float((table > _BLACK).sum())


def measured(
    batches: Iterable[NDArray[np.uint8]], blur: list[NDArray[np.float32]], pen: list[NDArray[np.float32]]
) -> Iterator[NDArray[np.uint8]]:
    """The same batches of tiles, uint8 (n, s, s, 3); what `tile_quality` says of each is added to the lists."""
    for tiles in batches:
        sharpness, ink = tile_quality(tiles)
        blur.append(sharpness)
        pen.append(ink)
        yield tiles


def stain(thumbnail: NDArray[np.uint8], mask: NDArray[np.bool_]) -> list[float] | None:
    """The slide's stain in three figures: the median optical density of red, green and blue over what is stained.

    Against white (255), not the slide's own glass: a model sees the pixels as they are.

    Args:
        thumbnail: uint8 (h, w, 3) RGB of the whole slide.
        mask: bool (h, w): its tissue.

    Returns:
        three optical densities, to four digits; None where there are fewer than `STAIN_PIXELS` stained pixels.
    """
    places = np.flatnonzero(mask)
    if len(places) < STAIN_PIXELS:
        return None
    pixels = thumbnail.reshape(-1, 3)[places[:: max(1, len(places) // _STAIN_SAMPLE)]].T
    table = _density_tables(np.full(1, 255.0))[0]
    r, g, b = table[pixels]
    pixels = pixels[:, (r + g + b) / 3 > _STAINED]
    if pixels.shape[1] < STAIN_PIXELS:
        return None
    return [round(float(table[_middle(np.bincount(values))].mean()), 4) for values in pixels]
