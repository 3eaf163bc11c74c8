"""From cells of the grid to tiles: the slide is read block by block in storage order, each block decoded once.

A block is a fixed rectangle of one level, on a lattice anchored at the level's origin and a multiple of the file's own
tiles. Tiles are put together from blocks, and each is resampled by itself from a source rectangle that depends on
nothing but the tile; so the pixels of a tile do not depend on which other tiles are read with it, in which order, or
by how many threads.

Memory: a block is let go when the last tile that needs it has been made. In row order that is at most two rows of
blocks, `2 x 512 x level width x 3` bytes.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock, local

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import SlideError
from wsi_idc.grid import Grid
from wsi_idc.slides import Slide
from wsi_idc.slides.patches import MPP, SIDE, PatchFolder
from wsi_idc.units import LevelPx, TilePx

BLOCK = LevelPx(512)
"""Side of a block in level pixels; rounded up to whole stored tiles."""
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
    width, height = (side if 0 < side <= BLOCK else 1 for side in slide.levels[level].block)
    block = (LevelPx(width * -(-BLOCK // width)), LevelPx(height * -(-BLOCK // height)))
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
        for start in range(0, len(cells), batch):
            part = rectangles[start : start + batch]
            tiles = np.empty((len(part), size, size, 3), np.uint8)
            for tile, rectangle in zip(tiles, part, strict=True):
                _resample(blocks.cut(rectangle), rectangle, tile)
            yield tiles
    finally:
        executor.shutdown(cancel_futures=True)
        pool.close()


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


def _resample(pixels: NDArray[np.uint8], rectangle: _Rectangle, tile: NDArray[np.uint8]) -> None:
    """Write a tile from its source pixels: as they are, or area-weighted (Pillow widens the filter when reducing)."""
    if rectangle.box is None:
        tile[:] = pixels
        return
    from PIL import Image

    side = (tile.shape[1], tile.shape[0])
    tile[:] = np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.BILINEAR, box=rectangle.box))


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
            self._needs.update(self._of(rectangle))
        self._order = deque(self._needs)
        self._held: dict[tuple[int, int], Future[NDArray[np.uint8]]] = {}
        self._touched: set[tuple[int, int]] = set()
        self._requested = 0

    def _of(self, rectangle: _Rectangle) -> list[tuple[int, int]]:
        """The blocks (row, column) that a rectangle touches."""
        width, height = self._source.block
        rows = range(rectangle.y // height, -(-(rectangle.y + rectangle.height) // height))
        columns = range(rectangle.x // width, -(-(rectangle.x + rectangle.width) // width))
        return [(row, column) for row in rows for column in columns]

    def _decode(self, block: tuple[int, int]) -> NDArray[np.uint8]:
        width, height = self._source.block
        x, y = LevelPx(block[1] * width), LevelPx(block[0] * height)
        return self._pool.get().read(self._source.level, x, y, width, height)

    def _request(self, block: tuple[int, int]) -> Future[NDArray[np.uint8]]:
        """The block's pixels to come, and a few after it set going, so that decoding and resampling overlap."""
        self._touched.add(block)
        while self._order and (block not in self._held or self._requested - len(self._touched) < self._ahead):
            following = self._order.popleft()
            self._held[following] = self._executor.submit(self._decode, following)
            self._requested += 1
        return self._held[block]

    def cut(self, rectangle: _Rectangle) -> NDArray[np.uint8]:
        """The rectangle's pixels, put together from its blocks: uint8 (height, width, 3)."""
        block_width, block_height = self._source.block
        canvas = np.empty((rectangle.height, rectangle.width, 3), np.uint8)
        for block in self._of(rectangle):
            pixels = self._request(block).result()
            left, top = block[1] * block_width - rectangle.x, block[0] * block_height - rectangle.y
            across = slice(max(left, 0), min(left + block_width, rectangle.width))
            down = slice(max(top, 0), min(top + block_height, rectangle.height))
            canvas[down, across] = pixels[down.start - top : down.stop - top, across.start - left : across.stop - left]
            self._needs[block] -= 1
            if not self._needs[block]:
                del self._held[block]
        return canvas
