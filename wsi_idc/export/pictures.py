"""Pictures of slides: a map over its slide, and what of a slide is taken for tissue.

A picture is laid out in inches, top to bottom: what it shows in words, the panels side by side or one below the other,
whichever makes them larger, the scale bar, the colour bar, the legend, and what it may be used for. Panels have one
size whatever the slide's. Figures are matplotlib objects of their own; pyplot and its global state are not used.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE
from wsi_idc.colours import coloured, table
from wsi_idc.console import printable
from wsi_idc.grid import Grid
from wsi_idc.results import Result

OVER = 0.55
"""Opacity of a map over its slide: the tissue shows through."""
ANNOTATED = 0.5
"""Part of a tile that is annotated, from which its picture shows it so."""

_DPI = 150
_PANELS = (14.0, 9.0)
"""Inches (width, height) that all panels fill at most."""
_NARROWEST = 7.5
"""Inches of words beside each other, where panels are narrower."""
_SLOT = 0.75
"""Inches that a narrower panel takes nevertheless, for the word above it."""
_THINNEST = 0.02
_MARGIN = 0.3
_GAP = 0.25
_LINE = 0.2
_TITLE = 0.28
_FONT = "DejaVu Sans"
"""Comes with matplotlib, so that pictures are the same everywhere."""
_GREY = "0.35"


# --- the map as colours -------------------------------------------------------------------------------------------


def overlay(result: Result, alpha: float = 1.0, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """The map in colours, to be laid over a picture of the whole slide.

    Args:
        result: the map.
        alpha: opacity of a tile, 0 to 1; what is no tile is clear.
        size: (rows, columns) of the picture in pixels; None: one pixel a cell of the grid.

    Returns:
        uint8 (rows, columns, 4) RGBA.
    """
    image = result.image if size is None else _spread(result, size)
    colours = np.empty((*image.shape, 4), np.uint8)
    colours[..., :3] = coloured(image)
    colours[..., 3] = np.where(np.isnan(image), 0, round(255 * alpha))
    return colours


def _spread(result: Result, size: tuple[int, int]) -> NDArray[np.float32]:
    """float32 of `size`: the value of the cell in which each pixel's middle lies; NaN where there is none."""
    grid = result.slide.grid
    image = np.pad(result.image, ((0, 1), (0, 1)), constant_values=np.nan)
    places = []
    for axis, (length, count) in enumerate(zip(size, grid.shape, strict=True)):
        starts = grid.position(np.arange(count + 1)[:, None].repeat(2, axis=1))[:, 1 - axis]
        middles = (np.arange(length) + 0.5) * grid.size[1 - axis] / length
        places.append(np.searchsorted(starts, middles, side="right") - 1)
    return np.asarray(image[np.ix_(*places)], np.float32)


# --- pictures -----------------------------------------------------------------------------------------------------


def draw_result(result: Result, out: Path) -> None:
    """Write a slide with its map as a PNG: the slide, the map, and the map over the slide.

    Args:
        result: the map.
        out: the PNG.

    Raises:
        StoreDamageError: something that is drawn is not what was written.
        OSError: it cannot be written.
    """
    slide, measures, name = result.slide, result.measures, _shown(result.positive)
    annotated = np.flatnonzero(np.nan_to_num(slide.idc) >= ANNOTATED)
    reached = f"{measures.positive:,} of {_tiles(measures.tiles)} at or above the threshold"
    lines = [
        _Line("threshold", [result.outline(np.flatnonzero(result.called))], reached)
        if measures.positive
        else _Line("threshold", [], "no tile is at or above the threshold")
    ]
    if len(annotated):
        words = f"annotation, by tiles: {len(annotated):,} of which at least half is annotated"
        lines.append(_Line("annotation", [result.outline(annotated)], words))

    def over(alpha: float) -> Callable[[Any], None]:
        colours, step = overlay(result, alpha), slide.grid.step
        extent = (0, colours.shape[1] * step[0], colours.shape[0] * step[1], 0)
        return lambda axes: axes.imshow(colours, extent=extent, interpolation="nearest", aspect="auto")

    thumbnail = slide.thumbnail
    panels = [_Panel("slide" if measures.tiles else "", thumbnail, lines=lines[1:])]
    if measures.tiles:
        panels += [_Panel("map", None, over(1.0), lines), _Panel("overlay", thumbnail, over(OVER), lines)]
    made = str(result.map.attributes.get("committed") or "")
    told = [
        f"P({name}) by {_shown(result.model)}{_shown(f', made {made}') if made else ''}; current when drawn",
        f"{_tiles(measures.tiles)} of {slide.spec}; tissue {_area(measures.tissue_mm2)}"
        + (
            f", of it {name} {_area(measures.idc_mm2)} ({measures.idc_part:.0%})"
            if measures.idc_part is not None
            else ""
        ),
    ]
    if not measures.tiles:
        told = [f"No tissue was found: there is no tile, and {_shown(result.model)} has nothing to say."]
    bar = _Bar(f"P({name})", result.threshold) if measures.tiles else None
    _draw(slide.slide_id, told, panels, slide.grid, bar, out)


def draw_preview(
    name: str,
    words: Sequence[str],
    thumbnail: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    grid: Grid,
    cells: NDArray[np.integer],
    out: Path,
) -> None:
    """Write what of a slide is taken for tissue: the mask's outline and the kept tiles over the slide.

    Args:
        name: of the slide.
        words: lines about it.
        thumbnail: uint8 (h, w, 3) RGB of the whole slide.
        mask: bool, at any shape over the whole slide.
        grid: the slide's grid.
        cells: int (n, 2) of row, column: the kept tiles.
        out: the picture; its suffix says which format.

    Raises:
        OSError, ValueError: it cannot be written.
    """
    import shapely

    start = grid.position(cells).astype(np.float64)
    ends = np.minimum(start + grid.extent, grid.size)
    tiles = shapely.box(*start.T, *ends.T)
    lines = [
        _Line("tiles", list(tiles), f"kept tiles: {len(cells):,}" if len(cells) else "no tile is kept"),
        _Line("mask", _mask_outlines(mask, grid.size), "tissue mask" if mask.any() else "no tissue was found"),
    ]
    _draw(name, words, [_Panel("", thumbnail, lines=lines)], grid, None, out)


def _mask_outlines(mask: NDArray[np.bool_], size: tuple[int, int]) -> list[Any]:
    """The edges of a mask, in level-0 pixels."""
    import cv2
    import shapely

    padded = np.pad(mask.astype(np.uint8), 1)
    contours, _ = cv2.findContours(padded, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scale = np.array(size) / mask.shape[::-1]
    return [shapely.Polygon((contour[:, 0] - 0.5) * scale) for contour in contours if len(contour) > 2]


def _tiles(count: int) -> str:
    return f"{count:,} tile{'s' if count != 1 else ''}"


def _area(mm2: float) -> str:
    return f"{mm2:,.3g} mm2" if mm2 < 100 else f"{mm2:,.0f} mm2"


@cache
def _glyphs() -> frozenset[int]:
    """The characters that the font has."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(_FONT)).get_charmap())


def _shown(text: str) -> str:
    """Other people's text as a picture can show it: what has no glyph, as an escape."""
    shown = printable(text).replace("\n", "\\n")
    return "".join(
        character if ord(character) in _glyphs() else character.encode("unicode_escape").decode() for character in shown
    )


# --- laying out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """Outlines of one kind.

    Attributes:
        kind: threshold, annotation, mask or tiles.
        shapes: shapely geometries in level-0 pixels.
        words: what the legend says of it.
    """

    kind: str
    shapes: Sequence[Any]
    words: str = ""


_STYLES: dict[str, list[dict[str, Any]]] = {
    "threshold": [{"color": "white", "linewidth": 2.4}, {"color": "black", "linewidth": 1.1}],
    "annotation": [
        {"color": "white", "linewidth": 2.4},
        {"color": "#D55E00", "linewidth": 1.3, "linestyle": (0, (4, 2))},
    ],
    "mask": [{"color": "white", "linewidth": 2.4}, {"color": "black", "linewidth": 1.1}],
    "tiles": [{"color": "#0072B2", "linewidth": 0.6}],
}
"""Strokes of a line, lowest first; they differ in more than colour."""


@dataclass(frozen=True)
class _Panel:
    """One view of the whole slide.

    Attributes:
        title: above it.
        thumbnail: uint8 (h, w, 3) RGB; None: plain.
        over: draws over it.
        lines: drawn last.
    """

    title: str
    thumbnail: NDArray[np.uint8] | None
    over: Callable[[Any], None] | None = None
    lines: Sequence[_Line] = ()


@dataclass(frozen=True)
class _Bar:
    """A colour bar.

    Attributes:
        label: what the colours are.
        threshold: marked on it.
    """

    label: str
    threshold: float


class _Sheet:
    """A figure that is filled from the top; lengths in inches."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.top = _MARGIN

    def axes(self, left: float, width: float, height: float, below: float = 0.0) -> Any:
        """Empty axes below what is there."""
        bottom = self.height - self.top - below - height
        axes = self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    def line(self, left: float, right: float, **options: Any) -> None:
        """A stroke, in the middle of the line of words below what is there."""
        from matplotlib.lines import Line2D

        y = 1 - (self.top + 0.08) / self.height
        self.figure.add_artist(Line2D([left / self.width, right / self.width], [y, y], **options))

    def text(self, left: float, words: str, **options: Any) -> None:
        """A line below what is there."""
        place = (left / self.width, 1 - self.top / self.height)
        self.figure.text(*place, words, va="top", family=_FONT, parse_math=False, **options)


def _draw(name: str, words: Sequence[str], panels: Sequence[_Panel], grid: Grid, bar: _Bar | None, out: Path) -> None:
    """Lay a picture out and write it."""
    import matplotlib as mpl

    millimetres = [side * mpp / 1000 for side, mpp in zip(grid.size, grid.mpp, strict=True)]
    count = len(panels)
    beside, scale = _arranged(millimetres, count)
    across, down = (max(side * scale, _THINNEST) for side in millimetres)
    slot = max(across, _SLOT) if beside else across
    inside = max(_NARROWEST, slot * count + _GAP * (count - 1) if beside else slot)
    title = textwrap.wrap(_shown(name), int(inside / 0.145)) or [""]
    told = [line for text in words for line in textwrap.wrap(text, int(inside / 0.085))]
    legend = panels[-1].lines
    heading = _LINE if any(panel.title for panel in panels) else 0.0
    height = 2 * _MARGIN + _TITLE * len(title) + _LINE * (len(told) + len(legend) + 2) + 0.3 + (0.7 if bar else 0.0)
    height += (1 if beside else count) * (heading + down + _GAP / 2)

    with mpl.rc_context():
        # A matplotlibrc of the user's must not change what a picture looks like.
        mpl.rcdefaults()
        sheet = _Sheet(inside + 2 * _MARGIN, height)
        for line in title:
            sheet.text(_MARGIN, line, fontsize=12, fontweight="bold")
            sheet.top += _TITLE
        for line in told:
            sheet.text(_MARGIN, line, fontsize=9)
            sheet.top += _LINE
        sheet.top += 0.1
        for place, panel in enumerate(panels):
            left = _MARGIN + (place * (slot + _GAP) if beside else 0)
            if panel.title:
                sheet.text(left, panel.title, fontsize=9, color=_GREY)
            _fill(sheet.axes(left, across, down, below=heading), panel, grid)
            if not beside or place + 1 == count:
                sheet.top += heading + down + _GAP / 2
        _scale_bar(sheet, millimetres[0], scale)
        if bar:
            _colour_bar(sheet, bar)
        for drawn in legend:
            _legend(sheet, drawn)
        sheet.top += 0.1
        sheet.text(_MARGIN, USE, fontsize=9, color=_GREY)
        png = out.suffix.casefold() == ".png"
        metadata = {"Software": None, "Title": printable(name), "Disclaimer": USE} if png else None
        sheet.figure.savefig(out, dpi=_DPI, metadata=metadata)


def _arranged(millimetres: Sequence[float], count: int) -> tuple[bool, float]:
    """Whether panels of that size stand beside each other, and inches a millimetre: the larger ones of both ways."""
    width, height = millimetres
    beside = min((_PANELS[0] - _GAP * (count - 1)) / (count * width), _PANELS[1] / height)
    below = min(_PANELS[0] / width, _PANELS[1] / (count * height))
    return beside >= below, max(beside, below)


def _fill(axes: Any, panel: _Panel, grid: Grid) -> None:
    """Draw a panel, in level-0 pixels."""
    width, height = grid.size
    axes.set_facecolor("0.93")
    for spine in axes.spines.values():
        spine.set(color="0.6", linewidth=0.6)
    if panel.thumbnail is not None:
        axes.imshow(panel.thumbnail, extent=(0, width, height, 0), interpolation="antialiased", aspect="auto")
    if panel.over is not None:
        panel.over(axes)
    for line in panel.lines:
        _stroke(axes, line)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _stroke(axes: Any, line: _Line) -> None:
    """Draw outlines, stroke over stroke."""
    import shapely
    from matplotlib.collections import LineCollection

    rings = shapely.get_rings(shapely.get_parts(np.array(line.shapes, dtype=object)))
    points = [shapely.get_coordinates(ring) for ring in rings]
    for style in _STYLES[line.kind]:
        # Above the frame, and not cut off where a tile ends with the slide.
        axes.add_collection(LineCollection(points, zorder=3, clip_on=False, **style), autolim=False)


def _scale_bar(sheet: _Sheet, width: float, scale: float) -> None:
    """A bar of a round length, at most two fifths of the slide's width."""
    power = 10.0 ** np.floor(np.log10(0.4 * width))
    length = power * max(step for step in (1, 2, 5) if step * power <= 0.4 * width)
    words = f"{length:.6g} mm" if length >= 1 else f"{1000 * length:.6g} um"
    sheet.line(_MARGIN, _MARGIN + length * scale, color="black", linewidth=3, solid_capstyle="butt")
    sheet.text(_MARGIN + length * scale + 0.1, words, fontsize=9)
    sheet.top += _LINE + 0.1


def _colour_bar(sheet: _Sheet, bar: _Bar) -> None:
    """The colours from 0 to 1, and the threshold with its number."""
    width = 4.0
    left = _MARGIN + 0.1
    sheet.text(left + width * bar.threshold, f"threshold {bar.threshold:.3g}", fontsize=9, ha="center")
    sheet.top += _LINE
    axes = sheet.axes(left, width, 0.16)
    axes.imshow(table()[None], extent=(0, 1, 0, 1), aspect="auto")
    for color, linewidth in (("white", 3.0), ("black", 1.4)):
        axes.axvline(bar.threshold, color=color, linewidth=linewidth)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"], fontsize=8, family=_FONT)
    sheet.text(left + width + 0.2, bar.label, fontsize=9)
    sheet.top += 0.5


def _legend(sheet: _Sheet, line: _Line) -> None:
    """A line's look, and what it is."""
    left = _MARGIN
    if line.shapes:
        for style in _STYLES[line.kind]:
            sheet.line(left, left + 0.45, **style)
        left += 0.55
    sheet.text(left, line.words, fontsize=9)
    sheet.top += _LINE
