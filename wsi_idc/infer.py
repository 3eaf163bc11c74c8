"""Stage 2: from tiles to one probability map a slide."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE, __version__
from wsi_idc.cluster import (
    Block,
    Listener,
    Outcome,
    Prepared,
    Summary,
    Workers,
    execute,
    report_tiles,
    threads_per_task,
    visible_gpus,
)
from wsi_idc.digests import checksum, fingerprint
from wsi_idc.errors import SlideError
from wsi_idc.model.bundle import LoadedBundle, read_bundle
from wsi_idc.model.config import Context
from wsi_idc.plan import Plan, plan
from wsi_idc.settings import InferSettings, Precision
from wsi_idc.slides import Slide, open_slide

if TYPE_CHECKING:
    from wsi_idc.model.runtime import Runtime
    from wsi_idc.store import Node, Store, StoredSlide

TILES_PER_BLOCK = 2**14
"""Tiles that one task scores. A constant, and a multiple of every batch size that is a power of two, so that a tile is
scored in the same batch whatever the workers."""


@dataclass(frozen=True)
class ModelChoice:
    """A bundle, and which of its graphs runs where.

    Attributes:
        folder: the bundle.
        name: its name; the folder of its maps.
        file: the graph or the weights that run.
        digest: of that file.
        precision: of the graph on the CPU.
        cuda: whether torch runs it on a GPU.
        context: how neighbours take part in a tile's probability; None where they do not.
    """

    folder: Path
    name: str
    file: str
    digest: str
    precision: Precision
    cuda: bool
    context: Context | None = None


def choose_model(bundle: LoadedBundle, settings: InferSettings) -> ModelChoice:
    """Which graph runs, checked by loading it once.

    Raises:
        ModelError: it cannot run.
    """
    cuda = settings.gpus > 0
    form, fields = bundle.form(settings.precision, cuda=cuda), bundle.fields
    choice = ModelChoice(bundle.folder, fields.name, form.file, form.digest, settings.precision, cuda, fields.context)
    if not cuda:
        # With the threads that a task will have: in this process it is then loaded already when the first one runs.
        load_runtime(choice, threads_per_task(Workers(settings.workers), settings.threads))
    return choice


@lru_cache(maxsize=2)
def load_runtime(choice: ModelChoice, threads: int) -> "Runtime":
    """The model, loaded once in each process."""
    from wsi_idc.model import runtime

    bundle = read_bundle(choice.folder)
    return runtime.load_runtime(bundle, bundle.form(choice.precision, cuda=choice.cuda), threads)


def wanted(slide: "StoredSlide", choice: ModelChoice) -> dict[str, Any]:
    """What a map is made from, by the names that a user is told."""
    context = choice.context.model_dump() if choice.context else None
    return {"tiles": slide.identity, "model": choice.digest, "context": context}


def plan_maps(
    store: "Store", bundle: LoadedBundle, choice: ModelChoice, *, only: Sequence[str], force: bool
) -> dict[str, Plan]:
    """What to do with every slide whose tiles are complete, or with those of `only`.

    Raises:
        ModelError: the model does not fit the store.
        StoreError: one of `only` is not extracted.
    """
    bundle.check_fits(store.spec)
    plans = {}
    for name in sorted(set(only)) or store.slide_ids():
        slide = store.slide(name)
        record = store.map_node(choice.name, name).record()
        plans[name] = plan(wanted(slide, choice), record.made_from, record.failed, force=force)
    return plans


def infer(
    store_path: Path,
    bundle: LoadedBundle,
    settings: InferSettings,
    *,
    only: Sequence[str] = (),
    force: bool = False,
    listener: Callable[[Sequence[str]], Listener],
) -> Summary:
    """Bring the map of every slide in the store up to its tiles and the model.

    Args:
        store_path: the store.
        bundle: the model.
        settings: how.
        only: slide ids to which it is limited; all where empty.
        force: do again what is up to date.
        listener: is given the slides that will be run, and gives back what is told of their progress.

    Raises:
        ModelError: the model cannot run, or does not fit the store.
        StoreError: the store cannot be used, or one of `only` is not in it.
        StoreBusyError: another run holds it.
    """
    from wsi_idc.store import open_store

    workers = Workers(settings.workers, settings.gpus)
    if settings.gpus:
        visible_gpus(settings.gpus)
    choice = choose_model(bundle, settings)
    store = open_store(store_path, read_only=False)
    with store.lock():
        plans = plan_maps(store, bundle, choice, only=only, force=force)
        todo = [name for name, plan in plans.items() if plan.action != "skip"]
        jobs = [InferJob(name, store_path, choice, settings, workers) for name in todo]
        return execute(workers, plans, jobs, listener(todo))


@dataclass(frozen=True)
class InferJob:
    """One slide's probabilities."""

    slide_id: str
    store_path: Path
    choice: ModelChoice
    settings: InferSettings
    workers: Workers

    @property
    def job_id(self) -> str:
        """See `Job.job_id`."""
        return self.slide_id

    @property
    def _store(self) -> "Store":
        from wsi_idc.store import Store

        return Store(self.store_path, read_only=False)

    @property
    def _node(self) -> "Node":
        return self._store.map_node(self.choice.name, self.slide_id)

    def prepare(self) -> Prepared:
        """Check that the tiles fit the model and can be had."""
        slide = self._store.slide(self.slide_id)
        bundle = read_bundle(self.choice.folder)
        try:
            bundle.check_fits(slide.spec)
        except Exception as error:
            raise SlideError(self.slide_id, str(error)) from error
        if not slide.has_pixels:
            self._check_source(slide)
        count = slide.count
        blocks = [Block(start, min(start + TILES_PER_BLOCK, count)) for start in range(0, count, TILES_PER_BLOCK)]
        return Prepared(blocks, count)

    def _check_source(self, slide: "StoredSlide") -> None:
        """Refuse a slide file that is no longer the one whose tissue was found."""
        path = Path(slide.attributes["path"])
        try:
            same = fingerprint(path) == slide.attributes["complete"]["made_from"]["source"]
        except OSError as error:
            raise SlideError(path, f"cannot be read ({error.strerror or error})", "check the file") from error
        if not same:
            raise SlideError(path, "changed since it was extracted", "run wsi-idc extract again")

    def _tiles(self, slide: "StoredSlide", block: Block) -> Iterator[NDArray[np.uint8]]:
        """Tiles of a block in batches: from the store, or straight from the slide; the same pixels either way."""
        batch = self.settings.batch_size
        if not slide.has_pixels:
            from wsi_idc.reader import read_tiles

            made_from = slide.attributes["complete"]["made_from"]

            def opener() -> Slide:
                return open_slide(Path(slide.attributes["path"]), made_from["slide um/px"])

            threads = threads_per_task(self.workers, self.settings.threads)
            yield from read_tiles(
                opener, slide.grid, slide.cell[block.start : block.stop], batch=batch, threads=threads
            )
            return
        tiles = slide.tiles
        step = max(batch, tiles.chunks[0] // batch * batch)
        for start in range(block.start, block.stop, step):
            some = np.asarray(tiles[start : min(start + step, block.stop)])
            for offset in range(0, len(some), batch):
                yield some[offset : offset + batch]

    def run(self, block: Block, info: dict[str, Any]) -> NDArray[np.float32]:
        """Score a block; reading the next batch and scoring this one overlap."""
        slide = self._store.slide(self.slide_id)
        runtime = load_runtime(self.choice, threads_per_task(self.workers, self.settings.threads))
        batches = self._tiles(slide, block)
        scored = []
        with ThreadPoolExecutor(1, thread_name_prefix="read") as executor:
            coming = executor.submit(next, batches, None)
            while (tiles := coming.result()) is not None:
                coming = executor.submit(next, batches, None)
                scored.append(runtime.predict(tiles))
                report_tiles(self.job_id, len(tiles))
        return np.concatenate(scored)

    def finish(self, prepared: Prepared, results: list[NDArray[np.float32]]) -> Outcome:
        """Write the map and the record that makes it exist."""
        slide = self._store.slide(self.slide_id)
        bundle = read_bundle(self.choice.folder)
        probability = np.concatenate([np.zeros(0, np.float32), *results])
        if not np.isfinite(probability).all():
            raise SlideError(self.slide_id, f"{self.choice.name} gave probabilities that are not numbers")
        image = np.full(slide.grid.shape, np.nan, np.float32)
        cells = slide.cell
        node = self._node
        node.begin()
        if self.choice.context:
            from wsi_idc.model.context import in_context

            node.put("alone", probability, ("tile",))
            probability = in_context(probability, cells, slide.spec, self.choice.context)
        image[cells[:, 0], cells[:, 1]] = probability
        node.put("probability", probability, ("tile",))
        node.put("0", image, ("y", "x"))
        threshold = bundle.fields.operating_point
        complete = {
            "tiles": prepared.tiles,
            "positive": None if threshold is None else int((bundle.fields.positive_of(probability) >= threshold).sum()),
            "made_from": wanted(slide, self.choice),
            "checksums": {"probability": checksum(probability)},
            "versions": versions(self.choice),
        }
        about = {
            "model": {
                "name": self.choice.name,
                "title": bundle.fields.title,
                "file": self.choice.file,
                "digest": self.choice.digest,
                "precision": "float16" if self.choice.cuda else self.choice.precision,
                "threshold": threshold,
            },
            "slide_id": self.slide_id,
            "patient_id": slide.patient_id,
            "use": USE,
        }
        node.commit({"ome": ngff_image(slide, self.choice.name), **about, "complete": complete})
        return Outcome("done", tiles=prepared.tiles)

    def fail(self, reason: str) -> None:
        """See `Job.fail`."""
        self._node.fail(reason)


def ngff_image(slide: "StoredSlide", name: str) -> dict[str, Any]:
    """OME-NGFF 0.5 metadata of a map (https://ngff.openmicroscopy.org/0.5/).

    A pixel of the map is a cell of the grid, so the scale is the stride. The translation is the centre of the first
    tile as seen from the centre of the slide's first pixel: viewers put a pixel's centre at its coordinate, and so map
    and slide lie on each other.
    """
    spec = slide.spec
    pitch = spec.stride_px * spec.mpp
    side = spec.size_px * spec.mpp
    x, y = slide.attributes["mpp"]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in ("y", "x")]
    transforms = [
        {"type": "scale", "scale": [pitch, pitch]},
        {"type": "translation", "translation": [(side - y) / 2, (side - x) / 2]},
    ]
    datasets = [{"path": "0", "coordinateTransformations": transforms}]
    return {"version": "0.5", "multiscales": [{"name": f"P(IDC) {name}", "axes": axes, "datasets": datasets}]}


def versions(choice: ModelChoice) -> dict[str, str]:
    """What the map was made with."""
    from importlib.metadata import version

    package = "onnxruntime" if choice.file.endswith(".onnx") else "torch"
    return {"wsi-idc": __version__, package: version(package), "zarr": version("zarr"), "numpy": version("numpy")}
