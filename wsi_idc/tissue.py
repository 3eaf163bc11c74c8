"""Where a slide holds tissue, and how good each tile is.

The default method knows colour by optical density relative to the slide's own glass, od = log10(glass / pixel)
(Beer-Lambert; Ruifrok and Johnston 2001, Anal Quant Cytol Histol 23:291). Grey things (dust, a coverslip's edge, black
ink, out-of-focus glass) absorb red, green and blue alike; haematoxylin and eosin absorb green more than blue or red;
each pen colour breaks that order in its own way. No weights are learned.
"""

from pathlib import Path
from typing import Any, TypeAlias

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

_GLASS_WHITE = 240.0
_DARK = 90.0


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
        return np.asarray(
            cv2.resize(small.astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST), dtype=np.bool_
        )
    glass = _glass(rgb)
    if glass is None:
        steps[DARK] = 0.0
        return np.zeros(shape, dtype=np.bool_)

    def told(step: str, before: float, mask: NDArray[np.bool_]) -> float:
        """Keep what a step did to the mask; gives the part of the slide that is left."""
        left = np.count_nonzero(mask) / mask.size
        steps[step] = round(left - before, 6)
        return left

    sharp = _optical_density(rgb, glass)
    od = cv2.GaussianBlur(sharp, (0, 0), max(0.7, 6.0 / mpp))
    r, g, b = od[..., 0], od[..., 1], od[..., 2]
    stain = g - np.minimum(r, b)
    brown = (b > 1.1 * g) & (b - r > 0.08)
    strong = (stain > 0.02) & (stain > 0.15 * g) & (b < 1.1 * g)
    eosin = strong & (g - r > 0.05)
    if brown.sum() > 0.5 * eosin.sum() and strong.sum() > 0.5 * brown.sum():
        strong |= brown  # immunostained: brown is DAB; on an H&E slide it is the ink of a margin
    # Fat: thin pale walls stand out of what lies around them; smears of mounting medium do not.
    pink = (g + np.minimum(b, g)) / 2 - r
    wall = pink - cv2.morphologyEx(pink, cv2.MORPH_OPEN, _disc(64.0 / mpp))
    weak = (wall > 0.003) & (pink > 0.002) & (pink > 0.2 * g) & (b < 1.1 * g + 0.002)
    weak &= _density(weak, 150.0 / mpp) > 0.15
    red_ink, other_ink = _ink(od, mpp)
    ink = red_ink | other_ink
    mask = strong | weak
    left = told("colours of tissue", 0.0, mask)
    mask &= ~ink
    left = told("ink", left, mask)
    # Blurring must not spread tissue onto glass.
    mask &= sharp[..., 1] > np.maximum(0.004, 0.5 * g)
    left = told("too pale", left, mask)
    mask = _remove_small(mask, 1500.0 / mpp**2)
    left = told("specks", left, mask)
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(40.0 / mpp)) > 0
    mask = _fill_holes(mask, wall > 0.0015, mpp) & ~ink
    left = told("holes filled", left, mask)
    # A pixel half on glass is no tissue: at 16 um/px it would add 4 % of an empty 200-um tile on each side.
    edge = mask & (cv2.erode(mask.astype(np.uint8), np.ones((3, 3), dtype=np.uint8)) == 0)
    mask &= ~(edge & (sharp[..., 1] < 0.5 * cv2.dilate(g, np.ones((3, 3), dtype=np.uint8))))
    left = told("half on glass", left, mask)
    mask = _remove_doubtful(mask, strong, red_ink, od, mpp)
    told("small, grey or hardly stained pieces", left, mask)
    return mask


def _fill_holes(mask: NDArray[np.bool_], textured: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """The mask with its small holes filled, and larger ones where walls of fat cross them."""
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    area = stats[:, cv2.CC_STAT_AREA] * mpp**2
    inner = cv2.erode((~mask).astype(np.uint8), _disc(32.0 / mpp)) > 0  # the rim belongs to the mask beside it
    crossed = np.bincount(labels[textured & inner], minlength=count) * mpp**2 > 0.05 * area
    fill = (area < 30_000.0) | (crossed & (area < 500_000.0))
    return np.asarray(mask | fill[labels], dtype=np.bool_)


def _ink(od: NDArray[np.float32], mpp: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Strokes of a red pen, and of others, with the blur around them: bool (h, w) each.

    A stroke is a dense area of an ink's colour that has a core of undoubted ink.
    """
    import cv2

    r, g, b = od[..., 0], od[..., 1], od[..., 2]
    red, other = _pen(od)
    sure_red = red & (g > 0.4) & (r < 0.13 * g) & (b > 0.68 * g)

    def strokes(pen: NDArray[np.bool_], sure: NDArray[np.bool_], least: float) -> NDArray[np.bool_]:
        dense = pen & (_density(pen, 150.0 / mpp) > 0.2)
        near = cv2.dilate(dense.astype(np.uint8), _disc(64.0 / mpp))  # joins the streaks of a dry pen
        count, labels = cv2.connectedComponents(near, connectivity=8)
        core = np.bincount(labels[dense & sure], minlength=count) * mpp**2
        keep = core >= least
        keep[0] = False
        return np.asarray(keep[labels], dtype=np.bool_)

    # Muscle and blood can have the colour of a red pen, in small areas: only beside a long stroke are small ones ink.
    least_red = 1_500.0 if sure_red.sum() * mpp**2 > 400_000.0 else 100_000.0
    return strokes(red, sure_red, least_red), strokes(other, other, 5_000.0)


def _remove_doubtful(
    mask: NDArray[np.bool_], strong: NDArray[np.bool_], red_ink: NDArray[np.bool_], od: NDArray[np.float32], mpp: float
) -> NDArray[np.bool_]:
    """The mask without pieces that are too small, hardly stained, mostly grey, in grey surroundings, or a pen's."""
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)

    def total(values: NDArray[Any], where: NDArray[np.int32] = labels) -> NDArray[np.float64]:
        sums = np.bincount(where.ravel(), weights=values.ravel(), minlength=count)
        return np.asarray(sums, dtype=np.float64)

    pixels = stats[:, cv2.CC_STAT_AREA]
    area = pixels * mpp**2
    r, g, b = (total(od[..., channel]) for channel in range(3))
    stain = total(od[..., 1] - np.minimum(od[..., 0], od[..., 2]))
    keep = (area >= 8_000.0) & (total(strong) >= 0.02 * pixels) & (stain > 0.2 * g)

    # The coloured fringes of a coverslip's edge or a smear are hardly darker than the grey around them.
    grown = cv2.dilate(labels.astype(np.float32), np.ones((5, 5), dtype=np.uint8)).astype(np.int32)
    ring = np.where(mask, 0, grown)
    around = total(od[..., 1], ring) / np.maximum(np.bincount(ring.ravel(), minlength=count), 1)
    keep &= (area > 300_000.0) | (g > 1.4 * around * pixels)
    if red_ink.any():  # the pale ends of its strokes
        keep &= (area > 300_000.0) | (b < 0.61 * g) | (r > 0.32 * g)
    keep[0] = False
    return np.asarray(keep[labels], dtype=np.bool_)


def _disc(radius: float) -> NDArray[np.uint8]:
    import cv2

    side = 2 * max(1, round(radius)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), dtype=np.uint8)


def _density(mask: NDArray[np.bool_], side: float) -> NDArray[np.float32]:
    """Part of the square of that side (pixels) around each pixel that is in the mask."""
    import cv2

    length = max(3, round(side))
    return np.asarray(cv2.blur(mask.astype(np.float32), (length, length)), dtype=np.float32)


def _remove_small(mask: NDArray[np.bool_], pixels: float) -> NDArray[np.bool_]:
    """The mask without its 8-connected pieces of fewer pixels."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= pixels
    keep[0] = False
    return np.asarray(keep[labels], dtype=np.bool_)


def _glass(rgb: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Colour of the empty glass, float64 (3,), or None where the picture has a dark background.

    Glass is the brightest of the picture's common smooth colours. A picture without smooth bright pixels is all
    tissue: its glass is taken to be white.
    """
    import cv2

    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    kernel = np.ones((3, 3), dtype=np.uint8)
    smooth = (cv2.dilate(grey, kernel) - cv2.erode(grey, kernel) <= 6) & (grey > 150)
    if smooth.mean() < 0.005:
        return None if np.median(grey) < _DARK else np.full(3, _GLASS_WHITE)
    counts = np.convolve(np.bincount(grey[smooth], minlength=256), np.ones(3), mode="same")
    peak = np.flatnonzero(counts >= 0.5 * counts.max())[-1]
    glass = np.median(rgb[smooth & (np.abs(grey.astype(np.int16) - peak) <= 2)], axis=0)
    pale_tissue = glass[1] < min(glass[0], glass[2]) - 6 and smooth.mean() < 0.5
    return np.full(3, _GLASS_WHITE) if pale_tissue else np.asarray(glass, dtype=np.float64)


def _optical_density(rgb: NDArray[np.uint8], glass: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32, the shape of rgb: log10 of (glass + 1) / (pixel + 1)."""
    import cv2

    table = np.log10((glass + 1.0) / (np.arange(256.0)[:, None] + 1.0)).astype(np.float32)
    return np.asarray(cv2.LUT(rgb, table[None]), dtype=np.float32)


def _pen(od: NDArray[np.float32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pixels have the colour of a red pen, and of a black, blue or green one: bool (h, w), from od (h, w, 3)."""
    import cv2

    r, g, b = cv2.split(od)
    mean = (r + g + b) / 3
    black = (mean > 0.7) & (g - np.minimum(r, b) < 0.25 * mean)
    cold = 0.85 * r - g > 0.03  # haematoxylin absorbs green as much as red
    red = (g > 0.06) & (b > 0.66 * g) & (b < 1.1 * g) & (r < 0.18 * g)  # eosin lets more blue through
    return np.asarray(red, dtype=np.bool_), np.asarray(black | cold, dtype=np.bool_)


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
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1), dtype=np.int32 if mask.size < 2**31 else np.int64)
    np.cumsum(mask, axis=0, dtype=integral.dtype, out=integral[1:, 1:])
    np.cumsum(integral[1:, 1:], axis=1, out=integral[1:, 1:])

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
        stack = part.reshape(-1, side, 3)  # one tall picture: one call instead of one a tile
        laplacian = cv2.Laplacian(cv2.cvtColor(stack, cv2.COLOR_RGB2GRAY), cv2.CV_16S).reshape(part.shape[:3])
        # The outermost ring would mix neighbouring tiles of the stack.
        blur[first : first + block] = laplacian[:, 1:-1, 1:-1].astype(np.float32).var(axis=(1, 2))
        red, other = _pen(_optical_density(stack, np.full(3, _GLASS_WHITE)))
        ink = red | other
        pen[first : first + block] = ink.reshape(len(part), -1).mean(axis=1)
    return blur, pen


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
    pixels = thumbnail.reshape(-1, 3)[places[:: max(1, len(places) // _STAIN_SAMPLE)]]
    od = _optical_density(pixels[None], np.full(3, 255.0))[0]
    od = od[od.mean(axis=1) > _STAINED]
    return [round(float(value), 4) for value in np.median(od, axis=0)] if len(od) >= STAIN_PIXELS else None
