"""Cross-validation calibrates the model that comes after it, and no fold by its own held-out patients."""

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch

from tests.train.runs import QUICK, quiet, weights
from wsi_idc.errors import UsageError
from wsi_idc.evaluate.gather import gather
from wsi_idc.evaluate.held_out import read_held_out, write_held_out
from wsi_idc.evaluate.metrics import evaluate
from wsi_idc.model.bundle import read_bundle
from wsi_idc.train import TrainSettings, run
from wsi_idc.train.calibrate import Judges, calibrate
from wsi_idc.train.cross_validation import Fold, _columns
from wsi_idc.train.data import labelled_tiles
from wsi_idc.train.splits import Split

CALIBRATED = ("threshold", "alone_threshold")


def draw(seed, count=24, sharp=1.0):
    """Judges on a line of cells whose logits are `sharp` times what the truth was drawn by."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, count)
    truth = generator.random(count) < 1 / (1 + np.exp(-logits))
    cell = np.stack([np.zeros(count, np.int32), np.arange(count, dtype=np.int32)], 1)
    return Judges((sharp * logits).astype(np.float32), cell, np.full(count, "s"), truth)


def test_a_folds_own_held_out_patients_have_no_part_in_its_calibration(make_store, patients):
    tiles = labelled_tiles(make_store(patients))
    places = [np.flatnonzero(tiles.patient == name) for name in "abc"]
    none = np.empty(0, np.int64)
    val = draw(9)
    folds = [Fold(n, Split(none, none, own, ""), val, draw(n), -0.5) for n, own in enumerate(places)]
    before = _columns(folds[0], folds, tiles)
    opposite = dataclasses.replace(folds[0], held_out=dataclasses.replace(folds[0].held_out, truth=~draw(0).truth))
    after = _columns(opposite, [opposite, *folds[1:]], tiles)
    assert all(np.array_equal(before[name], after[name]) for name in ("probability", "alone", *CALIBRATED))
    other = dataclasses.replace(folds[1], held_out=dataclasses.replace(folds[1].held_out, truth=~draw(1).truth))
    changed = _columns(folds[0], [folds[0], other, folds[2]], tiles)
    assert not np.array_equal(before["alone"], changed["alone"])


def test_all_judges_calibrate_alike_and_slides_of_one_name_stay_apart():
    from wsi_idc.settings import TileSpec

    parts = [draw(seed, 400, sharp=3.0) for seed in (1, 2)]
    both = calibrate(parts, TileSpec(), mean=0.0)
    assert both.temperature == pytest.approx(3.0, rel=0.3)
    one, two = (calibrate([part], TileSpec(), mean=None).temperature for part in parts)
    assert min(one, two) < both.temperature < max(one, two)
    renamed = [parts[0], dataclasses.replace(parts[1], slide=np.full(400, "t"))]
    assert calibrate(renamed, TileSpec(), mean=0.0) == both


def test_cross_validation_predicts_every_patient_once_and_goes_on_where_it_was(
    make_store, patients, cross_validated, tmp_path
):
    store, settings, (cv, result) = make_store(patients), TrainSettings(folds=2, **QUICK), cross_validated
    rows = (cv / "held-out.csv").read_text().splitlines()[1:]
    assert len(rows) == 4 * 24
    assert {row.split(",")[3] for row in rows} == {"a", "b", "c", "d"}
    summary = json.loads((cv / "cross-validation.json").read_text())
    assert summary["patients"] == 4
    assert len(summary["folds"]) == 2
    for number in (1, 2):
        training = read_bundle(cv / f"fold-{number}").fields.training
        assert not set(training["train_patients"]) & set(training["held_out_patients"])
    copy = tmp_path / "copy"
    shutil.copytree(cv, copy)
    (copy / "held-out.csv").unlink()
    lines: list[str] = []
    again = run(store.address, copy, settings, say=lines.append)
    assert lines == ["fold 1: done before", "fold 2: done before"]
    assert again.figures == result.figures
    found = gather(store, [read_held_out(copy)], "all", positive_from=0.5, trained_on=False)
    (judged,) = evaluate(found.models).evaluations
    assert {name: figure.value for name, figure in judged.figures.items()} == pytest.approx(
        {name: value for name, (value, _, _) in result.figures.items()}
    )
    with pytest.raises(UsageError, match="fold-1: was trained with other settings"):
        run(store.address, copy, settings.model_copy(update={"seed": 4}), say=quiet)


@pytest.mark.slow
def test_each_fold_goes_on_from_the_one_that_never_saw_its_patients(make_store, patients, cross_validated, tmp_path):
    store, (cv, _) = make_store(patients), cross_validated
    run(
        store.address, tmp_path / "cv4", TrainSettings(folds=4, init=cv, **QUICK | {"epochs": 1, "lr": 1e-9}), say=quiet
    )
    for number, parent in ((1, 1), (2, 1), (3, 2), (4, 2)):
        first, second = weights(cv / f"fold-{parent}"), weights(tmp_path / "cv4" / f"fold-{number}")
        assert all(torch.allclose(first[key], second[key], atol=1e-3) for key in first if "weight" in key)
    held_out = [read_bundle(tmp_path / "cv4" / f"fold-{n}").fields.training["held_out_patients"] for n in range(1, 5)]
    assert sorted(held_out[0] + held_out[1]) == read_bundle(cv / "fold-1").fields.training["held_out_patients"]
    with pytest.raises(UsageError, match="without a fold that held out the patients who are held out now"):
        run(store.address, tmp_path / "one", TrainSettings(init=cv, **QUICK), say=quiet)


def test_a_model_is_calibrated_by_the_held_out_patients_too_and_its_card_has_their_figures(
    make_store, patients, trained, cross_validated, tmp_path
):
    cv, _ = cross_validated
    settings = TrainSettings(cross_validation=cv, **QUICK)
    run(make_store(patients).address, tmp_path / "model", settings, say=quiet)
    plain, model = (read_bundle(path) for path in (trained, tmp_path / "model"))
    first, second = (weights(path) for path in (trained, tmp_path / "model"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["temperature"]
    assert model.fields.training["temperature"] != plain.fields.training["temperature"]
    summary = json.loads((cv / "cross-validation.json").read_text())
    study = model.fields.training["cross_validation"]
    assert study["figures"]["roc_auc"] == summary["pooled"]["roc_auc"]
    assert (study["name"], study["patients"], study["folds"], study["tiles"]) == ("cv", 4, 2, 4 * 24)
    assert str(cv.parent) not in (tmp_path / "model" / "bundle.json").read_text()
    assert "2 networks trained in the same way" in (tmp_path / "model" / "CARD.md").read_text()
    held = read_held_out(cv).columns
    assert held["logit"].dtype == np.float32
    order = np.argsort(held["logit"][held["fold"] == "1"], kind="stable")
    assert (np.diff(held["alone"][held["fold"] == "1"][order]) >= 0).all()


def test_a_cross_validation_that_does_not_fit_is_refused_before_training(
    make_store, patients, cross_validated, tmp_path
):
    store = make_store(patients)
    given = {"cross_validation": cross_validated[0]}
    with pytest.raises(UsageError, match=r"cv: was made with other settings \(epochs, seed\)"):
        run(store.address, tmp_path / "model", TrainSettings(**given, seed=1, **QUICK | {"epochs": 1}), say=quiet)
    with pytest.raises(UsageError, match="holds no finished cross-validation"):
        run(store.address, tmp_path / "model", TrainSettings(cross_validation=tmp_path, **QUICK), say=quiet)
    for wrong in ({"folds": 2}, {"split_by": "tile"}):
        with pytest.raises(UsageError, match="--cross-validation: calibrates one model, split by patient"):
            run(store.address, tmp_path / "model", TrainSettings(**given, **QUICK, **wrong), say=quiet)
    other = make_store(patients, tiles=30, name="other.zarr")
    with pytest.raises(UsageError, match="cv: was made on another store"):
        run(other.address, tmp_path / "model", TrainSettings(**given, **QUICK), say=quiet)
    assert not (tmp_path / "model.training").exists()


def test_a_full_disk_leaves_the_held_out_tiles_that_were_there(cross_validated, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copy(cross_validated[0] / "held-out.csv", tmp_path)
    before = (tmp_path / "held-out.csv").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_held_out(tmp_path, [])
    assert (tmp_path / "held-out.csv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
