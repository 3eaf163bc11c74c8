"""What programs call gives what the commands give, holds no slide, and costs nothing until it is asked for."""

import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

import wsi_idc
from wsi_idc.errors import ModelError, ResolutionError, SlideError, StoreError
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings, TileSpec
from wsi_idc.store import open_store

PUBLIC = ["USE", "__version__", "load_model", "open_slide", "open_store", "score"]


def test_the_public_names_are_these_and_no_others():
    assert wsi_idc.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(wsi_idc))
    for name in ("load_model", "open_slide", "open_store", "score"):
        function = getattr(wsi_idc, name)
        assert callable(function) and "Raises:" in function.__doc__
    with pytest.raises(AttributeError, match="module 'wsi_idc' has no attribute 'load_modle'"):
        _ = wsi_idc.load_modle


def test_importing_the_package_costs_nothing_until_something_is_asked_for():
    code = (
        "import sys, wsi_idc; dir(wsi_idc); light = set(sys.modules); wsi_idc.open_slide; "
        "slow = {'torch', 'onnxruntime', 'openvino', 'tiatoolbox', 'dask'}; "
        "assert not light & (slow | {'numpy', 'zarr', 'pydantic'}), light; "
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_types_are_told_to_whoever_uses_the_package():
    assert files("wsi_idc").joinpath("py.typed").is_file()


def infer_and_score(slides, bundle, recorder, settings, **chosen):
    """Each slide by the commands and by the function: (stored slide, stored map, scored)."""
    address = slides.parent / "tiles.zarr"
    extract(read_manifest(slides), address, settings, listener=recorder)
    infer(address, read_bundle(bundle), InferSettings(), listener=recorder)
    store, model = wsi_idc.open_store(address), wsi_idc.load_model(bundle)
    for slide_id in store.slide_ids():
        with wsi_idc.open_slide(slides.parent / f"{slide_id}.tif") as slide:
            scored = wsi_idc.score(slide, model, **chosen)
            assert slide.thumbnail(8.0)[0].ndim == 3  # It stays open.
        yield store.slide(slide_id), store.map(model.fields.name, slide_id), scored


def same(stored, found, scored):
    assert scored.grid == stored.grid and len(scored.cells) > 0
    for name, values in (("cell", scored.cells), ("position", scored.position), ("tissue", scored.tissue)):
        assert np.array_equal(getattr(stored, name), values)
    assert np.array_equal(found.read("probability"), scored.probability)
    assert np.array_equal(found.read("0"), scored.image, equal_nan=True)
    assert found.has("alone") == (scored.alone is not None)
    if scored.alone is not None:
        assert np.array_equal(found.read("alone"), scored.alone)
        assert not np.array_equal(scored.alone, scored.probability)


def test_a_slide_has_the_probabilities_that_extract_and_infer_give_by_the_model_that_ships(slides, recorder):
    for stored, found, scored in infer_and_score(slides, SHIPPED, recorder, ExtractSettings(), threads=2):
        same(stored, found, scored)
        assert scored.threshold == found.attributes["model"]["threshold"]
        assert scored.called.sum() == found.record.complete["positive"]


def test_settings_mean_what_they_mean_to_extract(slides, bundle, recorder):
    spec = TileSpec(stride_px=25, last="drop")
    settings = ExtractSettings(tile=spec, tissue="none", min_tissue=0.0)
    chosen = {"stride_px": 25, "last": "drop", "tissue": "none", "min_tissue": 0.0}
    for stored, found, scored in infer_and_score(slides, bundle, recorder, settings, **chosen):
        same(stored, found, scored)
        assert len(scored.cells) == len(scored.grid)


def test_models_of_several_classes_and_slides_without_tissue_have_their_shapes(tmp_path, make):
    fields = {"name": "three", "classes": ["a", "b", "c"], "outputs": 3}
    three = wsi_idc.load_model(make.write_bundle(tmp_path / "three", **fields))
    with wsi_idc.open_slide(make.tissue_slide(tmp_path / "s.tif")) as slide:
        scored = wsi_idc.score(slide, three)
    assert scored.probability.shape == (len(scored.cells), 3) and scored.image.shape == (3, *scored.grid.shape)
    assert scored.threshold is None
    with pytest.raises(ModelError, match="says not which of 3 classes"):
        _ = scored.called
    glass = make.write_tiff(tmp_path / "glass.tif", np.full((200, 200, 3), 244, np.uint8))
    with wsi_idc.open_slide(glass) as slide:
        for model, shape in ((three, (0, 3)), (wsi_idc.load_model(make.write_bundle(tmp_path / "two")), (0,))):
            empty = wsi_idc.score(slide, model)
            assert empty.probability.shape == shape and np.isnan(empty.image).all()
            assert empty.warnings == ("no tissue found",)


def test_um_px_that_were_given_are_used_for_reading_too(tmp_path, make, bundle):
    path = make.tissue_slide(tmp_path / "s.tif", 1000, 800, margin=200, mpp=None)
    with pytest.raises(ResolutionError, match="the file has no um/px"):
        wsi_idc.open_slide(path)
    with wsi_idc.open_slide(path, 2.0) as slide:
        scored = wsi_idc.score(slide, wsi_idc.load_model(bundle))
    assert scored.grid.extent == (100, 100) and scored.grid.shape == (8, 10)
    assert scored.probability.min() > 0.4


def test_the_slide_is_never_held(tmp_path, make, bundle, monkeypatch):
    from wsi_idc.slides import Slide

    path = make.tissue_slide(tmp_path / "s.tif", 2000, 1600)
    read, largest = Slide.read, []

    def watched(self, level, x, y, width, height):
        largest.append(width * height)
        return read(self, level, x, y, width, height)

    model = wsi_idc.load_model(bundle)
    batches = []
    engine = type(model._runtime)
    begin = engine.begin
    monkeypatch.setattr(Slide, "read", watched)
    monkeypatch.setattr(engine, "begin", lambda self, tiles: batches.append(len(tiles)) or begin(self, tiles))
    with wsi_idc.open_slide(path) as slide:
        scored = wsi_idc.score(slide, model)
    # The thumbnail is read in strips, the tiles in blocks of 512 px.
    assert max(largest) <= 2000 * 1024 < 2000 * 1600
    assert max(batches) == 64 and sum(batches) == len(scored.cells) > 640


def test_a_model_takes_its_own_tiles_and_says_so_of_others(bundle):
    model = wsi_idc.load_model(bundle, "float32", threads=1)
    tiles = np.random.default_rng(0).integers(0, 256, (300, 50, 50, 3)).astype(np.uint8)
    assert model.predict(tiles) == pytest.approx(tiles.mean((1, 2, 3)) / 255, abs=1e-6)
    assert model.form.precision == "float32" and model.fields.name == "mean"
    for wrong in (tiles[:, :40], tiles[0], tiles.astype(np.float32)):
        with pytest.raises(ValueError, match=r"mean takes uint8 \(n, 50, 50, 3\) of 4 um/px, these are"):
            model.predict(wrong)


def test_what_cannot_be_had_is_said_in_one_line(tmp_path, make, bundle):
    with pytest.raises(SlideError, match=r"none\.svs: not found"):
        wsi_idc.open_slide(tmp_path / "none.svs")
    with pytest.raises(StoreError, match="no such store"):
        wsi_idc.open_store(tmp_path / "none.zarr")
    with pytest.raises(ModelError, match=r"bundle\.json"):
        wsi_idc.load_model(tmp_path)
    with pytest.raises(ValueError, match="precision 'int9' is none of auto, float32, int8"):
        wsi_idc.load_model(bundle, "int9")
    with wsi_idc.open_slide(make.tissue_slide(tmp_path / "s.tif", mpp=16.0)) as coarse:
        with pytest.raises(SlideError, match="too coarse"):
            wsi_idc.score(coarse, wsi_idc.load_model(bundle))
        with pytest.raises(ValueError, match="min_tissue"):
            wsi_idc.score(coarse, wsi_idc.load_model(bundle), min_tissue=7)


def test_a_store_that_is_open_is_read_only(slides, bundle, recorder):
    extract(read_manifest(slides), slides.parent / "tiles.zarr", ExtractSettings(), listener=recorder)
    store = wsi_idc.open_store(str(slides.parent / "tiles.zarr"))
    assert not store.held and store.slide_ids() == open_store(slides.parent / "tiles.zarr").slide_ids()
    with pytest.raises(RuntimeError, match="was opened to be read"):
        _ = store.ticket
