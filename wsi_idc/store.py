"""The tile store: one Zarr v3 group on a file system, and the one rule that it lives by.

A slide's result (or its map) exists when its group's attributes hold the record `complete`, which is put in place last,
by one atomic write, after every array is whole. Anything else is invisible to readers and cleared by the next run; so
there is no state file to disagree with the data, and every command can be killed anywhere and run again. A failure is
kept in the record `failed`, for `status`; it hides an older result, and the next success removes it.

    STORE/                       attributes: format, tile
      slides/<slide_id>/         tiles, position, cell, tissue, blur, pen, idc, thumbnail, tissue_mask
      maps/<model>/<slide_id>/   0, probability

`docs/architecture.md` has the arrays with dtypes and shapes.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from wsi_idc.errors import StoreBusyError, StoreError
from wsi_idc.grid import Grid
from wsi_idc.settings import TileSpec

FORMAT = "wsi-idc-store/1"
LOCK = ".wsi-idc.lock"
CHUNK_BYTES = 2**20
"""Tiles are compressed and read in chunks of about this size."""
CHUNKS_PER_SHARD = 64
"""Chunks in one file; one writer has it."""


def tiles_per_chunk(size_px: int) -> int:
    """Tiles that are compressed together."""
    return max(1, CHUNK_BYTES // (size_px * size_px * 3))


def tiles_per_shard(size_px: int) -> int:
    """Tiles in one file of the store; blocks of work are whole multiples of it."""
    return tiles_per_chunk(size_px) * CHUNKS_PER_SHARD


@dataclass(frozen=True)
class Record:
    """What one group of the store says of itself.

    Attributes:
        attributes: the group's attributes; empty where there is no group.
    """

    attributes: Mapping[str, Any]

    @property
    def complete(self) -> dict[str, Any] | None:
        """The record of a whole result, also of one that a later failure hides."""
        return self.attributes.get("complete")

    @property
    def made_from(self) -> dict[str, Any] | None:
        """What the whole result was made from, by name; None where there is none."""
        return None if self.complete is None else self.complete["made_from"]

    @property
    def failed(self) -> str | None:
        """Why the last attempt failed, or None."""
        return self.attributes.get("failed")

    @property
    def usable(self) -> bool:
        """Whether readers may see the result."""
        return self.complete is not None and self.failed is None


class Node:
    """One group of the store, of a slide or a map: opened lazily, written by the rule above."""

    def __init__(self, store: "Store", path: str) -> None:
        self.store, self.path = store, path

    @property
    def folder(self) -> Path:
        """Where the group lies."""
        return self.store.path / self.path

    @cached_property
    def group(self) -> zarr.Group:
        """The Zarr group."""
        return zarr.open_group(self.folder, mode="r" if self.store.read_only else "a", zarr_format=3)

    def record(self) -> Record:
        """What the group says of itself, read afresh."""
        if not (self.folder / "zarr.json").is_file():
            return Record({})
        try:
            return Record(dict(zarr.open_group(self.folder, mode="r", zarr_format=3).attrs))
        except (ValueError, KeyError, OSError) as error:
            raise StoreError(self.folder, f"damaged metadata ({error})", "remove that folder and run again") from error

    def begin(self) -> None:
        """Clear what an earlier run left: first out of sight, then off the disk."""
        (self.folder / "zarr.json").unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.__dict__.pop("group", None)
        zarr.create_group(self.folder, zarr_format=3)

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: Any,
        *,
        axes: Sequence[str],
        chunks: tuple[int, ...],
        shards: tuple[int, ...] | None = None,
    ) -> zarr.Array[Any]:
        """Make an empty array, missing values being NaN or 0, its axes named."""
        fill = float("nan") if np.issubdtype(np.dtype(dtype), np.floating) else 0
        return self.group.create_array(
            name, shape=shape, dtype=dtype, chunks=chunks, shards=shards, fill_value=fill, dimension_names=axes
        )

    def put(self, name: str, values: NDArray[Any], axes: Sequence[str]) -> None:
        """Make an array that is written at once, as one chunk."""
        chunks = tuple(max(1, side) for side in values.shape)
        array = self.create(name, values.shape, values.dtype, axes=axes, chunks=chunks)
        if values.size:
            array[...] = values

    def array(self, name: str) -> zarr.Array[Any]:
        """An array of the group."""
        array = self.group[name]
        assert isinstance(array, zarr.Array)
        return array

    def commit(self, attributes: Mapping[str, Any]) -> None:
        """Make the result visible: `attributes`, with `complete` in it, in one atomic write."""
        assert "complete" in attributes
        self.group.attrs.put(dict(attributes))

    def update(self, attributes: Mapping[str, Any]) -> None:
        """Replace some attributes of a result that stays as it is."""
        self.group.attrs.put({**self.record().attributes, **attributes})

    def fail(self, reason: str) -> None:
        """Keep why the last attempt failed; an older result is kept beside it, out of readers' sight.

        What a broken attempt left is removed: on a full disk the next slides need the room.
        """
        kept = self.record().attributes
        if "complete" not in kept and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.__dict__.pop("group", None)
        self.group.attrs.put({**kept, "failed": reason})


class StoredSlide:
    """A slide's tiles in the store, read as they are asked for."""

    def __init__(self, node: Node, attributes: Mapping[str, Any]) -> None:
        self.node, self.attributes = node, attributes

    @property
    def slide_id(self) -> str:
        """The slide's id."""
        return self.node.folder.name

    @property
    def patient_id(self) -> str:
        """The patient's id."""
        return str(self.attributes["patient_id"])

    @property
    def split(self) -> str:
        """train, val, test, or empty."""
        return str(self.attributes["split"])

    @property
    def spec(self) -> TileSpec:
        """The tile grid it was cut on."""
        return TileSpec(**self.attributes["tile"])

    @property
    def grid(self) -> Grid:
        """Its grid."""
        width, height = self.attributes["size"]
        x, y = self.attributes["mpp"]
        return Grid(self.spec, (width, height), (x, y))

    @property
    def count(self) -> int:
        """Number of tiles."""
        return int(self.attributes["complete"]["tiles"])

    @property
    def has_pixels(self) -> bool:
        """Whether the store holds the tiles' pixels."""
        return "tiles" in self.node.group

    @property
    def tiles(self) -> zarr.Array[Any]:
        """uint8 (n, size, size, 3) RGB, on disk; read it in slices of whole chunks."""
        return self.node.array("tiles")

    def _whole(self, name: str) -> NDArray[Any]:
        return np.asarray(self.node.array(name)[...])

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
    def identity(self) -> str:
        """Differs where a model could give other probabilities."""
        return str(self.attributes["complete"]["identity"])


class Store:
    """A tile store. Make one with `create_store` or `open_store`."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path, self.read_only = path, read_only

    @property
    def spec(self) -> TileSpec:
        """The tile grid of the last extract."""
        return TileSpec(**zarr.open_group(self.path, mode="r", zarr_format=3).attrs["tile"])  # type: ignore[arg-type]

    def slide_node(self, slide_id: str) -> Node:
        """The group of a slide."""
        return Node(self, f"slides/{slide_id}")

    def map_node(self, model: str, slide_id: str) -> Node:
        """The group of a slide's map."""
        return Node(self, f"maps/{model}/{slide_id}")

    def _names(self, folder: str) -> list[str]:
        place = self.path / folder
        return sorted(child.name for child in place.iterdir() if child.is_dir()) if place.is_dir() else []

    def all_slide_ids(self) -> list[str]:
        """Every slide that was ever tried."""
        return self._names("slides")

    def slide_ids(self) -> list[str]:
        """Every slide whose tiles are complete."""
        return [name for name in self.all_slide_ids() if self.slide_node(name).record().usable]

    def models(self) -> list[str]:
        """Every model with a map in the store."""
        return self._names("maps")

    def slide(self, slide_id: str) -> StoredSlide:
        """A slide's tiles.

        Raises:
            StoreError: they are not complete.
        """
        node = self.slide_node(slide_id)
        record = node.record()
        if not record.usable:
            raise StoreError(slide_id, "not extracted", "run wsi-idc extract")
        return StoredSlide(node, record.attributes)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for writing.

        Raises:
            StoreBusyError: another run holds it.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise StoreBusyError(self.path, "another run holds the store", "wait for it, or use --store") from error
        try:
            yield
        finally:
            lock.release()


def open_store(path: Path, *, read_only: bool = True) -> Store:
    """A store that exists.

    Raises:
        StoreError: it does not, or is another format.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(path, "no such store", "run wsi-idc extract first, or name one with --store")
    try:
        found = zarr.open_group(path, mode="r", zarr_format=3).attrs.get("format")
    except (FileNotFoundError, ValueError, KeyError, NotADirectoryError) as error:
        raise StoreError(path, "not a tile store", "name the folder that wsi-idc extract wrote") from error
    if found != FORMAT:
        raise StoreError(path, f"not a tile store of this version (format {found!r}, {FORMAT!r} is read)")
    return Store(path, read_only=read_only)


def create_store(path: Path, spec: TileSpec) -> Store:
    """The store at a path, made if there is none, its grid set to `spec`.

    Raises:
        StoreError: something else is there, or the place cannot be written.
    """
    path = Path(path)
    try:
        if not path.exists() or (path.is_dir() and not any(child.name != LOCK for child in path.iterdir())):
            path.mkdir(parents=True, exist_ok=True)
            zarr.create_group(path, zarr_format=3, attributes={"format": FORMAT, "tile": spec.content()})
        store = open_store(path, read_only=False)
        if store.spec != spec:
            zarr.open_group(path, mode="a", zarr_format=3).attrs.put({"format": FORMAT, "tile": spec.content()})
    except OSError as error:
        raise StoreError(path, f"cannot be written ({error.strerror or error})", "choose another --store") from error
    return store
