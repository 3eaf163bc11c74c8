"""What is evaluated is what the store holds, and never what the model was trained on unawares."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from wsi_idc.errors import ModelError, UsageError
from wsi_idc.evaluate.gather import gather
from wsi_idc.evaluate.held_out import read_held_out, write_held_out
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings, TileSpec
from wsi_idc.store import hold_store, open_store

SQUARE = [[100, 100], [250, 100], [250, 250], [100, 250], [100, 100]]


@pytest.fixture
def store(tmp_path, make, recorder, bundle):
    """Four patients with annotations, two in test, scored; a fifth without labels."""
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}}
    feature["properties"] = {"classification": {"name": "IDC"}}
    (tmp_path / "idc.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    lines = ["path,patient_id,annotation,split"]
    for index, split in enumerate(("train", "val", "test", "test", "test")):
        make.tissue_slide(tmp_path / f"s{index}.tif", seed=index)
        lines.append(f"s{index}.tif,p{index},{'idc.geojson' if index < 4 else ''},{split}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    extract(read_manifest(tmp_path / "m.csv"), tmp_path / "tiles.zarr", ExtractSettings(), listener=recorder)
    infer(tmp_path / "tiles.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
    return open_store(tmp_path / "tiles.zarr")


def card(bundle, **training):
    file = bundle / "bundle.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "training": training}))
    return read_bundle(bundle)


def judge(store, bundle, split="test", trained_on=False):
    return gather(store, [bundle], split, positive_from=0.5, trained_on=trained_on)


def test_the_labelled_tiles_of_the_split_are_what_is_judged(store, bundle):
    found = judge(store, read_bundle(bundle))
    (model,) = found.models
    assert set(model.slide.tolist()) == {"s2", "s3"}
    assert len(model) == 48 and model.truth.sum() == 2 * 9
    expected = np.asarray(store.map_node("mean", "s2").array("probability")[...])
    assert np.array_equal(model.probability[:24], expected)
    assert found.notes == ["mean does not say which patients it was trained on"]
    assert len(judge(store, read_bundle(bundle), "all").models[0]) == 4 * 24


def test_patients_that_the_model_was_trained_on_are_refused_unless_asked_for(store, bundle):
    trained = card(bundle, train_patients=["p2", "px"], val_patients=["p3"])
    with pytest.raises(UsageError, match=r"mean was trained on 1 of these 2 patients \(p2, ...\)"):
        judge(store, trained)
    notes = judge(store, trained, trained_on=True).notes
    assert "its figures flatter it" in notes[0]
    assert notes[1] == "mean was chosen and calibrated on 1 of these 2 patients"
    assert judge(store, card(bundle, train_patients=["p0"], val_patients=["p1"])).notes == []


def test_patients_that_a_card_lists_as_numbers_are_found_too(tmp_path, store, bundle):
    with hold_store(store.address) as held:
        for index in (2, 3):
            held.slide_node(f"s{index}").update({"patient_id": f"886{index}"})
    with pytest.raises(UsageError, match=r"mean was trained on 1 of these 2 patients \(8862, ...\)"):
        judge(store, card(bundle, train_patients=[8862, "px"]))
    assert judge(store, card(bundle, train_patients=["008862"], val_patients=[8863])).notes == [
        "mean was chosen and calibrated on 1 of these 2 patients"
    ]


def test_a_card_whose_patients_cannot_be_compared_is_one_line(store, bundle):
    for field in ("train_patients", "val_patients"):
        for value in (None, "p2", {"p2": 1}, ["p1", None], [["p2"]], [True], [8863.0]):
            with pytest.raises(ModelError, match=rf"bundle\.json: training\.{field}: is not a list of patient ids"):
                judge(store, card(bundle, **{"train_patients": [], field: value}))


def test_slides_that_were_cut_on_different_grids_are_not_pooled(store, bundle):
    finer = TileSpec(mpp=2.0).content()
    with hold_store(store.address) as held:
        held.slide_node("s3").update({"tile": finer})
    problem = "s3: was cut at 50 px at 2 um/px, and s2 at 50 px at 4 um/px"
    with pytest.raises(UsageError, match=problem):
        judge(store, read_bundle(bundle))
    assert len(judge(store, read_bundle(bundle), "val").models[0]) == 24


def test_what_cannot_be_judged_is_one_line(store, bundle, make, tmp_path, recorder):
    with pytest.raises(UsageError, match=r"--model .*bundle: is given twice"):
        gather(store, [read_bundle(bundle)] * 2, "test", positive_from=0.5, trained_on=False)
    twin = make.write_bundle(tmp_path / "twin")
    with pytest.raises(UsageError, match=r"two models are named mean: .*bundle and .*twin"):
        gather(store, [read_bundle(bundle), read_bundle(twin)], "test", positive_from=0.5, trained_on=False)
    with pytest.raises(UsageError, match="has no map by other"):
        judge(store, read_bundle(make.write_bundle(tmp_path / "other", name="other")))
    changed = make.write_bundle(tmp_path / "changed")
    (changed / "model.onnx").write_bytes((changed / "model.onnx").read_bytes() + b"\0")
    with pytest.raises(UsageError, match=r"is stale \(model changed\)"):
        judge(store, read_bundle(changed))


def held_out(folder, tiles, slides=("s0", "s2"), flip=False):
    """A cross-validation of two folds that held out 24 tiles a slide; `tiles` gives a slide's truth."""
    folder.mkdir(exist_ok=True)
    rows = []
    for fold, slide in enumerate(slides):
        truth = tiles(slide) != flip
        rows += [
            {"fold": fold, "slide": slide, "row": row, "patient": f"p{slide[1:]}", "truth": int(truth[row])}
            | {
                "logit": -2.0,
                "probability": 0.1 + 0.03 * row,
                "threshold": 0.3 + 0.1 * fold,
                "alone": 0.05,
                "alone_threshold": 0.6,
            }
            for row in reversed(range(24))
        ]
    write_held_out(folder, rows)
    return folder


def test_cross_validations_of_one_name_are_told_apart_by_where_they_lie(store, tmp_path):
    folders = []
    for place in ("monday", "friday"):
        (tmp_path / place).mkdir()
        folders.append(held_out(tmp_path / place / "cv", lambda slide: store.slide(slide).idc >= 0.5))
    found = gather(store, [read_held_out(folder) for folder in folders], "all", positive_from=0.5, trained_on=False)
    assert [model.model for model in found.models] == ["monday/cv", "friday/cv"]
    assert [slide.slide_id for slide in found.slides] == ["s0", "s2"]


def test_a_cross_validation_is_judged_on_whom_it_held_out_beside_a_model(store, bundle, tmp_path):
    def truth(slide):
        return store.slide(slide).idc >= 0.5

    folds = read_held_out(held_out(tmp_path / "cv", truth))
    found = gather(store, [folds, read_bundle(bundle)], "all", positive_from=0.5, trained_on=False, alone=True)
    assert "cv: each of 2 slides is judged by the fold that never saw its patient; 2 slides" in found.notes[0]
    together, alone, other = found.models
    assert [model.model for model in found.models] == ["cv", "cv, tiles alone", "mean"]
    assert together.probability[:24] == pytest.approx(0.1 + 0.03 * np.arange(24))
    assert together.thresholds == [0.3, 0.4] and set(together.threshold[:24].tolist()) == {0.3}
    assert alone.thresholds == [0.6]
    assert set(other.slide.tolist()) == {"s0", "s2"}
    assert len(gather(store, [folds], "test", positive_from=0.5, trained_on=False).models[0]) == 24
    with pytest.raises(UsageError, match="held out no slide of the split val"):
        gather(store, [folds], "val", positive_from=0.5, trained_on=False)
    with pytest.raises(UsageError, match="s0: its tiles or labels are not those that other held out"):
        changed = read_held_out(held_out(tmp_path / "other", truth, flip=True))
        gather(store, [changed], "all", positive_from=0.5, trained_on=False)


def test_a_damaged_cross_validation_is_one_line(store, tmp_path):
    folder = held_out(tmp_path / "cv", lambda slide: np.zeros(24, bool))
    whole = (folder / "held-out.csv").read_text()
    for text in (whole.replace("probability", "p"), whole.replace("0.3", "x"), whole.splitlines()[0], ""):
        (folder / "held-out.csv").write_text(text)
        with pytest.raises(UsageError, match=r"held-out\.csv"):
            read_held_out(folder)


def test_the_command_writes_a_report_and_refuses_in_a_line(store, bundle, tmp_path, monkeypatch):
    from wsi_idc.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, ["evaluate", "--store", str(store.address), *map(str, arguments)])

    out = tmp_path / "report"
    done = run("--model", bundle, "--out", out)
    assert done.exit_code == 0, done.output
    assert "ROC AUC" in done.output and "note: mean does not say" in done.output
    assert "Research use only" in (out / "report.html").read_text()
    again = run("--model", bundle, "--out", out, "--json")
    assert json.loads(again.output.splitlines()[-1])["event"] == "evaluation"
    card(bundle, train_patients=["p2"])
    assert isinstance(run("--model", bundle).exception, UsageError)
    assert isinstance(run("--model", bundle, "--split", "tset").exception, UsageError)
    assert isinstance(run().exception, UsageError)


def test_tiles_alone_are_judged_beside_those_with_their_neighbours(store, bundle, make, tmp_path, recorder):
    context = {"reach_um": 2000.0, "spread": 1.0, "threshold": 0.6}
    other = read_bundle(make.write_bundle(tmp_path / "other", name="other", threshold=0.4, context=context))
    infer(store.address, other, InferSettings(), listener=recorder)
    models = gather(store, [other], "test", positive_from=0.5, trained_on=False, alone=True).models
    assert [(model.model, *model.thresholds) for model in models] == [("other", 0.6), ("other, tiles alone", 0.4)]
    (plain,) = judge(store, read_bundle(bundle)).models
    assert np.array_equal(models[1].probability, plain.probability)
    assert not np.array_equal(models[0].probability, plain.probability)
    without = json.loads((tmp_path / "other" / "bundle.json").read_text())
    del without["context"]
    (tmp_path / "other" / "bundle.json").write_text(json.dumps(without))
    with pytest.raises(UsageError, match=r"is stale \(threshold and context changed\)"):
        judge(store, read_bundle(tmp_path / "other"))
