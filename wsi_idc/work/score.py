"""The job of `infer`: a slide's tiles into its map in the store."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE, __version__
from wsi_idc.digests import fingerprint
from wsi_idc.errors import (
    AccessError,
    ChangedError,
    ModelError,
    SlideError,
    StoreDamageError,
    StoreError,
)
from wsi_idc.flags import Flag, of_map
from wsi_idc.model.bundle import SHIPPED, Bundle, Form, read_bundle
from wsi_idc.results import strongest
from wsi_idc.settings import TileSpec
from wsi_idc.slides import Slide, open_slide
from wsi_idc.sources import source_of
from wsi_idc.staging import Stage, Wanted, at_hand, drop, unusable
from wsi_idc.store import Node, Store, StoredSlide, Ticket, admit
from wsi_idc.store.ngff import ngff_attributes
from wsi_idc.store.slide import tiles_per_shard
from wsi_idc.versions import installed
from wsi_idc.work.cut import unseen_store
from wsi_idc.work.jobs import Block, Outcome, Prepared, Work

if TYPE_CHECKING:
    from wsi_idc.model.runtime import Pending, Runtime

TILES_PER_BLOCK = 2**14
"""About so many tiles, in whole shards, are scored by one task."""


_LOADING = Lock()


def loaded(folder: Path, form: Form, threads: int) -> "Runtime":
    """The model, loaded once in each process; who asks while it is loaded waits."""
    with _LOADING:
        return _loaded(folder, form, threads)


@lru_cache(maxsize=2)
def _loaded(folder: Path, form: Form, threads: int) -> "Runtime":
    from wsi_idc.model.runtime import load_runtime

    return load_runtime(read_bundle(folder), form, threads)


@dataclass(frozen=True)
class ScoreJob:
    """One slide's probabilities.

    Attributes:
        slide_id: the slide.
        ticket: to write into the store with.
        folder: the bundle's; None: the one that ships, wherever it lies there.
        fields: the bundle's contents when the run was planned.
        form: in which the model runs.
        need: what the map is made from besides the tiles, by name (`LoadedBundle.made_from`).
        batch_size: tiles that go through the model together.
        stage: where a slide whose pixels are not in the store is copied to before it is read; None: it is read where it
            lies.
    """

    slide_id: str
    ticket: Ticket
    folder: Path | None
    fields: Bundle
    form: Form
    need: dict[str, Any]
    batch_size: int
    stage: Stage | None = None

    @property
    def job_id(self) -> str:
        """See `Job.job_id`."""
        return self.slide_id

    @property
    def names(self) -> tuple[str, ...]:
        """See `Job.names`."""
        return (self.slide_id,)

    @property
    def _folder(self) -> Path:
        return self.folder or SHIPPED

    @property
    def _store(self) -> Store:
        return admit(self.ticket)

    @property
    def _node(self) -> Node:
        return self._store.map_node(self.fields.name, self.slide_id)

    @contextmanager
    def _watched(self) -> Iterator[StoredSlide]:
        """The slide; damage that is found in it hides it from every reader, and so is a reason to cut it again."""
        store = self._store
        try:
            yield store.slide(self.slide_id)
        except StoreDamageError as error:
            store.slide_node(self.slide_id).fail(f"{error.subject}: {error.problem}")
            raise

    def prepare(self, work: Work) -> Prepared:
        """Check that the tiles can be had; copy the slide where it is to be copied."""
        with self._watched() as slide, self._opener(slide):
            if not slide.has_pixels and self.stage is None:
                _check_source(slide)
        count, shard = slide.count, tiles_per_shard(slide.spec.size_px)
        step = max(1, TILES_PER_BLOCK // shard) * shard
        return Prepared([Block(start, min(start + step, count)) for start in range(0, count, step)], count)

    @contextmanager
    def _opener(self, slide: StoredSlide) -> Iterator[Callable[[], Slide] | None]:
        """Opens the slide's file, where the store does not have its pixels; None where it has."""
        if slide.has_pixels:
            yield None
            return
        made_from = slide.made_from
        try:
            with at_hand(self.stage, wanted(slide)) as files:
                path = files[source_of(slide.path)]
                yield lambda: open_slide(
                    path, made_from["slide um/px"], made_from["reader"], icc=made_from.get("icc", False)
                )
        except ChangedError as error:
            raise _changed(error.subject) from error

    def run(self, block: Block, info: dict[str, Any], work: Work) -> dict[str, NDArray[np.float32]]:
        """Score a block: what the model says of each tile, float32 (n,) or (n, class), as `alone`; and `blur` and `pen`
        (n,) of tiles whose pixels the store does not have."""
        runtime = loaded(self._folder, self.form, work.capacity.threads)
        blur: list[NDArray[np.float32]] = []
        pen: list[NDArray[np.float32]] = []
        with self._watched() as slide, self._opener(slide) as opener:
            batch = whole_batches(runtime, self.batch_size)
            batches = _batches(slide, opener, block, batch, work.capacity.threads)
            if opener is not None:
                from wsi_idc.tissue import measured

                batches = measured(batches, blur, pen)
            scored = []
            for probability in in_order(runtime, batches):
                scored.append(probability)
                work.report(len(probability))
        found = {"alone": scored, "blur": blur, "pen": pen}
        return {name: np.concatenate(values) for name, values in found.items() if values}

    def finish(self, prepared: Prepared, results: list[dict[str, NDArray[np.float32]]], work: Work) -> Outcome:
        """Write the map and the record that makes it exist."""
        fields = self.fields
        with self._watched() as slide:
            cells = slide.cell
            if not results:
                per_tile = loaded(self._folder, self.form, work.capacity.threads).per_tile
                results = [{"alone": np.zeros((0, *per_tile), np.float32)}]
            found = {name: np.concatenate([result[name] for result in results]) for name in results[0]}
            arrays = map_arrays(fields, self.slide_id, found.pop("alone"), cells, slide.spec)
            if not slide.has_pixels:
                arrays |= found | self._strongest(slide, arrays["probability"])
                drop(self.stage, wanted(slide))
            flagged = self._flags(slide, arrays)
        image = slide.grid.image(cells, arrays["probability"])
        node = self._node
        attempt = node.begin()
        checksums = {name: node.put(name, values, _axes(values)) for name, values in arrays.items()}
        checksums["0"] = node.put("0", image, ("c", "y", "x")[-image.ndim :])
        complete = {
            "tiles": prepared.tiles,
            "positive": _positive(fields, arrays["probability"]),
            "made_from": {"tiles": slide.identity, **self.need},
            "checksums": checksums,
            "versions": versions(self.form),
        }
        about = {
            "model": self._model,
            "slide_id": self.slide_id,
            "patient_id": slide.patient_id,
            "use": USE,
            "flags": [[flag.kind, flag.reason] for flag in flagged],
        }
        channels = fields.classes if image.ndim == 3 else fields.classes[-1:]
        ome = ngff_attributes(slide, fields.name, channels, image.ndim)
        node.commit({**ome, **about, "complete": complete}, attempt)
        return Outcome("done", tiles=prepared.tiles, warnings=tuple(map(str, flagged)))

    @property
    def _model(self) -> dict[str, Any]:
        """What a map says of the model that made it."""
        fields, form = self.fields, self.form
        return {
            "name": fields.name,
            "title": fields.title,
            "file": form.file,
            "digest": form.digest,
            "engine": form.engine,
            "precision": form.precision,
            "device": form.device,
            "classes": list(fields.classes),
            "threshold": fields.operating_point,
        }

    def _flags(self, slide: StoredSlide, arrays: dict[str, NDArray[np.float32]]) -> list[Flag]:
        """What a person should look at; nothing of several classes of which none is positive."""
        fields = self.fields
        if fields.operating_point is None:
            return []
        probability, own = arrays["probability"], arrays.get("alone", arrays["probability"])
        blur, pen = (arrays[name] if name in arrays else getattr(slide, name) for name in ("blur", "pen"))
        return list(of_map(slide, self._model, fields.positive_of(probability), fields.positive_of(own), blur, pen))

    def _strongest(self, slide: StoredSlide, probability: NDArray[np.float32]) -> dict[str, NDArray[np.uint8]]:
        """The pixels of the most probable tiles, which are shown of a slide: its file may be away by then.

        Nothing of several classes of which none is positive.
        """
        if self.fields.positive_index is None or not slide.count:
            return {}
        from wsi_idc.reader import read_tiles

        chosen = strongest(self.fields.positive_of(probability))
        in_order = np.sort(chosen)
        with self._opener(slide) as opener:
            assert opener is not None
            (tiles,) = read_tiles(opener, slide.grid, slide.cell[in_order], batch=len(chosen))
        return {"strongest": tiles[np.searchsorted(in_order, chosen)]}

    def hindrances(self) -> list[str]:
        """See `Job.hindrances`."""
        found = [*unseen_store(self.ticket), *unusable(self.stage)]
        try:
            if self.form.digest not in read_bundle(self._folder).digests():
                found.append(f"{self._folder}: it is another model there; give workers the same one")
        except ModelError as error:
            found.append(f"{error.subject}: {error.problem}; give workers the model, at the same path")
        if not found:
            try:
                _, slide = self._store.look(self.slide_id)
                # One that has yet to be cut is looked at by who cuts it.
                if slide is not None and not slide.has_pixels:
                    _check_source(slide)
            except StoreDamageError:
                pass  # Its job says so, and fails alone.
            except (StoreError, SlideError) as error:
                found.append(f"{error.subject}: {error.problem}; give workers the same slides, by the same paths")
        return found

    def fail(self, reason: str) -> None:
        """See `Job.fail`."""
        self._node.fail(reason)


def _axes(values: NDArray[Any]) -> tuple[str, ...]:
    """What the axes of a map's array are."""
    return ("tile", "y", "x", "c") if values.ndim == 4 else ("tile", "class")[: values.ndim]


def wanted(slide: StoredSlide) -> list[Wanted]:
    """The file of a slide whose pixels are not in the store, as it was when it was extracted."""
    return [(source_of(slide.path), slide.made_from["source"])]


def _check_source(slide: StoredSlide) -> None:
    """Refuse a slide file that is no longer the one whose tissue was found."""
    ((source, content),) = wanted(slide)
    try:
        same = fingerprint(source) == content
    except OSError as error:
        raise AccessError.of(source, error) from error
    if not same:
        raise _changed(source)


def _changed(source: object) -> ChangedError:
    return ChangedError(source, "changed since it was extracted", "run wsi-idc extract again")


def _batches(
    slide: StoredSlide, opener: Callable[[], Slide] | None, block: Block, batch: int, threads: int
) -> Iterator[NDArray[np.uint8]]:
    """Tiles of a block in batches: from the store, or straight from the slide; the same pixels either way."""
    if opener is None:
        yield from _rebatched(slide.read_tiles(block.start, block.stop), batch)
        return
    from wsi_idc.reader import read_tiles

    yield from read_tiles(opener, slide.grid, slide.cell[block.start : block.stop], batch=batch, threads=threads)


def whole_batches(runtime: "Runtime", asked: int) -> int:
    """Tiles to hand to a model at once: as many as asked for, or the next more that leave none of its batches half
    empty, as each costs it the whole."""
    return -(-asked // runtime.batch) * runtime.batch


def in_order(runtime: "Runtime", batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
    """What a model says of each batch, in their order; while one is computed the next are read and begun.

    Args:
        runtime: the model; others may use it at the same time.
        batches: uint8 (n, size, size, 3) each.
    """
    begun: deque[Pending] = deque()
    for tiles in batches:
        begun.append(runtime.begin(tiles))
        if len(begun) > runtime.ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _rebatched(parts: Iterator[NDArray[np.uint8]], batch: int) -> Iterator[NDArray[np.uint8]]:
    """The same tiles in batches of one size, the last one shorter."""
    held: list[NDArray[np.uint8]] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part)
        if count < batch:
            continue
        tiles = held[0] if len(held) == 1 else np.concatenate(held)
        whole = count // batch * batch
        for start in range(0, whole, batch):
            yield tiles[start : start + batch]
        held, count = [tiles[whole:]] if whole < count else [], count - whole
    if count:
        yield np.concatenate(held)


def map_arrays(
    fields: Bundle, slide: str, alone: NDArray[np.float32], cells: NDArray[np.int32], spec: TileSpec
) -> dict[str, NDArray[np.float32]]:
    """What a map holds of each tile, by name: `probability`, and `alone` where neighbours take part in that.

    Args:
        fields: the model's.
        slide: whose tiles they are, for errors.
        alone: float32 (n,) or (n, class), what the model said of each tile.
        cells: int32 (n, 2) of row, column.
        spec: the grid.

    Raises:
        SlideError: what the model said is no number.
    """
    if not np.isfinite(alone).all():
        raise SlideError(slide, f"{fields.name} gave probabilities that are not numbers")
    if not fields.context:
        return {"probability": alone}
    from wsi_idc.model.context import in_context

    return {"alone": alone, "probability": in_context(alone, cells, spec, fields.context)}


def _positive(fields: Bundle, probability: NDArray[np.float32]) -> int | None:
    """Tiles that the model calls positive; None for a model that has no operating point."""
    threshold = fields.operating_point
    return None if threshold is None else int((fields.positive_of(probability) >= threshold).sum())


def versions(form: Form) -> dict[str, str]:
    """What the map was made with."""
    return {"wsi-idc": __version__, **{name: installed(name) for name in (form.engine, "zarr", "numpy")}}
