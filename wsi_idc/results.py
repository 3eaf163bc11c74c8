"""A slide with its current map by one model, as those read it from the store who draw, export, report and compare.

What a tile stands for is a square of the grid's pitch: where tiles overlap (stride below the tile's side) or leave
gaps, areas still add up to the slide's. Areas of tissue count the part of each tile that is tissue.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import StoreDamageError, UsageError
from wsi_idc.model.bundle import SHIPPED, of_class, read_bundle
from wsi_idc.store import Store, StoredSlide
from wsi_idc.store.map import StoredMap


@dataclass(frozen=True)
class Choice:
    """Whose maps are looked at.

    Attributes:
        model: the name that they have in the store.
        needs: what the model's forms make maps from, where the model itself is at hand; empty: only the tiles count.
    """

    model: str
    needs: Sequence[Mapping[str, Any]] = ()


def choose_model(store: Store, model: str | None) -> Choice:
    """The model whose maps are meant.

    Args:
        store: with maps.
        model: a name that maps have in the store, or a bundle's folder, against whose files maps are then held; None:
            the only one that the store has maps by.

    Raises:
        UsageError: there are none, or several, or none by that one.
        ModelError: a bundle's folder that cannot be used.
    """
    names = store.models()
    if not names:
        raise UsageError(store.address, "has no maps", "run wsi-idc infer first")
    if model is None:
        if len(names) > 1:
            raise UsageError("--model", f"the store has maps by {', '.join(names)}", "name one of them with --model")
        return Choice(names[0], needs_of(names[0]))
    if model in names:
        return Choice(model, needs_of(model))
    if not Path(model).is_dir():
        raise UsageError("--model", f"no maps by {model!r}", f"the store has maps by {', '.join(names)}")
    bundle = read_bundle(Path(model))
    if bundle.fields.name not in names:
        problem = f"the store has no maps by {bundle.fields.name}, only by {', '.join(names)}"
        raise UsageError("--model", problem, "run wsi-idc infer with that model first")
    return Choice(bundle.fields.name, bundle.needs())


def needs_of(model: str) -> list[dict[str, Any]]:
    """What the forms of the model that ships make maps from, where that is the name; nothing is known of others."""
    bundle = read_bundle(SHIPPED)
    return bundle.needs() if model == bundle.fields.name else []


@dataclass(frozen=True)
class Absent:
    """A slide of which there is no result.

    Attributes:
        slide_id: the slide.
        kind: what is missing: its tiles, or a current map.
        why: the reason.
        slide: its tiles, where they are complete.
    """

    slide_id: str
    kind: Literal["not extracted", "no map", "failed", "stale", "damaged", "no positive class"]
    why: str = ""
    slide: StoredSlide | None = None

    def __str__(self) -> str:
        return f"{self.kind} ({self.why})" if self.why else self.kind


@dataclass(frozen=True)
class Region:
    """Tiles above the threshold that share edges.

    Attributes:
        tiles: int (k,), their places in the slide's order.
        mean: mean probability.
        highest: highest probability.
        area_mm2: of their squares, in mm2.
        tissue_mm2: of the tissue in them, in mm2.
        bounds: level-0 x, y, width, height from the slide's origin, in pixels.
    """

    tiles: NDArray[np.int64] = field(repr=False)
    mean: float
    highest: float
    area_mm2: float
    tissue_mm2: float
    bounds: tuple[int, int, int, int]


@dataclass(frozen=True)
class Measures:
    """A slide in numbers; areas in mm2.

    Attributes:
        tiles: number of tiles.
        positive: tiles at or above the threshold.
        tissue_mm2: tissue in all tiles.
        idc_mm2: tissue in the positive ones.
        idc_part: the second of the first; None without tissue.
        mean: mean probability of all tiles; None without tiles.
        maximum: highest one; None without tiles.
    """

    tiles: int
    positive: int
    tissue_mm2: float
    idc_mm2: float
    idc_part: float | None
    mean: float | None
    maximum: float | None


STRONGEST_TILES = 8
"""That are shown of a slide, as pictures."""


def strongest(probability: NDArray[np.float32]) -> list[int]:
    """The most probable tiles, strongest first.

    Args:
        probability: float32 (n,), P(positive).
    """
    return [int(place) for place in np.argsort(-probability, kind="stable")[:STRONGEST_TILES]]


class Result:
    """A slide and its current map by one model; arrays are read, and checked, when they are asked for.

    Args:
        slide: the slide's tiles.
        map: the map.
        model: whose it is.
        threshold: P(positive) from which a tile is positive.
    """

    def __init__(self, slide: StoredSlide, map: StoredMap, model: str, threshold: float) -> None:
        self.slide, self.map, self.model, self.threshold = slide, map, model, threshold

    @property
    def slide_id(self) -> str:
        """The slide's id."""
        return self.slide.slide_id

    @property
    def classes(self) -> list[str]:
        """What the model tells apart."""
        return [str(name) for name in self.map.attributes["model"]["classes"]]

    @property
    def positive(self) -> str:
        """The class that the probabilities are of."""
        return str((self.map.record.made_from or {})["positive class"])

    @property
    def origin(self) -> tuple[int, int]:
        """The slide's top left in the file's own level-0 pixels (x, y): what positions are shifted by where a program
        counts from the file's."""
        x, y = self.slide.attributes.get("origin", (0, 0))
        return int(x), int(y)

    @cached_property
    def cell(self) -> NDArray[np.int32]:
        """int32 (n, 2) of row, column."""
        return self.slide.cell

    @cached_property
    def tissue(self) -> NDArray[np.float32]:
        """float32 (n,): part of the tile that is tissue."""
        return self.slide.tissue

    @property
    def blur(self) -> NDArray[np.float32]:
        """float32 (n,): how sharp each tile is; measured where its pixels were read first."""
        return self.map.read("blur") if self.map.has("blur") else self.slide.blur

    @property
    def pen(self) -> NDArray[np.float32]:
        """float32 (n,): part of each tile that has the colour of ink."""
        return self.map.read("pen") if self.map.has("pen") else self.slide.pen

    @property
    def strongest(self) -> list[int]:
        """The most probable tiles, strongest first: their places in the slide's order."""
        return strongest(self.probability)

    @property
    def strongest_pixels(self) -> NDArray[np.uint8] | None:
        """uint8 (k, size, size, 3): their pixels, where they lie with the map; None where they do not, as the store
        has the pixels of all tiles."""
        return np.asarray(self.map.read("strongest"), np.uint8) if self.map.has("strongest") else None

    @cached_property
    def _stored(self) -> NDArray[np.float32]:
        """float32 (n,) of the second of two classes, or (n, class): as the map has it."""
        return self.map.read("probability")

    @cached_property
    def probability(self) -> NDArray[np.float32]:
        """float32 (n,): P(positive) of each tile."""
        return self._of_positive(self._stored)

    @cached_property
    def each_class(self) -> NDArray[np.float32]:
        """float32 (n, class): the probability of each of `classes`."""
        return np.stack([of_class(self._stored, place) for place in range(len(self.classes))], axis=1)

    @cached_property
    def alone(self) -> NDArray[np.float32] | None:
        """float32 (n,): the same by the tile's own pixels; None by a model whose tiles' neighbours take no part."""
        return self._of_positive(self.map.read("alone")) if self.map.has("alone") else None

    def _of_positive(self, probability: NDArray[np.float32]) -> NDArray[np.float32]:
        return of_class(probability, self.classes.index(self.positive))

    @property
    def called(self) -> NDArray[np.bool_]:
        """bool (n,): the tiles at or above the threshold."""
        return np.asarray(self.probability >= self.threshold)

    @cached_property
    def image(self) -> NDArray[np.float32]:
        """float32 (rows, columns): P(positive); NaN where there is no tile."""
        return self.slide.grid.image(self.cell, self.probability)

    @property
    def _square_mm2(self) -> float:
        """What a tile stands for."""
        spec = self.slide.spec
        return float((spec.stride_px * spec.mpp / 1000) ** 2)

    @cached_property
    def measures(self) -> Measures:
        """The slide in numbers."""
        tissue, probability, called = self.tissue.astype(np.float64), self.probability, self.called
        whole, positive = (float(part.sum()) * self._square_mm2 for part in (tissue, tissue[called]))
        count = len(probability)
        return Measures(
            tiles=count,
            positive=int(called.sum()),
            tissue_mm2=whole,
            idc_mm2=positive,
            idc_part=positive / whole if whole else None,
            mean=float(probability.mean(dtype=np.float64)) if count else None,
            maximum=float(probability.max()) if count else None,
        )

    @cached_property
    def regions(self) -> list[Region]:
        """The regions above the threshold, strongest first: by area times mean probability; equal ones as they come."""
        import cv2

        cells, probability, called = self.cell, self.probability, self.called
        if not called.any():
            return []
        mask = np.zeros(self.slide.grid.shape, np.uint8)
        mask[cells[called, 0], cells[called, 1]] = 1
        count, numbers = cv2.connectedComponents(mask, connectivity=4)
        own = np.where(called, numbers[cells[:, 0], cells[:, 1]], 0)
        order = np.argsort(own, kind="stable")
        parts = np.split(order, np.searchsorted(own[order], np.arange(1, count)))[1:]
        tissue = self.tissue
        regions = [self._region(tiles, cells[tiles], probability[tiles], tissue[tiles]) for tiles in parts]
        return sorted(regions, key=lambda region: (-region.area_mm2 * region.mean, region.tiles[0]))

    def _region(
        self,
        tiles: NDArray[np.int64],
        cells: NDArray[np.int32],
        probability: NDArray[np.float32],
        tissue: NDArray[np.float32],
    ) -> Region:
        grid = self.slide.grid
        (x0, y0), (x1, y1) = grid.position(np.stack([cells.min(0), cells.max(0) + 1])).tolist()
        width, height = grid.size
        return Region(
            tiles,
            float(probability.mean(dtype=np.float64)),
            float(probability.max()),
            len(tiles) * self._square_mm2,
            float(tissue.sum(dtype=np.float64)) * self._square_mm2,
            (x0, y0, min(x1, width) - x0, min(y1, height) - y0),
        )

    def squares(self, tiles: NDArray[np.integer]) -> NDArray[np.int32]:
        """What tiles stand for, in level-0 pixels from the slide's origin: int32 (k, 4) of x0, y0, x1, y1.

        Neighbours share their edges to the pixel; at the slide's right and lower edge squares end with it.
        """
        grid, cells = self.slide.grid, self.cell[tiles]
        ends = np.minimum(grid.position(cells + 1), np.asarray(grid.size, np.int32))
        return np.concatenate([grid.position(cells), ends], axis=1).astype(np.int32)

    def outline(self, tiles: NDArray[np.integer]) -> Any:
        """What tiles stand for together, in level-0 pixels from the slide's origin: a shapely polygon or several, their
        holes kept, without points along straight edges.

        Args:
            tiles: int (k,), their places in the slide's order.
        """
        import shapely

        squares, cells = self.squares(tiles), self.cell[tiles]
        # Tiles side by side are one box before they are united: ten times quicker. A union of a coverage would be
        # quicker still, and is not valid where holes touch at a corner.
        first = np.ones(len(tiles), bool)
        first[1:] = (np.diff(cells[:, 0]) != 0) | (np.diff(cells[:, 1]) != 1)
        last = np.roll(first, -1)
        x0, y0, x1, y1 = squares[first, 0], squares[first, 1], squares[last, 2], squares[last, 3]
        return shapely.simplify(shapely.union_all(shapely.box(x0, y0, x1, y1)), 0)


def look(store: Store, choice: Choice, slide_id: str, threshold: float | None = None) -> Result | Absent:
    """A slide's result, or why there is none.

    Args:
        store: the store.
        choice: whose map.
        slide_id: of which slide.
        threshold: P(positive) from which a tile is positive; None: the model's.
    """
    try:
        record, slide = store.look(slide_id)
    except StoreDamageError as error:
        return Absent(slide_id, "damaged", error.problem)
    if slide is None:
        return Absent(slide_id, "not extracted", record.failed or record.trouble)
    found = store.map(choice.model, slide_id)
    state = found.state(slide, choice.needs)
    if state.kind != "current":
        return Absent(slide_id, "no map" if state.kind == "none" else state.kind, state.why, slide)
    about = found.attributes.get("model")
    own = about.get("threshold") if isinstance(about, dict) else None
    if own is None or (found.record.made_from or {}).get("positive class") is None:
        return Absent(
            slide_id, "no positive class", f"{choice.model} has several classes, none of them positive", slide
        )
    return Result(slide, found, choice.model, float(own if threshold is None else threshold))


def require(found: Result | Absent, model: str) -> Result:
    """The result, by who cannot go on without.

    Raises:
        UsageError: there is none; says why, and what to do.
    """
    if isinstance(found, Result):
        return found
    kinds = {
        "not extracted": ("not extracted", "run wsi-idc extract"),
        "no map": (f"has no map by {model}", "run wsi-idc infer"),
        "no positive class": ("its map has no positive class", "name one in the model's bundle.json, and infer again"),
        "damaged": ("its record is damaged", "run wsi-idc extract again"),
    }
    problem, advice = kinds.get(found.kind, (f"its map by {model} is {found.kind}", "run wsi-idc infer again"))
    raise UsageError(found.slide_id, f"{problem} ({found.why})" if found.why else problem, advice)


def limited(names: Sequence[str], only: Collection[str] = (), listed: Collection[str] | None = None) -> list[str]:
    """The slides of a store that are meant, in its order.

    Args:
        names: those that it has.
        only: to which the user limits them; all where empty.
        listed: the manifest's, where one is given: others are left out.

    Raises:
        UsageError: one of `only` is not in the store.
    """
    if unknown := sorted(set(only) - set(names)):
        raise UsageError(f"--only {unknown[0]}", "no such slide in the store", "wsi-idc status lists them")
    return [name for name in names if (not only or name in only) and (listed is None or name in listed)]
