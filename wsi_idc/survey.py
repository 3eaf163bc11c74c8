"""What the slides of a manifest are, and what extracting and scoring them would take: nothing is written.

Each slide is opened, and its tissue is found as `extract` would find it; of one slide a kind some tiles are read and
packed, and some are scored, with a clock beside them. Times are estimates of this machine as it was then.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import SlideError
from wsi_idc.grid import Grid
from wsi_idc.manifest import Row
from wsi_idc.settings import CutSettings, TileSpec
from wsi_idc.slides import Slide, open_slide
from wsi_idc.units import LevelPx

CHEAP_PIXELS = 150_000_000
"""Pixels that are read for a slide's tissue mask; of a slide without coarse levels, which would take more, the whole
grid is counted instead."""
READ_TILES = 2048
"""Tiles that are read with a clock beside them: neighbours share what is decoded, so that a few would cost too much."""
SCORED_TILES = 256
"""Tiles that are scored with a clock beside them."""
_STRIP = (LevelPx(8192), LevelPx(1024))


@dataclass(frozen=True)
class Surveyed:
    """One slide that extract can cut.

    Attributes:
        row: its line of the manifest.
        size: level-0 (width, height) in pixels.
        mpp: level-0 um/px (x, y).
        mpp_source: where they are from.
        levels: of its pyramid.
        tiles: that have tissue; or, where `exact` is not, cells of its grid.
        exact: whether its tissue was looked for.
        kind: slides of one kind take as long to read: format, and um/px of the level that tiles are read from.
        packed: bytes that its thumbnail and mask take in the store.
        seconds: that opening it and finding its tissue takes.
        warnings: as extract would tell them.
    """

    row: Row
    size: tuple[int, int]
    mpp: tuple[float, float]
    mpp_source: str
    levels: int
    tiles: int
    exact: bool
    kind: tuple[str, float]
    packed: int
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The slide in one line."""
        (width, height), (x, y) = self.size, self.mpp
        mpp = f"{x:.4g}" if f"{x:.4g}" == f"{y:.4g}" else f"{x:.4g} x {y:.4g}"
        levels = f"{self.levels} level{'s' if self.levels != 1 else ''}"
        count = f"{'' if self.exact else 'at most '}{self.tiles:,} tile{'s' if self.tiles != 1 else ''}"
        given = " (given)" if self.mpp_source == "given" else ""
        return f"{width} x {height} px, {mpp} um/px{given}, {levels}, {count}"


@dataclass(frozen=True)
class Reading:
    """What was measured on one slide of a kind.

    Attributes:
        seconds: that reading, judging and packing a tile takes.
        packed: bytes that a tile takes in the store.
    """

    seconds: float
    packed: float


@dataclass(frozen=True)
class Scoring:
    """What was measured with the model that ships.

    Attributes:
        load: seconds that loading it takes.
        tile: seconds that scoring a tile takes.
        slide: seconds that the neighbours' part takes, of a slide: it depends on its area more than on its tiles.
    """

    load: float
    tile: float
    slide: float


@dataclass(frozen=True)
class Survey:
    """All slides of a manifest.

    Attributes:
        slides: those that extract can cut.
        failures: slide id -> why it cannot cut the others.
        reading: of each kind of slide, of which one has a tile.
        scoring: None where no slide has a tile.
    """

    slides: Sequence[Surveyed]
    failures: dict[str, str] = field(default_factory=dict)
    reading: dict[tuple[str, float], Reading] = field(default_factory=dict)
    scoring: Scoring | None = None

    def lines(self) -> list[str]:
        """What it would take, as a user reads it."""
        count, tiles = len(self.slides), sum(slide.tiles for slide in self.slides)
        most = "" if all(slide.exact for slide in self.slides) else "at most "
        found = [
            f"{count:,} slide{'s' if count != 1 else ''} can be cut into {most}{tiles:,} tiles ({CutSettings().tile}),"
            f" {len(self.failures):,} cannot"
        ]
        if self.scoring is None:
            return found
        with_tiles = [(slide, self.reading[slide.kind]) for slide in self.slides if slide.tiles]
        extract = sum(slide.seconds for slide in self.slides)
        extract += sum(slide.tiles * reading.seconds for slide, reading in with_tiles)
        packed = sum(slide.packed for slide in self.slides)
        packed += round(sum(slide.tiles * reading.packed for slide, reading in with_tiles))
        scoring = self.scoring
        infer = scoring.load + tiles * scoring.tile + len(with_tiles) * scoring.slide
        return [
            *found,
            f"extract: {most}about {duration(extract)} and {size(packed)} in the store",
            f"infer: {most}about {duration(infer)} on this CPU, by the model that ships",
            "estimated by what this machine took just now for a part of the work",
        ]


def survey(rows: Sequence[Row], told: Callable[[str, Surveyed | str], None]) -> Survey:
    """Look at every slide of a manifest by the default settings.

    Args:
        rows: the slides.
        told: is given each slide's id, and what it is or why extract cannot cut it, as it becomes known.
    """
    settings = CutSettings()
    slides: list[Surveyed] = []
    failures: dict[str, str] = {}
    reading: dict[tuple[str, float], Reading] = {}
    scoring: Scoring | None = None
    import_all()
    for row in rows:
        try:
            surveyed, cells = look_at(row, settings)
            if len(cells) and surveyed.kind not in reading:
                # Of a grid of which nobody knows where its tissue is, a part: all of it may be a million cells.
                some = cells if surveyed.exact else middle(cells, READ_TILES)
                reading[surveyed.kind], tiles = _read_some(row, settings, some)
                scoring = scoring or _score_some(tiles, some, settings.tile)
        except SlideError as error:
            failures[row.slide_id] = error.reason
            told(row.slide_id, error.reason)
            continue
        slides.append(surveyed)
        told(row.slide_id, surveyed)
    return Survey(slides, failures, reading, scoring)


def import_all() -> None:
    """Load what reading a slide needs, before a clock is looked at: a run does it once."""
    from wsi_idc.tissue import MASK_MPP, tissue_mask

    tissue_mask(np.arange(64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8), MASK_MPP)


def open_row(row: Row, settings: CutSettings) -> Slide:
    """A manifest's slide, opened as extract opens it.

    Raises:
        SlideError: it cannot be opened, or lies in an object store.
    """
    if not isinstance(row.path, Path):
        raise SlideError(row.path, "lies in an object store", "copy it here, or try wsi-idc info")
    return open_slide(row.path, row.mpp, settings.reader, icc=settings.icc)


def look_at(row: Row, settings: CutSettings) -> tuple[Surveyed, NDArray[np.int32]]:
    """A slide, and the cells of its tiles; or, where its tissue is not looked for, of its grid: int32 (n, 2).

    Raises:
        SlideError: extract cannot cut it, or it lies in an object store.
    """
    from wsi_idc.reader import check_fit, choose_source
    from wsi_idc.tissue import MASK_MPP
    from wsi_idc.work.cut import find_tissue

    start = time.perf_counter()
    with open_row(row, settings) as slide:
        grid = Grid(settings.tile, slide.size, slide.mpp)
        warnings = [*slide.warnings, *check_fit(slide, grid)]
        level = slide.level_for(MASK_MPP)
        width, height = slide.levels[level].size
        exact = width * height <= CHEAP_PIXELS
        if exact:
            mask = row.mask if isinstance(row.mask, Path) else None
            thumbnail, tissue, cells, _ = find_tissue(slide, settings, mask, grid)
            packed, more = _packed(thumbnail) + _packed(tissue), 0.0
        else:
            cells, packed = grid.cells(), 0
            began = time.perf_counter()
            strip = slide.read(level, LevelPx(0), LevelPx(height // 2), *_STRIP)
            more = (time.perf_counter() - began) * (width * height / (strip.shape[0] * strip.shape[1]) - 1)
        surveyed = Surveyed(
            row,
            slide.size,
            slide.mpp,
            slide.mpp_source,
            len(slide.levels),
            len(cells),
            exact,
            (slide.description.format, round(slide.level_mpp(choose_source(slide, grid).level), 1)),
            packed,
            time.perf_counter() - start + more,
            tuple(warnings),
        )
    return surveyed, cells


def _packed(values: NDArray[np.generic]) -> int:
    """Bytes that an array takes in the store."""
    import zarr

    from wsi_idc.store.node import compressors

    chunks = tuple(max(1, side) for side in values.shape)
    memory = zarr.storage.MemoryStore()
    return int(zarr.create_array(memory, data=values, chunks=chunks, compressors=compressors()).nbytes_stored())


def middle(cells: NDArray[np.int32], most: int) -> NDArray[np.int32]:
    """The cells in the middle of all, at most so many."""
    first = max(0, (len(cells) - most) // 2)
    return cells[first : first + most]


def _read_some(row: Row, settings: CutSettings, cells: NDArray[np.int32]) -> tuple[Reading, NDArray[np.uint8]]:
    """Read, judge and pack tiles of a slide, from the middle of its rows; gives some of them too."""
    from wsi_idc.reader import read_tiles
    from wsi_idc.tissue import tile_quality
    from wsi_idc.work.places import threads_of

    sample = middle(cells, READ_TILES)
    with open_row(row, settings) as slide:
        grid = Grid(settings.tile, slide.size, slide.mpp)
    start = time.perf_counter()
    batches = read_tiles(lambda: open_row(row, settings), grid, sample, batch=SCORED_TILES, threads=threads_of(1))
    packed, some = 0, np.empty(0, np.uint8)
    for number, tiles in enumerate(batches):
        tile_quality(tiles)
        packed += _packed(tiles)
        some = tiles if not number else some
    seconds = time.perf_counter() - start
    return Reading(seconds / len(sample), packed / len(sample)), some


def _score_some(tiles: NDArray[np.uint8], cells: NDArray[np.int32], spec: TileSpec) -> Scoring:
    """Load the model that ships, score some tiles, and let neighbours take part in a whole slide's."""
    from wsi_idc.model.bundle import SHIPPED, read_bundle
    from wsi_idc.model.context import in_context
    from wsi_idc.model.runtime import load_runtime
    from wsi_idc.work.places import threads_of

    start = time.perf_counter()
    bundle = read_bundle(SHIPPED)
    runtime = load_runtime(bundle, "auto", threads_of(1))
    # A handful would cost as much as a batch.
    enough = np.resize(tiles, (SCORED_TILES, *tiles.shape[1:]))
    runtime.predict(enough[: runtime.batch])
    load = time.perf_counter() - start
    start = time.perf_counter()
    scored = runtime.predict(enough)
    seconds, whole = (time.perf_counter() - start) / len(enough), 0.0
    if bundle.fields.context:
        for count in (1, len(cells)):  # the first time, more is imported than is computed
            start = time.perf_counter()
            in_context(np.resize(scored, count), cells[:count], spec, bundle.fields.context)
            whole = time.perf_counter() - start
    return Scoring(load, seconds, whole)


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def size(count: float) -> str:
    """Bytes as a person says them."""
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
