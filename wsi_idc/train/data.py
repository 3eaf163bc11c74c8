"""Training tiles: what a store holds, the labelled part of it, and batches in an order that the seed decides."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from wsi_idc.digests import checksum, digest
from wsi_idc.errors import StoreError, UsageError
from wsi_idc.settings import TileSpec
from wsi_idc.store import Store, StoredSlide
from wsi_idc.store.slide import tiles_per_shard

Say = Callable[[str], None]


@dataclass(frozen=True)
class LabelledTiles:
    """Every labelled tile of a store.

    Attributes:
        spec: the grid that all were cut on.
        part: float32 (n,), part of the tile that is IDC.
        slide: str (n,), slide ids.
        patient: str (n,), patient ids; a slide without one is a patient of its own.
        split: str (n,), as in the manifest: train, val, test or empty.
        row: int64 (n,), place in the slide's arrays.
        cell: int32 (n, 2), row and column in the slide's grid.
        unknown: tiles left out because they have no label.
        identity: differs where the tiles differ.
    """

    store: Store
    spec: TileSpec
    part: NDArray[np.float32]
    slide: NDArray[np.str_]
    patient: NDArray[np.str_]
    split: NDArray[np.str_]
    row: NDArray[np.int64]
    cell: NDArray[np.int32]
    unknown: int
    identity: str

    def __len__(self) -> int:
        return len(self.part)

    def positive(self, positive_from: float) -> NDArray[np.bool_]:
        """Bool (n,): the tile's IDC part is at least this."""
        return self.part >= positive_from


def labelled_tiles(store: Store) -> LabelledTiles:
    """The labelled tiles of every complete slide, in the order of the slide ids; no pixels are read.

    Raises:
        StoreError: no slides, no pixels, no labels, or slides cut on different grids.
    """
    names = store.slide_ids()
    if not names:
        raise StoreError(store.address, "has no complete slide", "run wsi-idc extract first")
    columns: dict[str, list[NDArray[Any]]] = {
        "part": [],
        "slide": [],
        "patient": [],
        "split": [],
        "row": [],
        "cell": [],
    }
    unknown, spec, identities = 0, None, []
    for name in names:
        slide = store.slide(name)
        spec = _same_spec(store, spec, slide)
        part = slide.idc
        rows = np.flatnonzero(~np.isnan(part))
        unknown += len(part) - len(rows)
        if len(rows) and not slide.has_pixels:
            raise StoreError(name, "its tiles' pixels were not kept", "extract again without --no-pixels")
        values = {"slide": name, "patient": slide.patient_id or f"slide {name}", "split": slide.split}
        columns["part"].append(part[rows].astype(np.float32))
        columns["row"].append(rows.astype(np.int64))
        columns["cell"].append(slide.cell[rows].reshape(-1, 2))
        for key, value in values.items():
            columns[key].append(np.full(len(rows), value))
        identities.append([name, slide.identity, checksum(part), values["patient"], values["split"]])
    joined = {key: np.concatenate(values) for key, values in columns.items()}
    if not len(joined["part"]):
        advice = "give annotations or labels in the manifest, and extract again"
        raise StoreError(store.address, f"has no labels: the IDC part of all {unknown:,} tiles is unknown", advice)
    assert spec is not None
    return LabelledTiles(store=store, spec=spec, unknown=unknown, identity=digest(identities), **joined)


def _same_spec(store: Store, spec: TileSpec | None, slide: StoredSlide) -> TileSpec:
    if spec is not None and slide.spec != spec:
        problem = f"slides are cut on different grids: {spec}, and {slide.spec} ({slide.slide_id})"
        raise StoreError(store.address, problem, "extract all of them with the same --tile-size and --mpp")
    return slide.spec


def read_pixels(tiles: LabelledTiles, chosen: NDArray[np.int64], cache: Path, limit_bytes: float) -> NDArray[np.uint8]:
    """The pixels of chosen tiles: uint8 (n, size, size, 3) RGB.

    Args:
        tiles: the store's labelled tiles.
        chosen: int64 (n,), places in `tiles`, ascending.
        cache: a file that takes the pixels where they are more than `limit_bytes`; they are then memory-mapped.
        limit_bytes: the most that is kept in memory.
    """
    size = tiles.spec.size_px
    shape = (len(chosen), size, size, 3)
    pixels: NDArray[np.uint8]
    if np.prod(shape, dtype=np.float64) <= limit_bytes:
        pixels = np.empty(shape, np.uint8)
    else:
        cache.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(cache, mode="w+", dtype=np.uint8, shape=shape)
    owners = tiles.slide[chosen]
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]]) if len(chosen) else np.empty(0, np.int64)
    step = tiles_per_shard(size)
    for start, stop in zip(starts, [*starts[1:], len(chosen)], strict=True):
        slide = tiles.store.slide(str(owners[start]))
        rows = tiles.row[chosen[start:stop]]
        for first in range(0, slide.count, step):
            inside = np.flatnonzero((rows >= first) & (rows < first + step))
            if len(inside):
                block = np.concatenate(list(slide.read_tiles(first, min(first + step, slide.count))))
                pixels[start + inside] = block[rows[inside] - first]
    return pixels


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches by their tiles' places: (uint8 (n, size, size, 3), float32 (n,) target)."""

    def __init__(self, pixels: NDArray[np.uint8], targets: NDArray[np.float32]) -> None:
        self.pixels, self.targets = pixels, targets

    def __getitem__(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.pixels[places]), torch.from_numpy(self.targets[places])


class Order(Sampler[NDArray[np.int64]]):
    """Batches of places, shuffled anew each epoch by (seed, epoch); each rank takes every `world`-th place.

    Args:
        count: number of tiles.
        batch_size: tiles in a batch of all ranks together; a last, smaller batch is dropped when shuffling.
        seed: of the shuffle; None keeps the order and drops nothing.
        positive: bool (count,); given, each epoch draws as many positive tiles as negative ones, with replacement.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int | None,
        positive: NDArray[np.bool_] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed, self.positive = count, batch_size, seed, positive
        self.rank, self.world, self.epoch = rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.count // self.batch_size) if self.seed is not None else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = self._order()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world]

    def _order(self) -> NDArray[np.int64]:
        if self.seed is None:
            return np.arange(self.count)
        generator = np.random.default_rng((self.seed, self.epoch))
        if self.positive is None:
            return generator.permutation(self.count)
        groups = (np.flatnonzero(self.positive), np.flatnonzero(~self.positive))
        drawn = [generator.choice(group, size=-(-self.count // 2)) for group in groups]
        return generator.permutation(np.concatenate(drawn))[: self.count]


def check_classes(positive: NDArray[np.bool_], which: str) -> None:
    """Refuse tiles of one class only.

    Raises:
        UsageError: names the side and the class.
    """
    if positive.all() or not positive.any():
        kind = "IDC" if len(positive) and positive.all() else "non-IDC"
        raise UsageError(which, f"all {len(positive):,} labelled tiles are {kind}", "both classes are needed")
