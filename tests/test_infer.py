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

CONTEXT = {"reach_um": 2000.0, "spread": 1.0, "mean": -0.5, "temperature": 0.8, "threshold": 0.6}


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
    return store.map(model, slide_id).read("probability")


def test_each_tile_has_its_probability_at_its_cell(extracted, bundle, recorder, make):
    summary, store = score(extracted(), bundle, recorder)
    assert (summary.done, summary.tiles) == (2, 24 + 48)
    slide, found = store.slide("a"), store.map("mean", "a")
    expected = make.pixels_of(slide).reshape(24, -1).mean(1) / 255
    assert np.allclose(probabilities(store, "a"), expected, atol=1e-5)
    image = found.read("0")
    assert image.shape == slide.grid.shape == (8, 10)
    assert np.array_equal(image[tuple(slide.cell.T)], probabilities(store, "a"))
    assert np.isnan(image).sum() == 80 - 24
    record = found.record
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
        validate_zarr_store(f"{store.address}/{node.path}")
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
    assert "b.tif: no such file or directory" in summary.failures["b"]


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threshold": 0.7}, "threshold changed"),
        ({"classes": ["healthy", "tumour"]}, "classes and positive class changed"),
        ({"context": CONTEXT}, "threshold and context changed"),
    ],
)
def test_what_a_bundle_says_of_its_numbers_is_part_of_what_a_map_is_made_from(
    extracted, bundle, recorder, make, change, reason
):
    path = extracted()
    score(path, bundle, recorder)
    summary, _ = score(path, make.write_bundle(bundle, **change), recorder)
    assert summary.plans["a"].reason == reason
    assert summary.done == 2


def test_what_computed_a_map_is_part_of_what_it_is_made_from(extracted, bundle, recorder):
    """Half precision on a GPU, another engine or another file of the same bundle give other numbers."""
    from dataclasses import replace

    from wsi_idc.infer import plan_maps

    path, loaded = extracted(), read_bundle(bundle)
    score(path, bundle, recorder)
    form = loaded.form("auto")
    for change in ({"precision": "float16"}, {"engine": "torch"}, {"digest": "0" * 16}):
        plans = plan_maps(open_store(path), loaded, replace(form, **change)).plans
        names = {"digest": "model"}
        assert {plan.reason for plan in plans.values()} == {f"{names.get(*change, *change)} changed"}


def test_another_model_of_the_same_name_does_not_replace_maps_unseen(extracted, bundle, recorder, make):
    path = extracted()
    _, store = score(path, bundle, recorder)
    before = probabilities(store, "a")
    other = make.write_bundle(bundle.parent / "other")
    (other / "model.onnx").write_bytes((other / "model.onnx").read_bytes().replace(b"mean", b"MEAN"))
    with pytest.raises(ModelError, match="maps by another model of the name 'mean'"):
        score(path, other, recorder)
    assert np.array_equal(probabilities(open_store(path), "a"), before)
    summary, _ = score(path, other, recorder, force=True)
    assert (summary.done, summary.plans["a"].reason) == (2, "model changed")
    assert score(path, other, recorder)[0].skipped == 2


def damage_tiles(path, how):
    (shard,) = [file for file in (path / "slides/a/tiles/c").rglob("*") if file.is_file()]
    content = bytearray(shard.read_bytes())
    if how == "deleted":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[{"flipped": len(content) // 3, "index": -9}[how]] ^= 0x10
        shard.write_bytes(content)


@pytest.mark.parametrize("how", ["deleted", "truncated", "flipped", "index"])
def test_damaged_tiles_are_named_and_never_scored_and_the_next_extract_cuts_them_again(
    extracted, bundle, recorder, how
):
    path = extracted()
    damage_tiles(path, how)
    summary, store = score(path, bundle, recorder)
    assert "slides/a/tiles: the store is damaged there" in summary.failures["a"]
    assert "run wsi-idc extract again" in summary.failures["a"]
    assert summary.outcomes["b"].status == "done"
    assert store.slide_ids() == ["b"]
    assert store.map("mean", "a").record.complete is None
    assert score(path, bundle, recorder)[0].notes == ("1 slide without complete tiles left out: see wsi-idc status",)
    extracted()
    assert recorder.started == ["a"]
    summary, _ = score(path, bundle, recorder)
    assert (summary.done, summary.plans["b"].action) == (1, "skip")


def test_damaged_cells_are_never_scored(extracted, bundle, recorder):
    path = extracted()
    (chunk,) = [file for file in (path / "slides/a/cell/c").rglob("*") if file.is_file()]
    chunk.unlink()
    summary, _ = score(path, bundle, recorder)
    assert "slides/a/cell: the store is damaged there: it is not what was written" in summary.failures["a"]


def test_a_record_that_lacks_something_fails_its_slide_alone_and_is_cut_again(extracted, bundle, recorder):
    path = extracted()
    file = path / "slides/a/zarr.json"
    document = json.loads(file.read_text())
    del document["attributes"]["complete"]["identity"]
    file.write_text(json.dumps(document))
    summary, store = score(path, bundle, recorder)
    assert "complete.identity: field required" in summary.failures["a"]
    assert summary.outcomes["b"].status == "done"
    assert store.slide_ids() == ["b"]
    extracted()
    assert recorder.started == ["a"]
    assert score(path, bundle, recorder)[0].done == 1


def test_a_map_that_cannot_be_made_leaves_the_old_one(extracted, bundle, make, recorder):
    """Before, the old map was cleared before the context could fail."""
    path = extracted()
    _, store = score(path, bundle, recorder)
    before = probabilities(store, "a")
    summary, store = score(path, make.write_bundle(bundle, context={**CONTEXT, "reach_um": 99_000.0}), recorder)
    assert "reach_um" in summary.failures["a"]
    assert np.array_equal(probabilities(store, "a"), before)
    assert store.map("mean", "a").state(store.slide("a")).kind == "failed"


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
    assert np.isnan(store.map("mean", "a").read("0")).all()


def test_probabilities_that_are_no_numbers_fail_the_slide(extracted, make, recorder, tmp_path, monkeypatch):
    from wsi_idc.model.runtime import OpenVinoRuntime

    monkeypatch.setattr(OpenVinoRuntime, "_score", lambda self, tiles: np.full(len(tiles), np.nan, np.float32))
    summary, _ = score(extracted(), make.write_bundle(tmp_path / "nan", name="nan"), recorder)
    assert "not numbers" in summary.failures["a"]


REAL_AUC = {"8863": 0.925, "8867": 0.98, "14082": 0.975}


@pytest.mark.parametrize("patient", ["8863", *(pytest.param(one, marks=pytest.mark.slow) for one in ("8867", "14082"))])
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


def test_the_record_survives_as_json(extracted, bundle, recorder, slides):
    score(extracted(), bundle, recorder)
    attributes = json.loads((slides.parent / "tiles.zarr/maps/mean/a/zarr.json").read_text())["attributes"]
    assert set(attributes) == {
        *("ome", "model", "slide_id", "patient_id", "use", "flags", "attempt", "committed", "complete")
    }


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
    slide, found = store.slide("b"), store.map("mean", "b")
    together = probabilities(store, "b")
    assert np.array_equal(found.read("alone"), alone)
    assert np.array_equal(together, in_context(alone, slide.cell, slide.spec, Context(**CONTEXT)))
    assert not np.allclose(together, alone, atol=1e-3)
    assert np.array_equal(found.read("0")[tuple(slide.cell.T)], together)
    record = found.record
    assert record.attributes["model"]["threshold"] == 0.6
    assert record.complete["positive"] == int((together >= 0.6).sum())
    assert score(path, bundle, recorder)[0].skipped == 2
    summary, store = score(path, plain, recorder)
    assert summary.done == 2
    assert not store.map("mean", "b").has("alone")
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


def test_a_map_of_several_classes_has_a_channel_for_each(extracted, make, tmp_path, recorder, slides):
    import warnings

    from yaozarrs import validate_zarr_store

    bundle = make.write_bundle(tmp_path / "three", outputs=3, classes=["stroma", "fat", "tumour"], positive="tumour")
    path = extracted()
    summary, store = score(path, bundle, recorder)
    assert summary.done == 2
    slide, found = store.slide("a"), store.map("mean", "a")
    assert found.read("probability").shape == (24, 3)
    image = found.read("0")
    assert image.shape == (3, *slide.grid.shape)
    assert np.array_equal(image[:, slide.cell[:, 0], slide.cell[:, 1]].T, found.read("probability"))
    (multiscale,) = found.attributes["ome"]["multiscales"]
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    assert multiscale["axes"][0]["type"] == "channel"
    assert found.record.complete["positive"] == int((found.read("probability")[:, 2] >= 0.5).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate_zarr_store(f"{store.address}/{found.node.path}")
    assert score(path, bundle, recorder)[0].skipped == 2


def test_a_slide_without_tiles_gets_an_empty_map_of_every_class(extracted, make, tmp_path, recorder, slides):
    make.write_tiff(slides.parent / "a.tif", np.full((400, 500, 3), 244, np.uint8))
    bundle = make.write_bundle(tmp_path / "three", outputs=3, classes=["stroma", "fat", "tumour"])
    _, store = score(extracted(), bundle, recorder)
    found = store.map("mean", "a")
    assert (found.read("probability").shape, found.read("0").shape) == ((0, 3), (3, 8, 10))
    assert found.record.complete["positive"] is None


def test_no_batch_of_a_model_is_left_half_empty():
    from types import SimpleNamespace

    from wsi_idc.work.score import whole_batches

    assert [whole_batches(SimpleNamespace(batch=8), asked) for asked in (1, 8, 9, 64)] == [8, 8, 16, 64]
    assert whole_batches(SimpleNamespace(batch=1024), 64) == 1024
