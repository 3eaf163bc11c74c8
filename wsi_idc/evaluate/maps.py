"""The worst and the best slides as pictures: the slide, what is labelled on it, and each model's map beside it.

What is drawn of a tile is the square of the grid's pitch. Of a map only the tiles that are judged are shown, as in the
figures: those with a label and a probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.colours import coloured
from wsi_idc.evaluate.metrics import Evaluation, GroupRow, Results
from wsi_idc.store import StoredSlide

SHOWN = 3
"""Slides that are shown of the worst, and of the best."""
OUTLINE = (213, 94, 0)
NOTHING = (238, 238, 238)
"""What has no tile, or no label, or no probability."""
_SIDE = 600
"""Of a picture in pixels, the longer one."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Panel:
    """A picture, `kind` of file and its contents, with its title and words."""

    title: str
    words: str
    kind: Literal["png", "jpeg"]
    content: bytes
    size: tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """A slide that is shown: its heading, and its pictures."""

    heading: str
    panels: Sequence[Panel]


def chosen(results: Results) -> list[tuple[str, str]]:
    """The slides to show, worst first: words and slide id, by the mean of all models' Brier scores.

    Every slide has a Brier score. The best are looked for among those with tiles of both classes, if there are any: a
    slide without IDC is easily judged well.
    """
    rows = [{row.slide: row for row in evaluation.per_slide} for evaluation in results.evaluations]
    scores = {name: float(np.mean([own[name].figures["brier"] for own in rows])) for name in rows[0]}
    order = sorted(scores, key=lambda name: (-scores[name], name))
    worst = order[:SHOWN]
    both = [name for name in order if 0 < rows[0][name].positive < rows[0][name].tiles] or order
    best = [name for name in both[::-1][:SHOWN] if name not in worst][::-1]
    return [("worst", name) for name in worst] + [("best", name) for name in best]


def draw_slides(results: Results, slides: Sequence[StoredSlide]) -> list[Shown]:
    """The chosen slides, drawn; one at a time is read.

    Args:
        results: the figures.
        slides: those of the tiles, in the order of `Predictions.tile`.

    Raises:
        StoreDamageError: one of them is not what was written.
    """
    starts = dict(zip((slide.slide_id for slide in slides), _starts(slides), strict=True))
    known = {slide.slide_id: slide for slide in slides}
    return [_draw(results, known[name], starts[name], words) for words, name in chosen(results)]


def _starts(slides: Sequence[StoredSlide]) -> list[int]:
    return [0, *np.cumsum([slide.count for slide in slides]).tolist()][:-1]


def _draw(results: Results, slide: StoredSlide, start: int, words: str) -> Shown:
    from PIL import Image

    picture = Image.fromarray(slide.thumbnail)
    scale = _SIDE / max(picture.size)
    side = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(side, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    cells, place = slide.cell, _places(slide, side)

    def raster(values: NDArray[np.floating]) -> NDArray[np.float32]:
        """Values of the tiles, float (n,), at each pixel of the picture; NaN where there is none."""
        return slide.grid.image(cells, values)[place]

    truth = np.full(slide.count, np.nan)
    first = results.evaluations[0].predictions
    own = _own(results.evaluations[0], slide, start)
    truth[first.tile[own] - start] = first.truth[own]
    edge = _edge(raster(truth) == 1)
    panels = [
        Panel("Slide", f"{slide.count:,} tiles", "jpeg", _jpeg(_outlined(np.asarray(picture), edge)), side),
        Panel("Labels", "part of each tile that is IDC", "png", _png(_coloured(raster(slide.idc))), side),
    ]
    for evaluation in results.evaluations:
        data, own = evaluation.predictions, _own(evaluation, slide, start)
        probability = np.full(slide.count, np.nan)
        probability[data.tile[own] - start] = data.probability[own]
        row = next(row for row in evaluation.per_slide if row.slide == slide.slide_id)
        content = _png(_outlined(_coloured(raster(probability)), edge))
        panels.append(Panel(data.model, _told(row), "png", content, side))
    scores = [row.figures["brier"] for e in results.evaluations for row in e.per_slide if row.slide == slide.slide_id]
    mean = "mean Brier score" if len(scores) > 1 else "Brier score"
    patient = f", patient {slide.patient_id}" if slide.patient_id != slide.slide_id else ""
    return Shown(f"{slide.slide_id}{patient}: {words}, {mean} {np.mean(scores):.3f}", panels)


def _own(evaluation: Evaluation, slide: StoredSlide, start: int) -> NDArray[np.int64]:
    """Where in the predictions the slide's tiles are."""
    tile = evaluation.predictions.tile
    return np.flatnonzero((tile >= start) & (tile < start + slide.count))


def _told(row: GroupRow) -> str:
    auc = row.figures["roc_auc"]
    calls = row.confusion
    positive, negative = calls.tp + calls.fn, calls.fp + calls.tn
    found = f"found {calls.tp:,} of {positive:,} IDC tiles, called {calls.fp:,} of {negative:,} others IDC"
    return found if np.isnan(auc) else f"ROC AUC {auc:.3f}, {found}"


def _places(slide: StoredSlide, side: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cell (row, column) under the centre of each pixel of a picture of the whole slide, to index a grid with."""
    grid = slide.grid
    axes = []
    for pixels, length, step, cells in zip(side, grid.size, grid.step, grid.shape[::-1], strict=True):
        centre = (np.arange(pixels) + 0.5) * length / pixels
        axes.append(np.minimum((centre / step).astype(np.int64), cells - 1))
    columns, rows = axes
    return np.broadcast_to(rows[:, None], side[::-1]), np.broadcast_to(columns[None, :], side[::-1])


def _edge(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels beside a region, two deep: outside it, so that what is in it can be seen."""
    from scipy import ndimage

    return np.asarray(ndimage.binary_dilation(inside, iterations=2) & ~inside)


def _outlined(pixels: Pixels, edge: NDArray[np.bool_]) -> Pixels:
    drawn = pixels.copy()
    drawn[edge] = OUTLINE
    return drawn


def _coloured(values: NDArray[np.float32]) -> Pixels:
    """Parts or probabilities in colours: uint8 (h, w, 3)."""
    return np.where(np.isnan(values)[..., None], np.asarray(NOTHING, np.uint8), coloured(values))


def _png(pixels: Pixels) -> bytes:
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE).save(stream, "png", optimize=True)
    return stream.getvalue()


def _jpeg(pixels: Pixels) -> bytes:
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=85)
    return stream.getvalue()
