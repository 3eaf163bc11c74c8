"""From tiles to maps: the same probabilities by every way, in the right place."""

import json

import numpy as np
import pytest

from wsi_idc.errors import ModelError, StoreError
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings, TileSpec
from wsi_idc.store import open_store


@pytest.fixture
def extracted(slides, recorder):
    def run(**settings):
        rows = read_manifest(slides)[:2]
        path = slides.parent / "tiles.zarr"
        extract(rows, path, ExtractSettings(**settings), listener=recorder)
        return path

    return run


def score(path, bundle, recorder, settings=None, **options):
    summary = infer(path, read_bundle(bundle), settings or InferSettings(), listener=recorder, **options)
    return summary, open_store(path)


def probabilities(store, slide_id, model="mean"):
    return np.asarray(store.map_node(model, slide_id).array("probability")[...])


def test_each_tile_has_its_probability_at_its_cell(extracted, bundle, recorder):
    summary, store = score(extracted(), bundle, recorder)
    assert (summary.done, summary.tiles) == (2, 24 + 48)
    slide, node = store.slide("a"), store.map_node("mean", "a")
    expected = np.asarray(slide.tiles[:]).reshape(24, -1).mean(1) / 255
    assert np.allclose(probabilities(store, "a"), expected, atol=1e-5)
    image = np.asarray(node.array("0")[...])
    assert image.shape == slide.grid.shape == (8, 10)
    assert np.array_equal(image[tuple(slide.cell.T)], probabilities(store, "a"))
    assert np.isnan(image).sum() == 80 - 24
    record = node.record()
    assert record.complete["positive"] == int((probabilities(store, "a") >= 0.5).sum())
    assert record.attributes["model"]["name"] == "mean"
    assert "Not for diagnosis" in record.attributes["use"]


def test_the_map_is_valid_ome_ngff_and_lies_where_the_tiles_are(extracted, bundle, recorder, tmp_path):
    import warnings

    from yaozarrs import validate_zarr_store

    _, store = score(extracted(), bundle, recorder)
    node = store.map_node("mean", "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate_zarr_store(str(node.folder))
    (image,) = node.record().attributes["ome"]["multiscales"]
    scale, translation = image["datasets"][0]["coordinateTransformations"]
    assert scale == {"type": "scale", "scale": [200.0, 200.0]}
    assert translation == {"type": "translation", "translation": [98.0, 98.0]}
    assert [axis["unit"] for axis in image["axes"]] == ["micrometer", "micrometer"]


def test_with_overlapping_tiles_the_maps_pixel_is_the_stride(extracted, bundle, recorder):
    _, store = score(extracted(tile=TileSpec(stride_px=25)), bundle, recorder)
    (image,) = store.map_node("mean", "a").record().attributes["ome"]["multiscales"]
    scale, translation = image["datasets"][0]["coordinateTransformations"]
    assert (scale["scale"], translation["translation"]) == ([100.0, 100.0], [98.0, 98.0])


def test_tiles_from_the_store_and_straight_from_the_slide_score_the_same(extracted, bundle, recorder):
    _, store = score(extracted(), bundle, recorder)
    stored = {name: probabilities(store, name) for name in "ab"}
    _, store = score(extracted(pixels=False), bundle, recorder)
    assert not store.slide("a").has_pixels
    for name, values in stored.items():
        assert np.array_equal(probabilities(store, name), values)


def test_without_pixels_a_slide_that_changed_since_is_refused(extracted, bundle, recorder, make, slides):
    path = extracted(pixels=False)
    make.tissue_slide(slides.parent / "a.tif", seed=77)
    (slides.parent / "b.tif").unlink()
    summary, _ = score(path, bundle, recorder)
    assert "changed since it was extracted" in summary.failures["a"]
    assert "cannot be read" in summary.failures["b"]


@pytest.mark.parametrize("settings", [{"workers": 2}, {"batch_size": 7}, {"threads": 1}])
def test_how_it_runs_does_not_change_a_probability(extracted, bundle, recorder, settings):
    path = extracted()
    _, store = score(path, bundle, recorder)
    before = probabilities(store, "b")
    summary, store = score(path, bundle, recorder, InferSettings(**settings), force=True)
    assert summary.done == 2
    assert np.array_equal(probabilities(store, "b"), before)


def test_the_second_run_does_nothing_and_changes_are_reasons(extracted, bundle, recorder, make, slides):
    path = extracted()
    score(path, bundle, recorder)
    summary, _ = score(path, bundle, recorder)
    assert (summary.done, summary.skipped) == (0, 2)
    make.tissue_slide(slides.parent / "a.tif", seed=9)
    extracted()
    summary, _ = score(path, bundle, recorder)
    assert {name: plan.reason for name, plan in summary.plans.items()} == {"a": "tiles changed", "b": "already done"}
    other = make.write_bundle(bundle.parent / "other", threshold=0.7)
    (other / "model.onnx").write_bytes((other / "model.onnx").read_bytes().replace(b"mean", b"MEAN"))
    summary, _ = score(path, other, recorder)
    assert summary.plans["a"].reason == "model changed"


def test_extracting_the_same_again_leaves_the_maps_valid(extracted, bundle, recorder, slides):
    path = extracted()
    score(path, bundle, recorder)
    extract(read_manifest(slides)[:2], path, ExtractSettings(), force=True, listener=recorder)
    summary, _ = score(path, bundle, recorder)
    assert summary.skipped == 2


def test_a_model_for_other_tiles_is_refused_before_anything_is_done(extracted, recorder, make, tmp_path):
    path = extracted()
    with pytest.raises(ModelError, match=r"tile\.size_px"):
        score(path, make.write_bundle(tmp_path / "large", size_px=64), recorder)
    assert open_store(path).models() == []


def test_slides_cut_otherwise_fail_by_themselves(extracted, bundle, recorder, slides):
    path = extracted()
    extract(read_manifest(slides)[:1], path, ExtractSettings(tile=TileSpec(size_px=64)), listener=recorder)
    extract(read_manifest(slides)[1:2], path, ExtractSettings(), listener=recorder)
    summary, _ = score(path, bundle, recorder)
    assert "tile.size_px is 50" in summary.failures["a"]
    assert summary.outcomes["b"].status == "done"


def test_only_limits_and_names_what_is_not_there(extracted, bundle, recorder):
    path = extracted()
    summary, _ = score(path, bundle, recorder, only=["b"])
    assert list(summary.plans) == ["b"]
    with pytest.raises(StoreError, match="nope: not extracted"):
        score(path, bundle, recorder, only=["nope"])


def test_a_slide_without_tiles_gets_an_empty_map(extracted, bundle, recorder, make, slides):
    make.write_tiff(slides.parent / "a.tif", np.full((400, 500, 3), 244, np.uint8))
    summary, store = score(extracted(), bundle, recorder)
    assert summary.outcomes["a"].status == "done"
    assert np.isnan(np.asarray(store.map_node("mean", "a").array("0")[...])).all()


def test_probabilities_that_are_no_numbers_fail_the_slide(extracted, make, recorder, tmp_path, monkeypatch):
    from wsi_idc.model.runtime import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "predict", lambda self, tiles: np.full(len(tiles), np.nan, np.float32))
    summary, _ = score(extracted(), make.write_bundle(tmp_path / "nan", name="nan"), recorder)
    assert "not numbers" in summary.failures["a"]


REAL_AUC = {"8863": 0.925, "8867": 0.98, "14082": 0.975}


@pytest.mark.parametrize("patient", REAL_AUC)
def test_the_published_model_finds_the_published_tumour(idc_slide, published_model, tmp_path, recorder, patient):
    from sklearn.metrics import roc_auc_score

    place = idc_slide(patient)
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        f"path,annotation\n{place}/idc-{patient}.tif,{place}/idc-{patient}.geojson\n{place}/{patient},\n"
    )
    path = tmp_path / "tiles.zarr"
    by_cell = {}
    for pixels in (True, False):
        extract(read_manifest(manifest), path, ExtractSettings(pixels=pixels), listener=recorder)
        _, store = score(path, published_model, recorder, force=True)
        for name in (patient, f"idc-{patient}"):
            slide, values = store.slide(name), probabilities(store, name, "janowczyk-2016")
            assert roc_auc_score(slide.idc > 0.5, values) >= REAL_AUC[patient]
            by_cell[name, pixels] = {tuple(c): p for c, p in zip(slide.cell.tolist(), values.tolist(), strict=True)}
    folder = by_cell[patient, True]
    for values in by_cell.values():
        shared = values.keys() & folder.keys()
        assert len(shared) >= 0.98 * len(folder)
        assert all(values[cell] == folder[cell] for cell in shared)


def test_the_record_survives_as_json(extracted, bundle, recorder):
    _, store = score(extracted(), bundle, recorder)
    attributes = json.loads((store.map_node("mean", "a").folder / "zarr.json").read_text())["attributes"]
    assert set(attributes) == {"ome", "model", "slide_id", "patient_id", "use", "complete"}


CONTEXT = {"reach_um": 2000.0, "spread": 1.0, "mean": -0.5, "temperature": 0.8, "threshold": 0.6}


def test_neighbours_count_where_the_bundle_says_so(extracted, make, tmp_path, recorder):
    from wsi_idc.model.config import Context
    from wsi_idc.model.context import in_context

    path = extracted()
    plain = make.write_bundle(tmp_path / "plain")
    _, store = score(path, plain, recorder)
    alone = probabilities(store, "b")
    bundle = make.write_bundle(tmp_path / "with-context", context=CONTEXT)
    assert read_bundle(bundle).fields.operating_point == 0.6
    summary, store = score(path, bundle, recorder)
    assert (summary.done, summary.skipped) == (2, 0)
    slide, node = store.slide("b"), store.map_node("mean", "b")
    together = probabilities(store, "b")
    assert np.array_equal(np.asarray(node.array("alone")[...]), alone)
    assert np.array_equal(together, in_context(alone, slide.cell, slide.spec, Context(**CONTEXT)))
    assert not np.allclose(together, alone, atol=1e-3)
    assert np.array_equal(np.asarray(node.array("0")[...])[tuple(slide.cell.T)], together)
    record = node.record()
    assert record.attributes["model"]["threshold"] == 0.6
    assert record.complete["positive"] == int((together >= 0.6).sum())
    assert score(path, bundle, recorder)[0].skipped == 2
    summary, store = score(path, plain, recorder)
    assert summary.done == 2
    assert "alone" not in store.map_node("mean", "b").group
    assert np.array_equal(probabilities(store, "b"), alone)


def test_neighbours_count_the_same_with_any_workers(extracted, make, tmp_path, recorder):
    bundle = make.write_bundle(tmp_path / "with-context", context=CONTEXT)
    path = extracted()
    _, store = score(path, bundle, recorder)
    here = probabilities(store, "b")
    _, store = score(path, bundle, recorder, InferSettings(workers=2), force=True)
    assert np.array_equal(probabilities(store, "b"), here)


def test_a_context_that_cannot_be_is_named(make, tmp_path):
    bundle = make.write_bundle(tmp_path / "bad", context={**CONTEXT, "reach_um": -1.0})
    with pytest.raises(ModelError, match=r"context\.reach_um"):
        read_bundle(bundle)
