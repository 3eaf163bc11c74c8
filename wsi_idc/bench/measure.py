"""The measurements: each by the code that a run goes through, on one slide and with one model."""

import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.bench.figures import ROUNDS, Clock, Figure, rates, times
from wsi_idc.bench.subject import Model, Sampled, Scratch, grid_of
from wsi_idc.cores import cores
from wsi_idc.extract import OVERLAP
from wsi_idc.grid import Grid
from wsi_idc.manifest import Row
from wsi_idc.model.bundle import Form
from wsi_idc.reader import read_tiles
from wsi_idc.settings import CutSettings
from wsi_idc.store import Store, hold_store
from wsi_idc.store.slide import create_tiles, tiles_per_shard, write_shards
from wsi_idc.survey import middle, open_row
from wsi_idc.tissue import MASK_MPP, measured, tile_quality
from wsi_idc.work import places
from wsi_idc.work.cut import CutJob, find_tissue, made_from
from wsi_idc.work.jobs import Work
from wsi_idc.work.score import in_order, loaded, whole_batches

_CELLS = 2**14
"""Tiles of a slide that are read again and again: those in the middle."""
_WORKER_BYTES = 700_000_000
"""That a worker process takes, before it is known: no more are started than there is memory for."""
_GLASS = 244
_TURNS = 3
"""In which ways of running are measured."""


@dataclass(frozen=True)
class Reading:
    """Tiles of a slide, as a run reads them that keeps no pixels.

    Attributes:
        row: the slide.
        cut: how it is cut.
        grid: its grid.
        cells: int32 (n, 2) of row, column.
        batch: tiles in each batch.
    """

    row: Row
    cut: CutSettings
    grid: Grid
    cells: NDArray[np.int32] = field(repr=False)
    batch: int

    def batches(self, threads: int) -> Iterator[NDArray[np.uint8]]:
        """All of them once: see `read_tiles`."""
        opener = lambda: open_row(self.row, self.cut)  # noqa: E731
        return read_tiles(opener, self.grid, self.cells, batch=self.batch, threads=threads)


def reading_of(one: Sampled, cut: CutSettings, batch: int) -> Reading:
    """The tiles of a slide that was looked at."""
    return Reading(one.row, cut, grid_of(one, cut), middle(one.cells, _CELLS), batch)


def over_and_over(
    make: Callable[[], Iterator[NDArray[np.uint8]]], stopped: Event | None = None
) -> Generator[NDArray[np.uint8], None, None]:
    """Batches without end, or until it is stopped: what `make` gives, made anew each time that it ends."""
    while True:
        for tiles in make():
            if stopped is not None and stopped.is_set():
                return
            yield tiles


def decoding(reading: Reading, threads: int, seconds: float, clock: Clock) -> Figure:
    """Reading tiles, and nothing else."""
    with closing(over_and_over(lambda: reading.batches(threads))) as batches:
        return Figure("decode", "tiles/s", rates(map(len, batches), seconds, clock), threads=threads)


def scoring(
    runtime: Any,
    make: Callable[[], Iterator[NDArray[np.uint8]]],
    threads: int,
    seconds: float,
    clock: Clock,
    rounds: int = ROUNDS,
) -> tuple[float, ...]:
    """Tiles a second that a model scores of batches, which may have to be read first."""
    stopped = Event()
    flow = in_order(runtime, over_and_over(make, stopped))
    try:
        return rates(map(len, flow), seconds, clock, at_once=threads, rounds=rounds)
    finally:
        stopped.set()
        deque(flow, maxlen=0)  # What is under way would slow down what is measured next.


def measure_kinds(found: Sequence[Sampled], cut: CutSettings, batch: int, seconds: float) -> Iterator[Sampled]:
    """All but the first of some slides, with how fast tiles of other kinds than the first one's are decoded."""
    known: dict[tuple[str, float], Figure | None] = {found[0].surveyed.kind: None}
    for one in found[1:]:
        kind = one.surveyed.kind
        if len(one.cells) and kind not in known:
            known[kind] = decoding(reading_of(one, cut, batch), 1, seconds, time.perf_counter)
        yield replace(one, decode=known.get(kind))


def form_name(form: Form) -> str:
    """A form as a user reads it: engine, precision, and the device where it is not the CPU."""
    return f"{form.engine} {form.precision}" + (f" on {form.device}" if form.device != "cpu" else "")


def cut_at_once(reading: Reading, slides: int) -> None:
    """Find a slide's tissue as often at once as slides are cut in one process, for the memory that this takes."""

    def find(_: int) -> None:
        mask = reading.row.mask if isinstance(reading.row.mask, Path) else None
        with open_row(reading.row, reading.cut) as slide:
            find_tissue(slide, reading.cut, mask, reading.grid)

    with ThreadPoolExecutor(slides) as executor:
        deque(executor.map(find, range(slides)), maxlen=0)


def together(reading: Reading, folder: Path, form: Form, threads: int, seconds: float) -> tuple[tuple[float, ...], int]:
    """Read, judge and score tiles as a run does that keeps no pixels.

    Returns:
        tiles a second; and the most bytes that this process ever held.
    """
    runtime = loaded(folder, form, threads)
    reading = replace(reading, batch=whole_batches(runtime, reading.batch))

    def make() -> Iterator[NDArray[np.uint8]]:
        return measured(reading.batches(threads), [], [])

    # In one piece: where a slide is opened anew, what was under way goes on, and comes at once afterwards.
    return scoring(runtime, make, threads, seconds, time.perf_counter, rounds=1), _most_memory()


def _most_memory() -> int:
    """The most bytes that this process ever held; where the system does not say, those that it holds."""
    # Not what getrusage says: a process inherits that from the one that started it.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)


class Bench:
    """The measurements of one slide and one model, in their order.

    Args:
        one: the slide.
        model: how it is cut, and the model.
        scratch: where is written.
        seconds: how long each goes on.
        batch: tiles scored together.
        gpus: how many are used.
        free: bytes of memory that are free.
        clock: what times are taken from.

    Attributes:
        notes: what could not be measured, a line each.
    """

    def __init__(
        self,
        one: Sampled,
        model: Model,
        scratch: Scratch,
        *,
        seconds: float,
        batch: int,
        gpus: int = 0,
        free: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        # The id names a folder of the scratch store: whatever the slide's file is called.
        self._one = replace(one, row=replace(one.row, slide_id="slide"))
        self._model, self._scratch, self._seconds = model, scratch, seconds
        self._batch, self._gpus, self._free, self._clock = batch, gpus, free, clock
        self._reading = reading_of(self._one, model.cut, batch)
        self._tiles = np.empty(0, np.uint8)
        self._probability = np.empty(0, np.float32)
        self.notes: list[str] = []

    def steps(self) -> Iterator[tuple[str, Callable[[], Iterator[Figure]]]]:
        """What is done, in a few words, and what does it; to be called before the next is asked for."""
        with ExitStack() as stack:
            yield "running a slide without tissue", self._start
            yield "opening the slide and finding its tissue", self._slide
            store = stack.enter_context(hold_store(self._scratch.folder / "tiles.zarr", create=True))
            if self._one.surveyed.exact:
                yield "extracting it without pixels", lambda: self._cut(store)
            yield "decoding tiles", self._decode
            for form in self._model.forms:
                yield f"scoring tiles ({form.engine}, {form.precision})", partial(self._score, form)
            if self._model.form is not None and self._one.surveyed.exact:
                yield "making its map", lambda: self._map(store)
            yield "writing and reading a store", lambda: self._store(store)
        if self._model.form is not None:
            yield "decoding and scoring in other processes", self._together

    def _threads(self) -> list[int]:
        return sorted({1, cores()})

    def _times(self, what: Any, work: Callable[[], object], **about: Any) -> Figure:
        return Figure(what, "s", times(work, self._seconds, self._clock), **about)

    def _start(self) -> Iterator[Figure]:
        """A run in a process of its own: what it costs besides its slides."""
        import tifffile

        folder, tile = self._scratch.folder, self._model.cut.tile
        pixels, resolution = np.full((256, 256, 3), _GLASS, np.uint8), 1e4 / tile.mpp
        place = {"resolution": (resolution, resolution), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(folder / "glass.tif", pixels, photometric="rgb", tile=(256, 256), metadata=None, **place)
        (folder / "glass.csv").write_text("path\nglass.tif\n", encoding="utf-8")
        lines = ["[extract]", f"tile_size = {tile.size_px}", f"mpp = {float(tile.mpp)}"]
        if self._model.bundle is not None:
            # A string of JSON is one of TOML.
            lines.insert(0, f"model = {json.dumps(str(self._model.bundle.folder.absolute()))}")
        (folder / "wsi-idc.toml").write_text("\n".join(lines), encoding="utf-8")
        command, numbers = "extract" if self._model.bundle is None else "run", count()

        def work() -> None:
            self._scratch.run(command, "glass.csv", "--store", f"glass-{next(numbers)}.zarr", "-q")

        yield self._times("start", work)

    def _slide(self) -> Iterator[Figure]:
        row, cut, surveyed = self._one.row, self._model.cut, self._one.surveyed
        yield self._times("open", lambda: open_row(row, cut).close())
        if not surveyed.exact:
            self.notes.append("The slide has no coarse level: what finding its tissue takes is told by a part of it.")
            yield Figure("tissue", "s", (surveyed.seconds,))
            return
        mask = row.mask if isinstance(row.mask, Path) else None
        with open_row(row, cut) as slide:
            yield self._times("thumbnail", lambda: slide.thumbnail(MASK_MPP))
            yield self._times("tissue", lambda: find_tissue(slide, cut, mask, self._reading.grid))

    def _cut(self, store: Store) -> Iterator[Figure]:
        job = CutJob(self._one.row, store.ticket, self._model.cut, made_from(self._one.row, self._model.cut))
        yield self._times("cut", lambda: job.finish(job.prepare(Work()), [], Work()))

    def _decode(self) -> Iterator[Figure]:
        for threads in self._threads():
            yield decoding(self._reading, threads, self._seconds, self._clock)
        self._tiles = self._some_tiles()
        judged = times(lambda: tile_quality(self._tiles), self._seconds, self._clock)
        yield Figure("judge", "tiles/s", tuple(len(self._tiles) / value for value in judged), threads=1)

    def _some_tiles(self) -> NDArray[np.uint8]:
        """What is scored, written and read: at most a shard, and as many as are read in the time."""
        most, found, begun = tiles_per_shard(self._model.cut.tile.size_px), list[NDArray[np.uint8]](), self._clock()
        for tiles in self._reading.batches(cores()):
            found.append(tiles)
            if sum(map(len, found)) >= most or self._clock() - begun >= self._seconds:
                break
        return np.concatenate(found)[:most]

    def _score(self, form: Form) -> Iterator[Figure]:
        from wsi_idc.model.runtime import load_runtime

        assert self._model.bundle is not None
        name = form_name(form)

        for threads in self._threads() if form.device == "cpu" else [cores()]:
            start = self._clock()
            runtime = load_runtime(self._model.bundle, form, threads)
            scored = runtime.predict(self._tiles[:1])
            if threads == 1 or form.device != "cpu":
                yield Figure("load", "s", (self._clock() - start,), form=name)
            if not self._probability.size:
                self._probability = scored
            batch = whole_batches(runtime, self._batch)
            batches = [self._tiles[start : start + batch] for start in range(0, len(self._tiles), batch)]
            found = scoring(runtime, partial(iter, batches), threads, self._seconds, self._clock)
            yield Figure("score", "tiles/s", found, form=name, threads=threads)

    def _map(self, store: Store) -> Iterator[Figure]:
        """All that a slide's map costs besides scoring its tiles."""
        from wsi_idc import infer
        from wsi_idc.settings import InferSettings

        bundle, form, number = self._model.bundle, self._model.form, len(self._one.cells)
        assert bundle is not None and form is not None
        blur, pen = tile_quality(self._tiles)
        alone = np.resize(self._probability, (number, *self._probability.shape[1:]))
        found = {"alone": alone, "blur": np.resize(blur, number), "pen": np.resize(pen, number)}
        settings = InferSettings(batch_size=self._batch)
        with closing(infer.Scoring(store, bundle, form, settings, infer.PlannedMaps())) as work:
            job = work.job(self._one.row.slide_id)
            yield self._times("map", lambda: job.finish(job.prepare(Work()), [found], Work()))

    def _store(self, store: Store) -> Iterator[Figure]:
        """Tiles of a whole slide, to the flush of what was written, and back with their checksums."""
        tile, grid, tiles = self._model.cut.tile, self._reading.grid, self._tiles
        node = store.slide_node("written")
        about: dict[str, Any] = {"patient_id": "", "split": "", "path": "", "tile": tile.content()}
        about |= {"size": list(grid.size), "mpp": list(grid.mpp)}

        def write() -> None:
            attempt = node.begin()
            create_tiles(node, tile, len(tiles))
            checksums = [checksum for _, checksum in write_shards(node, attempt, 0, iter([tiles]))]
            complete = {"tiles": len(tiles), "identity": "", "checksums": {"tiles": checksums}, "made_from": {}}
            node.commit({**about, "complete": complete}, attempt)

        def read() -> None:
            deque(store.slide("written").read_tiles(), maxlen=0)

        for what, work in (("write", write), ("read", read)):
            taken = times(work, self._seconds, self._clock)
            yield Figure(what, "tiles/s", tuple(len(tiles) / value for value in taken))  # type: ignore[arg-type]

    def _together(self) -> Iterator[Figure]:
        """One process by threads, and several side by side; each a fresh one, so that its memory is its own.

        In turns, so that what else the machine does falls on all of them.
        """
        bundle, form = self._model.bundle, self._model.form
        assert bundle is not None and form is not None
        workers = self._gpus or max(1, min(cores(), int(self._free / _WORKER_BYTES)))
        if workers < cores() and not self._gpus:
            self.notes.append(f"Memory is short: {workers} worker processes were measured, not {cores()}.")
        import dask

        start, share = self._clock(), places.threads_of(workers)
        with (
            dask.config.set({"temporary-directory": str(self._scratch.folder)}),
            places.local(workers=0 if self._gpus else workers, gpus=self._gpus) as place,
        ):
            names = list(place.client.scheduler_info(n_workers=-1)["workers"])

            def call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
                place.workers = [name]
                return place.submit(0, function, self._reading, *arguments)

            def measure(some: Sequence[str], threads: int, seconds: float) -> list[tuple[tuple[float, ...], int]]:
                begun = [call(name, together, bundle.folder.absolute(), form, threads, seconds) for name in some]
                return [future.result() for future in begun]

            measure(names, share, 0.0)
            yield Figure("workers", "s", (self._clock() - start,), workers=workers)
            if self._one.surveyed.exact:
                for begun in [call(name, cut_at_once, 1 if number else OVERLAP) for number, name in enumerate(names)]:
                    begun.result()
            ways = [(names[:1], threads, 0) for threads in self._threads()]
            ways += [(names, share, workers)] if workers > 1 or self._gpus else []
            values: list[list[float]] = [[] for _ in ways]
            memory = [0 for _ in ways]
            for _ in range(_TURNS):
                for number, (some, threads, _) in enumerate(ways):
                    found = measure(some, threads, self._seconds / _TURNS)
                    values[number] += map(sum, zip(*(each for each, _ in found), strict=False))
                    # The first one has cut several slides at once, as only one process alone does.
                    memory[number] = len(some) * min(most for _, most in found)
        for (_, threads, side), each, most in zip(ways, values, memory, strict=True):
            yield Figure("together", "tiles/s", tuple(each), threads=threads, workers=side, memory=most)
