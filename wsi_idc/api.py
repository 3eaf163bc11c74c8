"""What programs call: a slide, a store, a model, and a slide scored by a model without a store.

`wsi_idc` gives these by name: `from wsi_idc import open_slide, open_store, load_model, score`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from wsi_idc import slides, store
from wsi_idc.grid import Grid
from wsi_idc.model.bundle import SHIPPED, Bundle, Form, LoadedBundle, read_bundle
from wsi_idc.model.runtime import Runtime, load_runtime
from wsi_idc.settings import CutSettings, InferSettings, LastTile, Precision, TileSpec, TissueMethod
from wsi_idc.slides import Slide
from wsi_idc.store import Store
from wsi_idc.units import Mpp, TilePx

__all__ = ["Model", "Scored", "load_model", "open_slide", "open_store", "score"]


def open_slide(path: str | Path, mpp: float | None = None) -> Slide:
    """Open a slide of any format that `extract` reads.

    Args:
        path: a file; or a folder: DICOM, OME-NGFF, or an IDC patient's patches.
        mpp: level-0 um/px to use whatever the file says.

    Returns:
        An open slide, a context manager: `size` in level-0 pixels (width, height), `mpp` in um/px (x, y), `levels`,
        `read(level, x, y, width, height)` and `thumbnail(mpp)`; pixels are uint8 RGB on a background colour.

    Raises:
        SlideError: it is no slide, is damaged, or its um/px is absent or impossible: one line says which.
        MemoryError: there is none for it.
    """
    return slides.open_slide(Path(path), None if mpp is None else Mpp(mpp))


def open_store(address: str | Path) -> Store:
    """Open a store to be read; nothing in it is changed.

    Args:
        address: a folder, or `s3://BUCKET/PREFIX`.

    Returns:
        The store: `slide_ids()`, `slide(slide_id)` with its tiles, `models()`, and `map(model, slide_id)` with its
        probabilities. What is read is checked against what was written.

    Raises:
        StoreError: it does not exist, cannot be read, or has another format.
    """
    return store.open_store(address)


class Model:
    """A model that is ready to run: a function from uint8 tiles to probabilities.

    Attributes:
        fields: its bundle.json: name, classes, tile size and um/px, threshold, context.
        form: the file that it runs from, and how.
    """

    def __init__(self, bundle: LoadedBundle, form: Form, runtime: Runtime) -> None:
        self._bundle, self._runtime = bundle, runtime
        self.form = form

    @property
    def fields(self) -> Bundle:
        """The contents of its bundle.json."""
        return self._bundle.fields

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probabilities of tiles, each by its own pixels.

        Args:
            tiles: uint8 (n, size, size, 3) RGB, of the size and um/px of `fields.tile`; resizing, contrast and
                normalisation are in the model.

        Returns:
            float32 (n,), that of the second of two classes; or (n, class).

        Raises:
            ValueError: tiles of another shape or dtype.
        """
        side = self.fields.tile.size_px
        if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[1:] != (side, side, 3):
            wanted = f"uint8 (n, {side}, {side}, 3) of {self.fields.tile.mpp:g} um/px"
            raise ValueError(f"{self.fields.name} takes {wanted}, these are {tiles.dtype} {tiles.shape}")
        return self._runtime.predict(tiles)


def load_model(folder: str | Path | None = None, precision: Precision = "auto", threads: int = 0) -> Model:
    """Load a model, to be run on the CPU.

    Args:
        folder: a bundle; None: the model that ships.
        precision: "auto" (int8 where the bundle has it), "float32" or "int8".
        threads: of the CPU; 0: one a core.

    Raises:
        ModelError: the bundle cannot be used; names the field or file that is wrong.
        ValueError: no such precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} is none of {', '.join(get_args(Precision))}")
    bundle = read_bundle(SHIPPED if folder is None else Path(folder))
    form = bundle.form(precision)
    return Model(bundle, form, load_runtime(bundle, form, threads))


@dataclass(frozen=True)
class Scored:
    """A slide's probabilities, as `infer` would write them.

    Attributes:
        fields: the model's bundle.json.
        grid: the slide's tile grid.
        cells: int32 (n, 2) of row, column of each tile with tissue, in row order.
        tissue: float32 (n,): part of the tile that is tissue.
        probability: float32 (n,), P(IDC) by the second of two classes; or (n, class). The neighbours' part is in it,
            where the model lets them take part.
        alone: float32 (n,): the same by the tile's own pixels; None by a model whose tiles' neighbours take no part.
        warnings: lines about the slide that a user should see.
    """

    fields: Bundle
    grid: Grid
    cells: NDArray[np.int32]
    tissue: NDArray[np.float32]
    probability: NDArray[np.float32]
    alone: NDArray[np.float32] | None
    warnings: tuple[str, ...]

    @property
    def threshold(self) -> float | None:
        """From which P(positive) a tile is positive; None by a model that has no positive class."""
        return self.fields.operating_point

    @property
    def called(self) -> NDArray[np.bool_]:
        """bool (n,): the tiles at or above the threshold.

        Raises:
            ModelError: the model has several classes, none of them positive.
        """
        return np.asarray(self.fields.positive_of(self.probability) >= (self.threshold or 0.0))

    @property
    def position(self) -> NDArray[np.int32]:
        """int32 (n, 2): level-0 x, y of each tile's top-left pixel, from the slide's origin."""
        return self.grid.position(self.cells)

    @cached_property
    def image(self) -> NDArray[np.float32]:
        """The map: float32 (rows, columns), or (class, rows, columns); NaN where there is no tile."""
        return self.grid.image(self.cells, self.probability)


def score(
    slide: Slide,
    model: Model | None = None,
    *,
    tissue: TissueMethod = "default",
    min_tissue: float = 0.05,
    mask: str | Path | None = None,
    stride_px: int | None = None,
    last: LastTile = "keep",
    threads: int = 1,
) -> Scored:
    """Score a slide without a store: the probabilities that `extract` and `infer` give with the same settings.

    Tissue is found and tiles are cut as `extract` does it, at the model's tile size and um/px. Tiles are read and
    scored in batches: the slide is never held.

    Args:
        slide: an open slide; it stays open, and is opened again for each thread that decodes.
        model: what `load_model` gave; None: the model that ships.
        tissue: how tissue is found: "default", "otsu", "morphological" or "none".
        min_tissue: least part of a tile that is tissue.
        mask: a picture of what is tissue, which replaces `tissue`.
        stride_px: tile pixels from one tile to the next; None: the tile's side.
        last: "keep" or "drop" tiles over the slide's right and lower edge.
        threads: that decode.

    Raises:
        SlideError: the slide cannot be read, or is too coarse for the model.
        ModelError: the model cannot be used, or gave what is no probability.
        ValueError: a setting out of its range.
    """
    from wsi_idc.reader import check_fit, read_tiles
    from wsi_idc.work.cut import find_tissue
    from wsi_idc.work.score import in_order, map_arrays

    if threads < 1:
        raise ValueError(f"threads is {threads}: give 1 or more")
    model = load_model() if model is None else model
    side, mpp = model.fields.tile.size_px, model.fields.tile.mpp
    spec = TileSpec(size_px=side, mpp=mpp, stride_px=TilePx(side if stride_px is None else stride_px), last=last)
    settings = CutSettings(tile=spec, tissue=tissue, min_tissue=min_tissue)
    grid = Grid(spec, slide.size, slide.mpp)
    warnings = [*slide.warnings, *check_fit(slide, grid)]
    _, _, cells, part = find_tissue(slide, settings, None if mask is None else Path(mask), grid)
    if not len(cells):
        warnings.append("no tissue found")
    given = slide.mpp[0] if slide.mpp_source == "given" else None
    batches = read_tiles(
        lambda: slides.open_slide(slide.path, given), grid, cells, batch=InferSettings().batch_size, threads=threads
    )
    none = model.predict(np.empty((0, side, side, 3), np.uint8))
    alone = np.concatenate([none, *in_order(model._runtime, batches)])
    arrays = map_arrays(model.fields, str(slide.path), alone, cells, spec)
    return Scored(model.fields, grid, cells, part, arrays["probability"], arrays.get("alone"), tuple(warnings))
