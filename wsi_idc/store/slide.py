"""A slide's tiles in the store: how they are laid out, written and read.

Tiles are compressed in chunks of about 1 MiB, and 64 chunks make a shard, which is one file: it is written once, as a
whole, by one writer, and has a checksum of its pixels in the slide's record. So what was written does not depend on who
wrote it, and what is read is known to be what was written.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wsi_idc.digests import checksum, digest
from wsi_idc.grid import Grid
from wsi_idc.settings import TileSpec
from wsi_idc.store.node import Node, Record
from wsi_idc.units import Level0Px, Mpp, TilePx

CHUNK_BYTES = 2**20
"""Tiles are compressed and read in chunks of about this size."""
CHUNKS_PER_SHARD = 64
"""Chunks in one file; one writer has it."""
CHUNKS_PER_READ = 8
"""Chunks that are read in one call, each of which costs zarr as much as half a chunk's decoding and more."""
AXES = ("tile", "y", "x", "c")


def tiles_per_chunk(size_px: TilePx) -> int:
    """Tiles that are compressed together: a power of two, so that batches of one share no chunk."""
    return 1 << max(0, (CHUNK_BYTES // (size_px * size_px * 3)).bit_length() - 1)


def tiles_per_shard(size_px: TilePx) -> int:
    """Tiles in one file of the store; blocks of work are whole multiples of it."""
    return tiles_per_chunk(size_px) * CHUNKS_PER_SHARD


class _Complete(BaseModel):
    """The record of a slide whose tiles are all there."""

    model_config = ConfigDict(extra="allow")

    tiles: int = Field(ge=0)
    identity: str
    checksums: dict[str, str | list[str]]
    made_from: dict[str, Any]


class _Attributes(BaseModel):
    """What readers need of a slide's attributes."""

    model_config = ConfigDict(extra="allow")

    patient_id: str
    split: str
    path: str
    tile: TileSpec
    size: tuple[Level0Px, Level0Px]
    mpp: tuple[Mpp, Mpp]
    complete: _Complete


def create_tiles(node: Node, spec: TileSpec, count: int) -> None:
    """Make the array that takes a slide's pixels: uint8 (count, size, size, 3)."""
    side, chunk, shard = spec.size_px, tiles_per_chunk(spec.size_px), tiles_per_shard(spec.size_px)
    shape = (count, side, side, 3)
    node.create("tiles", shape, np.uint8, axes=AXES, chunks=(chunk, *shape[1:]), shards=(shard, *shape[1:]))


def write_shards(
    node: Node, attempt: str, start: int, shards: Iterator[NDArray[np.uint8]]
) -> Iterator[tuple[int, str]]:
    """Write whole shards one after the other.

    Args:
        node: the slide's group.
        attempt: what its `begin` gave.
        start: the first tile, a multiple of the shard's tiles.
        shards: uint8 (m, size, size, 3), each a shard; the slide's last may be shorter.

    Yields:
        tiles written, and the checksum of their pixels.

    Raises:
        StoreBusyError, OvertakenError: see `Node.check`.
    """
    # Else zarr looks through each chunk for any pixel but black, which takes it a quarter of the time.
    array = node.array("tiles", writable=True).with_config({"write_empty_chunks": True})
    for tiles in shards:
        node.check(attempt)
        array[start : start + len(tiles)] = tiles
        start += len(tiles)
        yield len(tiles), checksum(tiles)


def identity(spec: TileSpec, mpp: Sequence[Mpp], cells: str, pixels: Sequence[str] | Mapping[str, Any]) -> str:
    """Differs where a model could give other probabilities: sixteen hex digits.

    Args:
        spec: the tile grid.
        mpp: level-0 um/px (x, y).
        cells: checksum of the cells.
        pixels: the checksum of each shard; or, where pixels are not kept, what they are read from.
    """
    return digest([spec.content(), list(mpp), cells, pixels if isinstance(pixels, Mapping) else list(pixels)])


_PIXELS_FROM = ("source", "reader", "icc")
"""Of what tiles are made from: what their pixels are read from, where they are not kept."""


def pixels_from(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """What the pixels of tiles are read from, where they are not kept; for `identity`."""
    return {name: made_from[name] for name in _PIXELS_FROM if made_from.get(name)}


class StoredSlide:
    """A slide's tiles in the store, read as they are asked for, and checked when they are.

    Args:
        node: the slide's group.
        record: its record, which is usable.

    Raises:
        StoreDamageError: the record lacks something that every slide has.
    """

    def __init__(self, node: Node, record: Record) -> None:
        self.node, self.attributes = node, record.attributes
        try:
            self._known = _Attributes.model_validate(record.attributes)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise node.damaged("zarr.json", f"{name}: {first['msg'].lower()}") from error

    @property
    def slide_id(self) -> str:
        """The slide's id."""
        return self.node.name

    @property
    def patient_id(self) -> str:
        """The patient's id."""
        return self._known.patient_id

    @property
    def split(self) -> str:
        """train, val, test, or empty."""
        return self._known.split

    @property
    def path(self) -> str:
        """The slide's file or folder."""
        return self._known.path

    @property
    def spec(self) -> TileSpec:
        """The tile grid it was cut on."""
        return self._known.tile

    @property
    def mpp(self) -> tuple[Mpp, Mpp]:
        """Level-0 um/px (x, y)."""
        return self._known.mpp

    @property
    def grid(self) -> Grid:
        """Its grid."""
        return Grid(self.spec, self._known.size, self.mpp)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self._known.complete.tiles

    @property
    def made_from(self) -> dict[str, Any]:
        """What its tiles were made from, by name."""
        return self._known.complete.made_from

    @property
    def identity(self) -> str:
        """Differs where a model could give other probabilities."""
        return self._known.complete.identity

    @property
    def has_pixels(self) -> bool:
        """Whether the store holds the tiles' pixels."""
        return "tiles" in self._known.complete.checksums

    def _whole(self, name: str) -> NDArray[Any]:
        expected = self._known.complete.checksums.get(name)
        if not isinstance(expected, str):
            raise self.node.damaged(name, "its checksum is not in the record")
        return self.node.read(name, expected)

    @property
    def cell(self) -> NDArray[np.int32]:
        """int32 (n, 2) of row, column."""
        return self._whole("cell")

    @property
    def position(self) -> NDArray[np.int32]:
        """int32 (n, 2) of level-0 x, y of the top-left pixel."""
        return self._whole("position")

    @property
    def tissue(self) -> NDArray[np.float32]:
        """float32 (n,): part of the tile that is tissue."""
        return self._whole("tissue")

    @property
    def idc(self) -> NDArray[np.float32]:
        """float32 (n,): part of the tile that is IDC by the annotation; NaN where unknown."""
        return self._whole("idc")

    @property
    def blur(self) -> NDArray[np.float32]:
        """float32 (n,): variance of the Laplacian; NaN where pixels were not kept."""
        return self._whole("blur")

    @property
    def pen(self) -> NDArray[np.float32]:
        """float32 (n,): part of the tile that has the colour of ink; NaN where pixels were not kept."""
        return self._whole("pen")

    @property
    def thumbnail(self) -> NDArray[np.uint8]:
        """uint8 (h, w, 3) RGB of the whole slide."""
        return self._whole("thumbnail")

    @property
    def tissue_mask(self) -> NDArray[np.bool_]:
        """bool (h, w), of the thumbnail."""
        return self._whole("tissue_mask")

    def read_tiles(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """The pixels of a range of tiles, some chunks at a time; each shard that is read is checked at its end.

        Who uses pixels for good must have read the range to its end: damage is found there.

        Args:
            start: the first tile, a multiple of the shard's tiles.
            stop: the tile after the last, a multiple of the shard's tiles or the slide's count, which is the default.

        Yields:
            uint8 (m, size, size, 3) RGB.

        Raises:
            StoreDamageError: a shard is not what was written.
        """
        stop = self.count if stop is None else stop
        array = self.node.array("tiles")
        side = self.spec.size_px
        if array.shape != (self.count, side, side, 3) or array.shards is None or array.dtype != np.uint8:
            raise self.node.damaged(
                "tiles", f"its shape is {array.shape}, {self.count} tiles of {side} px are recorded"
            )
        step, shard = array.chunks[0] * CHUNKS_PER_READ, array.shards[0]
        expected = self._known.complete.checksums["tiles"]
        if start % shard or (stop % shard and stop != self.count):
            raise ValueError(f"tiles {start} to {stop} are not whole shards of {shard}")
        for first in range(start, stop, shard):
            last = min(first + shard, stop)
            check = _Checksum((last - first, side, side, 3))
            for place in range(first, last, step):
                with self.node.reading("tiles"):
                    some = np.asarray(array[place : min(place + step, last)])
                check.update(some)
                yield some
            number = first // shard
            if number >= len(expected) or check.hexdigest() != expected[number]:
                raise self.node.damaged("tiles", f"tiles {first} to {last - 1} are not what was written")


class _Checksum:
    """`digests.checksum` of an array that comes in parts."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        from wsi_idc.digests import begin_checksum

        self._sha = begin_checksum(np.dtype(np.uint8), shape)

    def update(self, part: NDArray[np.uint8]) -> None:
        self._sha.update(np.ascontiguousarray(part).data)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()
