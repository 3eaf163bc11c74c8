"""From cells of the grid to tiles: the slide is read block by block in storage order, each block decoded once.

A block is a fixed rectangle of one level, on a lattice anchored at the level's origin and a multiple of the file's own
tiles. Tiles are put together from blocks, and each is resampled by itself from a source rectangle that depends on
nothing but the tile; so the pixels of a tile do not depend on which other tiles are read with it, in which order, or
by how many threads.

Memory: a block is let go when the last tile that needs it has been made. In row order that is at most two rows of
blocks, `2 x 512 x level width x 3` bytes; of stored tiles of over 512 px, two rows of these.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock, local
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import SlideError
from wsi_idc.grid import Grid
from wsi_idc.slides import Slide
from wsi_idc.slides.patches import MPP, SIDE, PatchFolder
from wsi_idc.units import LevelPx, TilePx

BLOCK = LevelPx(512)
"""Side of a block in level pixels; rounded up to whole stored tiles."""
TILE_BLOCK = LevelPx(192)
"""The same where stored tiles are decoded one by one: mostly one tile, so that none is decoded that no tile needs."""
UPSAMPLING = 0.01
"""A level at most this part coarser than asked still counts as fine enough."""
MARGIN = TilePx(2)
"""Tile pixels read around a resampled tile: the support of Pillow's bilinear filter is one."""


@dataclass(frozen=True)
class Source:
    """Where the pixels of a slide's tiles come from.

    Attributes:
        level: the coarsest level that is as fine as asked.
        scale: pixels of that level per tile pixel (x, y).
        stored: whether stored pixels are used as they are: over a tile's side the level differs by under half a pixel.
        block: (width, height) of the blocks read, in pixels of that level.
    """

    level: int
    scale: tuple[float, float]
    stored: bool
    block: tuple[LevelPx, LevelPx]


def choose_source(slide: Slide, grid: Grid) -> Source:
    """The level to read and how to get from it to the grid's resolution."""
    asked = grid.spec.mpp
    fine = [n for n in range(len(slide.levels)) if slide.level_mpp(n) <= asked * (1 + UPSAMPLING)]
    level = max(fine, default=0)
    down = slide.levels[level].downsample
    scale = (asked / (slide.mpp[0] * down[0]), asked / (slide.mpp[1] * down[1]))
    stored = all(abs(value - 1) * grid.spec.size_px < 0.5 for value in scale)
    width, height = slide.levels[level].block
    if slide.decodes_tiles(level):
        least = TILE_BLOCK
    else:
        least, (width, height) = BLOCK, (side if 0 < side <= BLOCK else LevelPx(1) for side in (width, height))
    block = (LevelPx(width * -(-least // width)), LevelPx(height * -(-least // height)))
    return Source(level, scale, stored, block)


def check_fit(slide: Slide, grid: Grid) -> list[str]:
    """Refuse a slide that cannot give the tiles asked for.

    Returns:
        What a user should know of those that it gives, a line each.

    Raises:
        SlideError: even its finest level has over twice the um/px asked; or it is a folder of ready-cut patches, and
            other tiles are asked for.
    """
    if slide.patches is not None:
        return _check_patches(slide, slide.patches, grid)
    finest = max(slide.mpp)
    if finest > 2 * grid.spec.mpp:
        raise SlideError(
            slide.path,
            f"its finest level has {finest:.4g} um/px, too coarse for tiles at {grid.spec.mpp:g}",
            "scan it at a higher magnification, or ask for coarser tiles with --mpp",
        )
    if finest > grid.spec.mpp * (1 + UPSAMPLING):
        by = f"{finest / grid.spec.mpp:.3g} times"
        return [f"its finest level has {finest:.4g} um/px: tiles at {grid.spec.mpp:g} are upsampled {by}"]
    return []


def _check_patches(slide: Slide, patches: PatchFolder, grid: Grid) -> list[str]:
    spec = grid.spec
    if (spec.size_px, spec.mpp, spec.stride_px) != (SIDE, MPP, SIDE) or slide.mpp != (MPP, MPP):
        raise SlideError(
            slide.path,
            f"a patch folder's tiles are ready-cut, {SIDE} px at {MPP} um/px",
            "leave --tile-size, --mpp and --stride out, and mpp in the manifest empty",
        )
    return [f"{count} file{'s' if count != 1 else ''} left out: {reason}" for reason, count in patches.left_out.items()]


class SlidePool:
    """Open slides for threads: one for all where the slide says that it may be shared, else one a thread.

    Most readers keep a position and a cache of their own; pictures in memory, OME-NGFF and folders of patches do not,
    and would be decoded or scanned again for each thread.
    """

    def __init__(self, opener: Callable[[], Slide]) -> None:
        self._opener = opener
        self._first = Lock()
        self._for_all: Slide | None = None
        self._here = local()
        self._all: list[Slide] = []
        self._lock = Lock()

    def get(self) -> Slide:
        """The calling thread's slide."""
        slide: Slide | None = getattr(self._here, "slide", None)
        if slide is not None:
            return slide
        # Until the first slide is open, nobody knows whether a second one is needed.
        with self._first:
            slide = self._for_all
            if slide is None and not self._all:
                slide = self._open()
                self._for_all = slide if slide.shared else None
        slide = self._here.slide = slide or self._open()
        return slide

    def _open(self) -> Slide:
        slide = self._opener()
        with self._lock:
            self._all.append(slide)
        return slide

    def close(self) -> None:
        """Close every slide that was opened."""
        for slide in self._all:
            slide.close()
        self._all.clear()


@dataclass(frozen=True)
class _Rectangle:
    """A tile's source rectangle in level pixels: whole pixels to read, and the part of them to resample."""

    x: int
    y: int
    width: int
    height: int
    box: tuple[float, float, float, float] | None


def read_tiles(
    opener: Callable[[], Slide], grid: Grid, cells: NDArray[np.integer], *, batch: int, threads: int = 1
) -> Iterator[NDArray[np.uint8]]:
    """Tiles of the cells, in their order, a batch at a time.

    Args:
        opener: opens the slide; called once in each decoding thread, or once where the slide can be shared by them.
        grid: the slide's grid.
        cells: (n, 2) of row, column; in row order memory stays small.
        batch: tiles in each batch; the last may be shorter.
        threads: decoding threads.

    Yields:
        uint8 (b, size, size, 3) RGB.

    Raises:
        RegionError: a region cannot be decoded.
        AccessError: the system does not give it.
    """
    pool = SlidePool(opener)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        slide = pool.get()
        source = choose_source(slide, grid)
        rectangles = _rectangles(grid, source, slide, cells)
        blocks = _Blocks(pool, source, rectangles, executor, ahead=2 * threads)
        size = grid.spec.size_px
        # A job makes about as many pixels of a level as a block has: one large tile, or many small ones.
        many = max(1, int(np.prod(source.block) / (np.prod(source.scale) * size * size)))
        under_way: deque[_Job] = deque()
        for start in range(0, len(cells), batch):
            part = rectangles[start : start + batch]
            tiles = np.empty((len(part), size, size, 3), np.uint8)
            for first in range(0, len(part), many):
                some = slice(first, first + many)
                made = executor.submit(_make, blocks.request(part[some]), source.block, part[some], tiles[some])
                under_way.append(_Job(made, part[some], tiles if first + many >= len(part) else None))
                if len(under_way) > 2 * threads:
                    yield from _finish(under_way.popleft(), blocks)
        while under_way:
            yield from _finish(under_way.popleft(), blocks)
    finally:
        executor.shutdown(cancel_futures=True)
        pool.close()


@dataclass(frozen=True)
class _Job:
    """Some tiles under way, and the batch that is whole when they are made."""

    made: Future[None]
    rectangles: list[_Rectangle]
    batch: NDArray[np.uint8] | None


def _finish(job: _Job, blocks: "_Blocks") -> Iterator[NDArray[np.uint8]]:
    """The batch that a job ends, if it ends one, once its tiles are made."""
    job.made.result()
    blocks.release(job.rectangles)
    if job.batch is not None:
        yield job.batch


def _rectangles(grid: Grid, source: Source, slide: Slide, cells: NDArray[np.integer]) -> list[_Rectangle]:
    down = np.asarray(slide.levels[source.level].downsample)
    corner = grid.position(cells) / down
    size = grid.spec.size_px
    if source.stored:
        whole = np.floor(corner + 0.5).astype(np.int64)
        return [_Rectangle(x, y, size, size, None) for x, y in whole.tolist()]
    extent = np.asarray(source.scale) * size
    margin = np.ceil(np.maximum(source.scale, 1.0)).astype(np.int64) * MARGIN
    first = np.floor(corner).astype(np.int64)
    last = np.ceil(corner + extent).astype(np.int64)
    # The margin ends at the slide's edge: background must not bleed into a tile that lies inside.
    limit = np.maximum(slide.levels[source.level].size, last)
    first, last = np.maximum(first - margin, 0), np.minimum(last + margin, limit)
    offset = corner - first
    boxes = np.concatenate([offset, offset + extent], axis=1)
    return [
        _Rectangle(x, y, right - x, bottom - y, (box[0], box[1], box[2], box[3]))
        for (x, y), (right, bottom), box in zip(first.tolist(), last.tolist(), boxes.tolist(), strict=True)
    ]


_Held: TypeAlias = dict[tuple[int, int], Future[NDArray[np.uint8]]]
"""(row, column) of a block -> its pixels to come."""


def _make(held: _Held, block: tuple[LevelPx, LevelPx], rectangles: list[_Rectangle], tiles: NDArray[np.uint8]) -> None:
    """Write tiles: uint8 (n, size, size, 3), one for each rectangle."""
    for rectangle, tile in zip(rectangles, tiles, strict=True):
        if rectangle.box is None:
            _cut(held, block, rectangle, tile)
            continue
        pixels = np.empty((rectangle.height, rectangle.width, 3), np.uint8)
        _cut(held, block, rectangle, pixels)
        _resample(pixels, rectangle.box, tile)


def _cut(held: _Held, block: tuple[LevelPx, LevelPx], rectangle: _Rectangle, pixels: NDArray[np.uint8]) -> None:
    """Write a rectangle's pixels, put together from its blocks: uint8 (height, width, 3)."""
    for row, column in _touched(rectangle, block):
        left, top = column * block[0] - rectangle.x, row * block[1] - rectangle.y
        part = held[row, column].result()[max(-top, 0) : rectangle.height - top, max(-left, 0) : rectangle.width - left]
        top, left = max(top, 0), max(left, 0)
        pixels[top : top + part.shape[0], left : left + part.shape[1]] = part


def _touched(rectangle: _Rectangle, block: tuple[LevelPx, LevelPx]) -> Iterator[tuple[int, int]]:
    """The blocks (row, column) that a rectangle touches."""
    columns = range(rectangle.x // block[0], -(-(rectangle.x + rectangle.width) // block[0]))
    for row in range(rectangle.y // block[1], -(-(rectangle.y + rectangle.height) // block[1])):
        for column in columns:
            yield row, column


def _resample(pixels: NDArray[np.uint8], box: tuple[float, float, float, float], tile: NDArray[np.uint8]) -> None:
    """Write a tile from the box of its source pixels, area-weighted (Pillow widens the filter when reducing)."""
    from PIL import Image

    if _halves(pixels, box, tile):
        _halve(pixels[int(box[1]) - 1 :, int(box[0]) - 1 :], tile)
        return
    side = (tile.shape[1], tile.shape[0])
    tile[:] = np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.BILINEAR, box=box))


def _halves(pixels: NDArray[np.uint8], box: tuple[float, float, float, float], tile: NDArray[np.uint8]) -> bool:
    """Whether a tile is its source at half the size, at whole pixels, with at least one more on each side."""
    left, top, right, bottom = box
    return (
        (right - left, bottom - top) == (2 * tile.shape[1], 2 * tile.shape[0])
        and left.is_integer()
        and top.is_integer()
        and min(left, top, pixels.shape[1] - right, pixels.shape[0] - bottom) >= 1
    )


def _halve(pixels: NDArray[np.uint8], tile: NDArray[np.uint8]) -> None:
    """Pillow's bilinear halving, to the bit, in a third of its time.

    Its filter then is (1, 3, 3, 1) / 8 everywhere, along the rows and then along the columns, each rounded half up.

    Args:
        pixels: uint8, from one pixel before the tile's source to one after it or further.
        tile: uint8 (size, size, 3), which is written.
    """
    import cv2

    height, width = 2 * tile.shape[0], 2 * tile.shape[1]
    weights = np.array([[1, 3, 3, 1]], np.float32) / 8
    # Sums are whole eighths and exact in float32; OpenCV rounds half to even, where a sixteenth more goes up.
    along = cv2.filter2D(pixels[: height + 2, : width + 2], -1, weights, anchor=(1, 0), delta=1 / 16)
    along = cv2.resize(along[:, 1:-1], (tile.shape[1], height + 2), interpolation=cv2.INTER_NEAREST)
    tile[:] = cv2.filter2D(along, -1, weights.T, anchor=(0, 1), delta=1 / 16)[1:-1:2]


class _Blocks:
    """Blocks decoded ahead of need in the order of first need, each once, and let go after the last need."""

    def __init__(
        self,
        pool: SlidePool,
        source: Source,
        rectangles: list[_Rectangle],
        executor: ThreadPoolExecutor,
        ahead: int,
    ) -> None:
        self._pool, self._source, self._executor, self._ahead = pool, source, executor, ahead
        self._needs: Counter[tuple[int, int]] = Counter()
        for rectangle in rectangles:
            self._needs.update(_touched(rectangle, source.block))
        self._order = deque(self._needs)
        self._held: _Held = {}
        self._touched: set[tuple[int, int]] = set()
        self._requested = 0

    def _decode(self, block: tuple[int, int]) -> NDArray[np.uint8]:
        width, height = self._source.block
        x, y = LevelPx(block[1] * width), LevelPx(block[0] * height)
        return self._pool.get().read(self._source.level, x, y, width, height)

    def request(self, rectangles: list[_Rectangle]) -> _Held:
        """The blocks that rectangles touch, and a few after them set going.

        Whoever waits for them in the executor waits for nobody behind him: all of them are begun before he is.
        """
        needed = dict.fromkeys(block for one in rectangles for block in _touched(one, self._source.block))
        self._touched.update(needed)
        while self._order and (
            self._requested - len(self._touched) < self._ahead or not needed.keys() <= self._held.keys()
        ):
            following = self._order.popleft()
            self._held[following] = self._executor.submit(self._decode, following)
            self._requested += 1
        return {block: self._held[block] for block in needed}

    def release(self, rectangles: list[_Rectangle]) -> None:
        """Let go of the blocks that nothing but these rectangles still needed."""
        for rectangle in rectangles:
            for block in _touched(rectangle, self._source.block):
                self._needs[block] -= 1
                if not self._needs[block]:
                    del self._held[block]
