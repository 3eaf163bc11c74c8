"""The job of `extract`: a slide into tiles in the store."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wsi_idc import __version__
from wsi_idc.digests import fingerprint
from wsi_idc.errors import AccessError, SlideError, WsiIdcError, system_reason
from wsi_idc.grid import Grid
from wsi_idc.manifest import Row
from wsi_idc.settings import CutSettings
from wsi_idc.slides import Slide, open_slide
from wsi_idc.sources import Source
from wsi_idc.sources import version as version_of
from wsi_idc.staging import Stage, Wanted, at_hand, drop, unusable
from wsi_idc.store import Node, Ticket, admit
from wsi_idc.store.slide import create_tiles, identity, pixels_from, tiles_per_shard, write_shards
from wsi_idc.versions import installed
from wsi_idc.work.jobs import Block, Outcome, Prepared, Work

SHARDS_PER_BLOCK = 16
"""Shards that one task writes where several workers share a large slide; at a seam between two tasks a row of stored
tiles is decoded by both."""


Seen: TypeAlias = dict[str, list[str]]
"""URL -> the version that was looked at, and its fingerprint: one question, where looking costs some thirty."""


def made_from(row: Row, settings: CutSettings, seen: Seen | None = None) -> dict[str, Any]:
    """What the tiles of a slide are made from, by the names that a user is told: the reasons to do it again.

    Args:
        row: the slide.
        settings: how it is cut.
        seen: what is known of its objects; brought up to date.

    Raises:
        SlideError: the source is missing, or (AccessError) cannot be read.
    """
    if row.missing:
        raise SlideError(row.path, row.missing, "correct the manifest or bring the file back")
    content = settings.content()
    tile = content.pop("tile")
    seen = {} if seen is None else seen

    def fingerprint_of(source: Source) -> str:
        if not (now := version_of(source)):
            return fingerprint(source)
        known = seen.get(str(source))
        if not (isinstance(known, list) and len(known) == 2 and known[0] == now):
            known = seen[str(source)] = [now, fingerprint(source)]
        return known[1]

    try:
        return {
            "tile size": tile["size_px"],
            "tile um/px": tile["mpp"],
            "stride": tile["stride_px"],
            "edge rule": tile["last"],
            **{name.replace("_", " "): value for name, value in content.items()},
            "slide um/px": row.mpp,
            "source": fingerprint_of(row.path),
            "annotation": fingerprint_of(row.annotation) if row.annotation else None,
            "mask": fingerprint_of(row.mask) if row.mask else None,
        }
    except OSError as error:
        raise AccessError.of(error.filename or row.path, error) from error


def describe(row: Row, seen: Seen) -> dict[str, Any]:
    """The manifest's words about a slide, as they stand in its attributes; they can change without new tiles.

    And what is known of its objects, of those that it still has.
    """
    urls = {str(url) for url in row.urls}
    return {
        **({"seen": {url: known for url, known in seen.items() if url in urls}} if urls else {}),
        "patient_id": row.patient_id,
        "split": row.split,
        "label": row.label,
        "metadata": row.metadata,
        "path": str(row.path),
    }


def find_tissue(
    slide: Slide, settings: CutSettings, mask_path: Path | None, grid: Grid, found: dict[str, Any] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int32], NDArray[np.float32]]:
    """Thumbnail, tissue mask, kept cells, and the part of each that is tissue.

    Args:
        slide: the slide.
        settings: how it is cut.
        mask_path: the manifest's mask.
        grid: the slide's grid.
        found: is given how that came about: the attributes `tissue_steps` and `stain` (docs/store.md).

    Returns:
        uint8 (h, w, 3); bool (h, w); int32 (n, 2) of row, column, in row order; float32 (n,).
    """
    from wsi_idc.tissue import MASK_MPP, read_mask, stain, tile_fraction, tissue_mask

    thumbnail, mpp = slide.thumbnail(MASK_MPP)
    steps: dict[str, float] = {}

    def tell(method: str, mask: NDArray[np.bool_], touched: int, kept: int) -> None:
        part = round(np.count_nonzero(mask) / max(1, mask.size), 6)
        about = {"method": method, "steps": steps, "tissue": part, "tiles_with_tissue": touched, "tiles_kept": kept}
        if found is not None:
            found.update(tissue_steps=about, stain=stain(thumbnail, mask))

    if slide.patches is not None:
        cells, _ = slide.patches.ready_cells()
        mask = np.zeros(thumbnail.shape[:2], bool)
        scale = np.asarray(mask.shape) / slide.size[::-1]
        for top, left in (grid.position(cells)[:, ::-1] * scale).astype(int).tolist():
            mask[top : top + int(grid.extent[1] * scale[0]), left : left + int(grid.extent[0] * scale[1])] = True
        tell("patches", mask, len(cells), len(cells))
        return thumbnail, mask, cells, np.ones(len(cells), np.float32)
    if mask_path is not None:
        mask = read_mask(mask_path, thumbnail.shape[:2])
    else:
        mask = tissue_mask(thumbnail, mpp, settings.tissue, steps)
    cells = grid.cells()
    tissue = tile_fraction(mask, grid, cells)
    kept = (tissue >= settings.min_tissue) & ((tissue > 0) | (settings.tissue == "none"))
    tell("mask" if mask_path is not None else settings.tissue, mask, int((tissue > 0).sum()), int(kept.sum()))
    return thumbnail, mask, cells[kept], tissue[kept]


@dataclass(frozen=True)
class CutJob:
    """One slide's tiles.

    Attributes:
        row: the slide's line of the manifest.
        ticket: to write into the store with.
        settings: what the tiles depend on.
        made_from: what they would be made from; None where the source could not be read.
        stage: where the slide is copied to before it is read; None: it is read where it lies.
        seen: what is known of its objects.
    """

    row: Row
    ticket: Ticket
    settings: CutSettings
    made_from: dict[str, Any] | None
    stage: Stage | None = None
    seen: Seen = field(default_factory=dict, hash=False)

    @property
    def job_id(self) -> str:
        """See `Job.job_id`."""
        return self.row.slide_id

    @property
    def names(self) -> tuple[str, ...]:
        """See `Job.names`."""
        return (self.row.slide_id, str(self.row.path))

    @property
    def _node(self) -> Node:
        return admit(self.ticket).slide_node(self.row.slide_id)

    def _wanted(self, need: Mapping[str, Any]) -> list[Wanted]:
        """The slide, its annotation and its mask, as they were when the run was planned."""
        files = {"source": self.row.path, "annotation": self.row.annotation, "mask": self.row.mask}
        return [(file, need[name]) for name, file in files.items() if file is not None]

    def _open(self, path: Path) -> Slide:
        return open_slide(path, self.row.mpp, self.settings.reader, icc=self.settings.icc)

    def prepare(self, work: Work) -> Prepared:
        """Find the tissue, and write all that does not need the tiles' pixels."""
        from wsi_idc.reader import check_fit

        need = self.made_from or made_from(self.row, self.settings)
        spec = self.settings.tile
        with at_hand(self.stage, self._wanted(need)) as files, self._open(files[self.row.path]) as slide:
            grid = Grid(spec, slide.size, slide.mpp)
            warnings = [*slide.warnings, *check_fit(slide, grid)]
            mask_path = files[self.row.mask] if self.row.mask is not None else None
            found: dict[str, Any] = {}
            thumbnail, mask, cells, tissue = find_tissue(slide, self.settings, mask_path, grid, found)
            if not len(cells):
                warnings.append("no tissue found")
            annotation = files[self.row.annotation] if self.row.annotation is not None else None
            idc = self._labels(slide, annotation, grid, cells, warnings)
            about = {
                "format": slide.description.format,
                "reader": slide.description.reader,
                "size": list(slide.size),
                "mpp": list(slide.mpp),
                "mpp_source": slide.mpp_source,
                "mpp_file": None if slide.description.mpp is None else list(slide.description.mpp),
                "origin": list(slide.origin),
                "icc": None if slide.icc is None else {"profile": slide.icc, "applied": slide.icc_applied},
                "damage": slide.damage,
                **found,
            }
        node = self._node
        attempt = node.begin()
        arrays = {"cell": cells, "position": grid.position(cells), "tissue": tissue, "idc": idc}
        checksums = {name: node.put(name, values, ("tile", "axis")[: values.ndim]) for name, values in arrays.items()}
        checksums["thumbnail"] = node.put("thumbnail", thumbnail, ("thumbnail_y", "thumbnail_x", "c"))
        checksums["tissue_mask"] = node.put("tissue_mask", mask, ("thumbnail_y", "thumbnail_x"))
        info = {
            "attempt": attempt,
            "about": about,
            "made_from": need,
            "warnings": warnings,
            "grid": list(grid.shape),
            "checksums": checksums,
        }
        if not self.settings.pixels:
            return Prepared([], len(cells), info)
        create_tiles(node, spec, len(cells))
        return Prepared(self._blocks(len(cells), work), len(cells), info)

    def _blocks(self, count: int, work: Work) -> list[Block]:
        """Whole shards, so that whoever writes them writes the same; one block where there is nobody to share with."""
        step = count if work.capacity.workers == 1 else tiles_per_shard(self.settings.tile.size_px) * SHARDS_PER_BLOCK
        return [Block(start, min(start + step, count)) for start in range(0, count, step)] if count else []

    def _labels(
        self, slide: Slide, annotation: Path | None, grid: Grid, cells: NDArray[np.int32], warnings: list[str]
    ) -> NDArray[np.float32]:
        """The part of each tile that is IDC: float32 (n,), NaN where the slide has no annotation."""
        if annotation is not None:
            from wsi_idc.annotations import idc_fraction

            fractions, told = idc_fraction(
                annotation,
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

    def run(self, block: Block, info: dict[str, Any], work: Work) -> dict[str, Any]:
        """Write the pixels of a block's tiles, shard by shard."""
        from wsi_idc.reader import read_tiles
        from wsi_idc.tissue import measured

        node, about = self._node, info["about"]
        cells = node.read("cell", info["checksums"]["cell"])[block.start : block.stop]
        grid = Grid(self.settings.tile, tuple(about["size"]), tuple(about["mpp"]))
        shard = tiles_per_shard(self.settings.tile.size_px)
        blur: list[NDArray[np.float32]] = []
        pen: list[NDArray[np.float32]] = []

        checksums = []
        with at_hand(self.stage, self._wanted(info["made_from"])) as files:
            path = files[self.row.path]
            tiles = read_tiles(lambda: self._open(path), grid, cells, batch=shard, threads=work.capacity.threads)
            shards = measured(tiles, blur, pen)
            for count, checksum in write_shards(node, info["attempt"], block.start, shards):
                checksums.append(checksum)
                work.report(count)
        return {"checksums": checksums, "blur": np.concatenate(blur), "pen": np.concatenate(pen)}

    def finish(self, prepared: Prepared, results: list[dict[str, Any]], work: Work) -> Outcome:
        """Put the record in place that makes the slide's tiles exist."""
        info, node, pixels = prepared.info, self._node, self.settings.pixels
        if pixels:
            # Else it is read again to be scored; where it is not, who planned the run deletes it.
            drop(self.stage, self._wanted(info["made_from"]))
        checksums: dict[str, Any] = dict(info["checksums"])
        unknown = np.full(0 if pixels else prepared.tiles, np.nan, np.float32)
        for name in ("blur", "pen"):
            values = np.concatenate([unknown, *(result[name] for result in results)]).astype(np.float32)
            checksums[name] = node.put(name, values, ("tile",))
        if pixels:
            checksums["tiles"] = [checksum for result in results for checksum in result["checksums"]]
        complete = {
            "tiles": prepared.tiles,
            "grid": info["grid"],
            "made_from": info["made_from"],
            "settings": self.settings.content_hash(),
            "checksums": checksums,
            "identity": identity(
                self.settings.tile,
                info["about"]["mpp"],
                checksums["cell"],
                checksums["tiles"] if pixels else pixels_from(info["made_from"]),
            ),
            "versions": versions(),
        }
        attributes = {**describe(self.row, self.seen), **info["about"], "tile": self.settings.tile.content()}
        node.commit({**attributes, "warnings": info["warnings"], "complete": complete}, info["attempt"])
        unapplied = info["about"]["icc"] is not None and not self.settings.icc
        return Outcome(
            "done",
            tiles=prepared.tiles,
            warnings=tuple(info["warnings"]),
            notes=("an ICC profile is there and was not applied (--icc applies it)",) if unapplied else (),
        )

    def drop(self) -> None:
        """Delete what was copied for it on this host."""
        if self.made_from is not None:
            drop(self.stage, self._wanted(self.made_from))

    def hindrances(self) -> list[str]:
        """See `Job.hindrances`."""
        found = [*unseen_store(self.ticket), *unusable(self.stage)]
        try:
            # What nobody could read when the run was planned fails by itself.
            if self.made_from is not None and made_from(self.row, self.settings, dict(self.seen)) != self.made_from:
                found.append(f"{self.row.path}: it is another file there; give workers the same slides")
        except SlideError as error:
            found.append(f"{error.subject}: {error.problem}; give workers the same slides, by the same paths")
        return found

    def fail(self, reason: str) -> None:
        """See `Job.fail`."""
        node = self._node
        node.fail(reason)
        node.update(describe(self.row, self.seen))


def unseen_store(ticket: Ticket) -> list[str]:
    """Why this process cannot write into the store that a run holds: it sees another one, none, or may not."""
    try:
        store = admit(ticket)
        if not store.held:
            return [f"{ticket.address}: the store is not there; put it where the client and all workers see the same"]
        store.try_writing()
    except (OSError, WsiIdcError) as error:
        return [f"{ticket.address}: {system_reason(error) if isinstance(error, OSError) else error.problem}"]
    return []


def versions() -> dict[str, str]:
    """What the result was made with."""
    packages = ("tiatoolbox", "openslide-python", "openslide-bin", "numpy", "pillow", "zarr")
    return {"wsi-idc": __version__, **{name: installed(name) for name in packages}}
