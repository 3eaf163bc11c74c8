"""Cross-validation calibrates the model that comes after it, and no fold by its own held-out patients."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.train.test_training import QUICK, quiet, weights
from wsi_idc.errors import UsageError
from wsi_idc.evaluate.held_out import read_held_out
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


def test_a_model_is_calibrated_by_the_held_out_patients_too_and_its_card_has_their_figures(
    make_store, patients, tmp_path
):
    store = make_store(patients)
    run(store.address, tmp_path / "cv", TrainSettings(folds=2, **QUICK), say=quiet)
    run(store.address, tmp_path / "plain", TrainSettings(**QUICK), say=quiet)
    settings = TrainSettings(cross_validation=tmp_path / "cv", **QUICK)
    run(store.address, tmp_path / "model", settings, say=quiet)
    plain, model = (read_bundle(tmp_path / name) for name in ("plain", "model"))
    first, second = (weights(tmp_path / name) for name in ("plain", "model"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["temperature"]
    assert model.fields.training["temperature"] != plain.fields.training["temperature"]
    summary = json.loads((tmp_path / "cv" / "cross-validation.json").read_text())
    study = model.fields.training["cross_validation"]
    assert study["figures"]["roc_auc"] == summary["pooled"]["roc_auc"]
    assert (study["name"], study["patients"], study["folds"], study["tiles"]) == ("cv", 4, 2, 4 * 24)
    assert str(tmp_path) not in (tmp_path / "model" / "bundle.json").read_text()
    assert "2 networks trained in the same way" in (tmp_path / "model" / "CARD.md").read_text()
    held = read_held_out(tmp_path / "cv").columns
    assert held["logit"].dtype == np.float32
    order = np.argsort(held["logit"][held["fold"] == "1"], kind="stable")
    assert (np.diff(held["alone"][held["fold"] == "1"][order]) >= 0).all()


def test_a_cross_validation_that_does_not_fit_is_refused_before_training(make_store, patients, tmp_path):
    store = make_store(patients)
    run(store.address, tmp_path / "cv", TrainSettings(folds=2, **QUICK | {"epochs": 1}), say=quiet)
    given = {"cross_validation": tmp_path / "cv"}
    same_epochs = QUICK | {"epochs": 1}
    with pytest.raises(UsageError, match=r"cv: was made with other settings \(epochs\)"):
        run(store.address, tmp_path / "model", TrainSettings(**given, **QUICK), say=quiet)
    with pytest.raises(UsageError, match="holds no finished cross-validation"):
        run(store.address, tmp_path / "model", TrainSettings(cross_validation=tmp_path, **same_epochs), say=quiet)
    for wrong in ({"folds": 2}, {"split_by": "tile"}):
        with pytest.raises(UsageError, match="--cross-validation: calibrates one model, split by patient"):
            run(store.address, tmp_path / "model", TrainSettings(**given, **same_epochs, **wrong), say=quiet)
    other = make_store(patients, tiles=30, name="other.zarr")
    with pytest.raises(UsageError, match="cv: was made on another store"):
        run(other.path, tmp_path / "model", TrainSettings(**given, **same_epochs), say=quiet)
    assert not (tmp_path / "model.training").exists()
