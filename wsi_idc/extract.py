"""Stage 1: from slides to tiles in the store."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc import __version__
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
)
from wsi_idc.digests import checksum, digest, fingerprint
from wsi_idc.errors import AccessError, SlideError
from wsi_idc.grid import Grid
from wsi_idc.manifest import Row
from wsi_idc.plan import Plan, plan
from wsi_idc.settings import ExtractSettings
from wsi_idc.slides import Slide, open_slide

if TYPE_CHECKING:
    from wsi_idc.store import Node, Store

SHARDS_PER_BLOCK = 16
"""Shards that one task writes where several worker processes share a large slide; at a seam between two tasks a row of
stored tiles is decoded by both."""


def wanted(row: Row, settings: ExtractSettings) -> dict[str, Any]:
    """What the tiles of a slide are made from, by the names that a user is told: the reasons to do it again.

    Raises:
        AccessError: the source cannot be read.
    """
    content = settings.content()
    tile = content.pop("tile")
    try:
        return {
            "tile size": tile["size_px"],
            "tile um/px": tile["mpp"],
            "stride": tile["stride_px"],
            "edge rule": tile["last"],
            **{name.replace("_", " "): value for name, value in content.items()},
            "slide um/px": row.mpp,
            "source": fingerprint(row.path),
            "annotation": fingerprint(row.annotation) if row.annotation else None,
            "mask": fingerprint(row.mask) if row.mask else None,
        }
    except OSError as error:
        raise AccessError.of(row.path, error) from error


@dataclass(frozen=True)
class PlannedSlide:
    """A slide of the manifest, what to do with it, and what its tiles would be made from (None: unreadable)."""

    row: Row
    plan: Plan
    made_from: dict[str, Any] | None


def plan_slide(row: Row, store: "Store | None", settings: ExtractSettings, *, force: bool) -> PlannedSlide:
    """What to do with one slide of the manifest."""
    try:
        need = wanted(row, settings)
    except SlideError:
        return PlannedSlide(row, Plan("run", "its source cannot be read"), None)
    if store is None:
        return PlannedSlide(row, plan(need, None, None), need)
    record = store.slide_node(row.slide_id).record()
    return PlannedSlide(row, plan(need, record.made_from, record.failed, force=force), need)


def plan_slides(
    rows: Sequence[Row], store: "Store | None", settings: ExtractSettings, *, force: bool
) -> list[PlannedSlide]:
    """What to do with every slide, in the manifest's order; sources are looked at eight at a time."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as executor:
        return list(executor.map(lambda row: plan_slide(row, store, settings, force=force), rows))


def describe(row: Row) -> dict[str, Any]:
    """The manifest's words about a slide, as they stand in its attributes; they can change without new tiles."""
    return {
        "patient_id": row.patient_id,
        "split": row.split,
        "label": row.label,
        "metadata": row.metadata,
        "path": str(row.path),
    }


def refresh(rows: Sequence[Row], store: "Store") -> None:
    """Bring the attributes of slides that stay as they are up to the manifest."""
    for row in rows:
        node = store.slide_node(row.slide_id)
        attributes = node.record().attributes
        if any(attributes.get(name) != value for name, value in describe(row).items()):
            node.update(describe(row))


def extract(
    rows: Sequence[Row],
    store_path: Path,
    settings: ExtractSettings,
    *,
    force: bool = False,
    listener: Callable[[Sequence[str]], Listener],
) -> Summary:
    """Bring the tiles of every slide up to the manifest and the settings.

    Args:
        rows: the slides.
        store_path: the store; made if there is none.
        settings: what and how.
        force: do again what is up to date.
        listener: is given the slides that will be run, and gives back what is told of their progress.

    Raises:
        StoreError: the store cannot be used.
        StoreBusyError: another run holds it.
    """
    from wsi_idc.store import create_store

    store = create_store(store_path, settings.tile)
    # A slide's own decoding is spread over threads; a second slide under way fills the gaps of opening and masking.
    workers = Workers(processes=settings.workers, threads=1 if settings.workers else 2)
    with store.lock():
        planned = plan_slides(rows, store, settings, force=force)
        refresh([slide.row for slide in planned if slide.plan.action == "skip"], store)
        jobs = [ExtractJob(slide, store_path, settings, workers) for slide in planned if slide.plan.action != "skip"]
        plans = {slide.row.slide_id: slide.plan for slide in planned}
        return execute(workers, plans, jobs, listener([job.job_id for job in jobs]))


def find_tissue(
    slide: Slide, settings: ExtractSettings, mask_path: Path | None, grid: Grid
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int32], NDArray[np.float32]]:
    """Thumbnail, tissue mask, kept cells, and the part of each that is tissue.

    Returns:
        uint8 (h, w, 3); bool (h, w); int32 (n, 2) of row, column, in row order; float32 (n,).
    """
    from wsi_idc.tissue import MASK_MPP, read_mask, tile_fraction, tissue_mask

    thumbnail, mpp = slide.thumbnail(MASK_MPP)
    if slide.patches is not None:
        cells, _ = slide.patches.ready_cells()
        mask = np.zeros(thumbnail.shape[:2], bool)
        scale = np.asarray(mask.shape) / slide.size[::-1]
        for top, left in (grid.position(cells)[:, ::-1] * scale).astype(int).tolist():
            mask[top : top + int(grid.extent[1] * scale[0]), left : left + int(grid.extent[0] * scale[1])] = True
        return thumbnail, mask, cells, np.ones(len(cells), np.float32)
    if mask_path is not None:
        mask = read_mask(mask_path, thumbnail.shape[:2])
    else:
        mask = tissue_mask(thumbnail, mpp, settings.tissue)
    cells = grid.cells()
    tissue = tile_fraction(mask, grid, cells)
    kept = (tissue >= settings.min_tissue) & ((tissue > 0) | (settings.tissue == "none"))
    return thumbnail, mask, cells[kept], tissue[kept]


@dataclass(frozen=True)
class ExtractJob:
    """One slide's extraction."""

    planned: PlannedSlide
    store_path: Path
    settings: ExtractSettings
    workers: Workers

    @property
    def row(self) -> Row:
        """The slide's line of the manifest."""
        return self.planned.row

    @property
    def job_id(self) -> str:
        """See `Job.job_id`."""
        return self.row.slide_id

    @property
    def _node(self) -> "Node":
        from wsi_idc.store import Store

        return Store(self.store_path, read_only=False).slide_node(self.row.slide_id)

    def _open(self) -> Slide:
        return open_slide(self.row.path, self.row.mpp, self.settings.reader)

    def prepare(self) -> Prepared:
        """Find the tissue, and write all that does not need the tiles' pixels."""
        from wsi_idc.reader import check_fit
        from wsi_idc.store import tiles_per_chunk, tiles_per_shard

        made_from = self.planned.made_from or wanted(self.row, self.settings)
        spec = self.settings.tile
        with self._open() as slide:
            grid = Grid(spec, slide.size, slide.mpp)
            warnings = list(slide.warnings)
            warnings += check_fit(slide, grid)
            thumbnail, mask, cells, tissue = find_tissue(slide, self.settings, self.row.mask, grid)
            if not len(cells):
                warnings.append("no tissue found")
            idc = self._labels(slide, grid, cells, warnings)
            about = {
                "format": slide.description.format,
                "reader": slide.description.reader,
                "size": list(slide.size),
                "mpp": list(slide.mpp),
                "mpp_source": slide.mpp_source,
            }
        arrays = {"cell": cells, "position": grid.position(cells), "tissue": tissue, "idc": idc}
        node = self._node
        node.begin()
        for name, values in arrays.items():
            node.put(name, values, ("tile", "axis")[: values.ndim])
        node.put("thumbnail", thumbnail, ("y", "x", "c"))
        node.put("tissue_mask", mask, ("y", "x"))
        count, chunk, shard = len(cells), tiles_per_chunk(spec.size_px), tiles_per_shard(spec.size_px)
        if self.settings.pixels:
            side = spec.size_px
            node.create(
                "tiles",
                (count, side, side, 3),
                np.uint8,
                axes=("tile", "y", "x", "c"),
                chunks=(chunk, side, side, 3),
                shards=(shard, side, side, 3),
            )
        step = count if self.workers.processes <= 1 else shard * SHARDS_PER_BLOCK
        blocks = [Block(start, min(start + step, count)) for start in range(0, count, step)] if count else []
        info = {
            "about": about,
            "made_from": made_from,
            "warnings": warnings,
            "grid": list(grid.shape),
            "checksums": {name: checksum(values) for name, values in arrays.items()},
        }
        return Prepared(blocks if self.settings.pixels else [], count, info)

    def _labels(self, slide: Slide, grid: Grid, cells: NDArray[np.int32], warnings: list[str]) -> NDArray[np.float32]:
        """The part of each tile that is IDC: float32 (n,), NaN where the slide has no annotation."""
        if self.row.annotation is not None:
            from wsi_idc.annotations import idc_fraction

            fractions, told = idc_fraction(
                self.row.annotation,
                self.settings.annotation_class,
                grid,
                cells,
                origin=slide.origin,
                empty=self.settings.empty_annotation,
            )
            warnings += told
            return fractions
        if slide.patches is not None:
            return slide.patches.ready_cells()[1]
        return np.full(len(cells), np.nan, np.float32)

    def run(self, block: Block, info: dict[str, Any]) -> dict[str, Any]:
        """Write the pixels of a block's tiles, shard by shard."""
        from wsi_idc.reader import read_tiles
        from wsi_idc.store import tiles_per_shard
        from wsi_idc.tissue import tile_quality

        node = self._node
        cells = np.asarray(node.array("cell")[block.start : block.stop])
        target = node.array("tiles")
        about = info["about"]
        grid = Grid(self.settings.tile, tuple(about["size"]), tuple(about["mpp"]))
        sha = hashlib.blake2b(digest_size=8)
        blur, pen = [], []
        start = block.start
        shard = tiles_per_shard(self.settings.tile.size_px)
        threads = threads_per_task(self.workers, self.settings.threads)
        for tiles in read_tiles(self._open, grid, cells, batch=shard, threads=threads):
            target[start : start + len(tiles)] = tiles
            sha.update(tiles.data)
            sharpness, ink = tile_quality(tiles)
            blur.append(sharpness)
            pen.append(ink)
            start += len(tiles)
            report_tiles(self.job_id, len(tiles))
        return {"checksum": sha.hexdigest(), "blur": np.concatenate(blur), "pen": np.concatenate(pen)}

    def finish(self, prepared: Prepared, results: list[dict[str, Any]]) -> Outcome:
        """Put the record in place that makes the slide's tiles exist."""
        info = prepared.info
        node = self._node
        unknown = np.full(0 if self.settings.pixels else prepared.tiles, np.nan, np.float32)
        for name in ("blur", "pen"):
            values = np.concatenate([unknown, *(result[name] for result in results)]).astype(np.float32)
            node.put(name, values, ("tile",))
        checksums = {**info["checksums"], "tiles": digest([result["checksum"] for result in results])}
        pixels = checksums["tiles"] if self.settings.pixels else info["made_from"]["source"]
        complete = {
            "tiles": prepared.tiles,
            "grid": info["grid"],
            "made_from": info["made_from"],
            "settings": self.settings.content_hash(),
            "checksums": checksums,
            "identity": digest([info["about"]["mpp"], info["checksums"]["cell"], pixels]),
            "versions": versions(),
        }
        attributes = {**describe(self.row), **info["about"], "tile": self.settings.tile.content()}
        node.commit({**attributes, "warnings": info["warnings"], "complete": complete})
        return Outcome("done", tiles=prepared.tiles, warnings=tuple(info["warnings"]))

    def fail(self, reason: str) -> None:
        """See `Job.fail`."""
        node = self._node
        node.fail(reason)
        node.update(describe(self.row))


def versions() -> dict[str, str]:
    """What the result was made with."""
    from importlib.metadata import version

    packages = ("tiatoolbox", "openslide-python", "openslide-bin", "numpy", "pillow", "zarr")
    return {"wsi-idc": __version__, **{name: version(name) for name in packages}}
