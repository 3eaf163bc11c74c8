"""Stored JPEG tiles of a TIFF, decoded as they are: OpenSlide's pixels to the bit, at a tenth of its cost.

OpenSlide brings each tile from libjpeg through premultiplied RGBA and cairo to what is asked for. Where a level's tiles
are all there, lie edge to edge, and its pixels are asked for at whole places, nothing of that changes a pixel: libjpeg
asked for RGB gives the same. Whether it does is not believed but looked at, on each level, before it is first read.

Left to OpenSlide are other formats and compressions; levels of an uneven downsample, where it blends neighbours by the
part of a pixel left over; files with absent tiles, which it fills from other levels; and every region with a tile that
libjpeg cannot decode without a warning, so that what is damaged fails as it does there.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_idc.slides.tiff import TILE_COUNTS, TILE_OFFSETS, Page, Tiff
from wsi_idc.units import FILE_ORIGIN, LevelPx

if TYPE_CHECKING:
    from wsi_idc.slides.backends import Description, Level

FORMATS = ("aperio", "generic-tiff")
"""What OpenSlide calls the formats whose levels are a page of tiles each."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 257, 258, 259, 262, 277, 284
_TILE_WIDTH, _TILE_HEIGHT, _JPEG_TABLES = 322, 323, 347
_COLOURS: dict[tuple[int, ...], tuple[bytes, str]] = {(2,): (b"\0", "RGB"), (6,): (b"\1", "YCbCr")}
"""What a TIFF calls its colours -> what Adobe's mark in a JPEG does, and simplejpeg. OpenSlide goes by the TIFF."""
_ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
_START, _END = b"\xff\xd8", b"\xff\xd9"
_MOST_TABLES = 2**16
_MOST_SIDE = 1024
"""Larger tiles are left to OpenSlide, which keeps some decoded: regions read here are no larger."""

_Kind: TypeAlias = tuple[int, int, str, str]
"""(height, width, colours, subsampling) of a JPEG, in simplejpeg's words."""
ReadRegion: TypeAlias = Callable[[int, LevelPx, LevelPx, LevelPx, LevelPx], NDArray[np.uint8]]


@dataclass(frozen=True)
class _Tiles:
    """The tiles of one level.

    Attributes:
        size: (width, height) of the level.
        tile: (width, height) of a tile.
        places: int64 (tiles, 2): where each begins in the file, and how many bytes it has; in row order.
        start: what stands before a tile's own bytes, from the third on.
        colours: of the JPEG, in simplejpeg's words.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    places: NDArray[np.int64]
    start: bytes
    colours: str

    @property
    def per_row(self) -> int:
        """Tiles in a row of them."""
        return -(-self.size[0] // self.tile[0])


class StoredTiles:
    """The levels of an open file whose tiles can be decoded directly; threads may read from it at once.

    Args:
        path: the file.
        levels: the tiles of the levels that can be read from them, by their numbers.
        reference: OpenSlide's own pixels of a region: `Backend.read`.
    """

    def __init__(self, path: Path, levels: dict[int, _Tiles], reference: ReadRegion) -> None:
        self._levels, self._reference = levels, reference
        self._kinds: dict[int, _Kind | None] = {}
        self._lock = Lock()
        self._file = path.open("rb", buffering=0)

    def read(self, level: int, x: LevelPx, y: LevelPx, width: LevelPx, height: LevelPx) -> NDArray[np.uint8] | None:
        """Stored pixels of a rectangle that lies within the level.

        Returns:
            uint8 (height, width, 3), OpenSlide's own; None: ask OpenSlide.
        """
        kind = self._kind(level)
        if kind is None:
            return None
        tiles = self._levels[level]
        across, down = tiles.tile
        pixels = np.empty((height, width, 3), np.uint8)
        for row in range(y // down, -(-(y + height) // down)):
            for column in range(x // across, -(-(x + width) // across)):
                tile = self._decode(tiles, row, column, kind)
                if tile is None:
                    return None
                left, top = column * across - x, row * down - y
                if (left, top, width, height) == (0, 0, across, down):
                    return tile
                part = tile[max(-top, 0) : height - top, max(-left, 0) : width - left]
                top, left = max(top, 0), max(left, 0)
                pixels[top : top + part.shape[0], left : left + part.shape[1]] = part
        return pixels

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def takes(self, level: int) -> bool:
        """Whether a level is read from its tiles, but for those that fail."""
        return self._kind(level) is not None

    def _kind(self, level: int) -> _Kind | None:
        """What the JPEGs of a level are; None where it is left to OpenSlide."""
        with self._lock:
            if level not in self._kinds:
                self._kinds[level] = self._look(level) if level in self._levels else None
            return self._kinds[level]

    def _look(self, level: int) -> _Kind | None:
        """What its tiles are, by the one of most bytes; None where that is not OpenSlide's to the bit."""
        from openslide import OpenSlideError
        from simplejpeg import decode_jpeg_header

        tiles = self._levels[level]
        row, column = divmod(int(tiles.places[:, 1].argmax()), tiles.per_row)
        try:
            kind = decode_jpeg_header(self._bytes(tiles, row, column))
            decoded = self._decode(tiles, row, column, kind)
            left, top = column * tiles.tile[0], row * tiles.tile[1]
            width, height = min(tiles.tile[0], tiles.size[0] - left), min(tiles.tile[1], tiles.size[1] - top)
            theirs = self._reference(level, LevelPx(left), LevelPx(top), LevelPx(width), LevelPx(height))
        except (OSError, ValueError, OpenSlideError):
            return None
        if kind[:3] != (*tiles.tile[::-1], tiles.colours) or decoded is None:
            return None
        opaque = theirs.shape[2] == 3 or bool((theirs[..., 3] == 255).all())
        return kind if opaque and np.array_equal(theirs[..., :3], decoded[:height, :width]) else None

    def _bytes(self, tiles: _Tiles, row: int, column: int) -> bytes:
        """A tile as a JPEG that is complete and says what its colours are."""
        place, length = tiles.places[row * tiles.per_row + column].tolist()
        stored = os.pread(self._file.fileno(), length, place)
        if not stored.startswith(_START):
            raise ValueError("no JPEG")
        return tiles.start + stored[len(_START) :]

    def _decode(self, tiles: _Tiles, row: int, column: int, kind: _Kind) -> NDArray[np.uint8] | None:
        """A tile's pixels: uint8 (height, width, 3); None where it is of another kind or cannot be decoded."""
        from simplejpeg import decode_jpeg, decode_jpeg_header

        try:
            data = self._bytes(tiles, row, column)
            # Each warning of libjpeg is an error here, as it is to OpenSlide.
            return decode_jpeg(data, strict=True) if decode_jpeg_header(data) == kind else None
        except (OSError, ValueError):
            return None


def open_stored(path: Path, description: "Description", reference: ReadRegion) -> StoredTiles | None:
    """A file's stored tiles; None where none of its levels can be read from them. See `StoredTiles`."""
    if description.format not in FORMATS or description.origin != FILE_ORIGIN or not hasattr(os, "pread"):
        return None
    levels = _find_levels(path, description)
    return StoredTiles(path, levels, reference) if levels else None


def _find_levels(path: Path, description: "Description") -> dict[int, _Tiles]:
    """The levels that are each one page of JPEG tiles, by their numbers."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        tiff = Tiff(path, stream, size)
        if not tiff.big and size >= 2**32:
            return {}
        pages = [page for page in tiff.pages() if TILE_OFFSETS in page and TILE_COUNTS in page]
        places = [[_all(tiff, page, code) for code in (TILE_OFFSETS, TILE_COUNTS)] for page in pages]
        if not all(offsets.shape == counts.shape and counts.all() for offsets, counts in places):
            return {}
        found = {}
        for number, level in enumerate(description.levels):
            same = [at for at, page in enumerate(pages) if _numbers(tiff, page, _WIDTH, _HEIGHT) == level.size]
            # Pages of one size, or a level between whole pixels: only OpenSlide knows what it makes of them.
            if len(same) == 1 and all(down.is_integer() for down in level.downsample):
                tiles = _tiles(tiff, pages[same[0]], level, np.stack(places[same[0]], axis=1))
                if tiles is not None:
                    found[number] = tiles
        return found


def _tiles(tiff: Tiff, page: Page, level: "Level", places: NDArray[np.int64]) -> _Tiles | None:
    """A page's tiles; None where they are not all what libjpeg decodes to 8-bit RGB."""
    across, down = level.block
    colours = _COLOURS.get(_numbers(tiff, page, _PHOTOMETRIC))
    tables = tiff.content(page[_JPEG_TABLES], _MOST_TABLES) if _JPEG_TABLES in page else _START + _END
    if (
        _numbers(tiff, page, _TILE_WIDTH, _TILE_HEIGHT) != level.block
        or not 0 < min(level.block) <= max(level.block) <= _MOST_SIDE
        or len(places) != -(-level.size[0] // across) * -(-level.size[1] // down)
        or _numbers(tiff, page, _COMPRESSION, _SAMPLES) != (7, 3)
        or _numbers(tiff, page, _PLANAR) not in ((), (1,))
        or set(_all(tiff, page, _BITS).tolist()) != {8}
        or colours is None
        or not (tables.startswith(_START) and tables.endswith(_END))
    ):
        return None
    return _Tiles(level.size, (across, down), places, tables[: -len(_END)] + _ADOBE + colours[0], colours[1])


def _all(tiff: Tiff, page: Page, code: int) -> NDArray[np.int64]:
    """All whole numbers of a tag; none where the page has no such tag."""
    parts = list(tiff.values(page[code])) if code in page else []
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


def _numbers(tiff: Tiff, page: Page, *codes: int) -> tuple[int, ...]:
    """The first whole number of each tag, of those that the page has."""
    return tuple(int(values[0]) for code in codes if len(values := _all(tiff, page, code)))
