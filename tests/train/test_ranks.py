"""Several processes that train one network: helpers serve one training each, and leave no trace."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.train.runs import QUICK, output_of, quiet, weights
from wsi_idc.evaluate.held_out import read_held_out
from wsi_idc.model.bundle import read_bundle
from wsi_idc.train import TrainSettings, fit, run


@pytest.fixture
def helper(monkeypatch):
    """Makes this process a helper whose trainings are not carried out; gives the folders of those it was asked for."""
    asked = []

    def fitted(network, settings, recipe, pixels, targets, work, say, *, progress):
        asked.append(work.name)
        return settings.epochs

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(fit, "fit", fitted)
    return asked


def test_a_helper_ends_with_its_training_and_writes_and_says_nothing(make_store, patients, helper, tmp_path):
    lines: list[str] = []
    store, before = make_store(patients, unknown=2), sorted(tmp_path.iterdir())
    assert run(store.address, tmp_path / "bundle", TrainSettings(processes=2, **QUICK), say=lines.append) is None
    assert (lines, helper) == ([], ["bundle.training"])
    assert sorted(tmp_path.iterdir()) == before


def test_a_helper_trains_the_first_fold_that_is_missing_and_no_other(make_store, patients, helper, tmp_path):
    settings = TrainSettings(folds=3, processes=2, **QUICK)
    (tmp_path / "cv" / "fold-1").mkdir(parents=True)
    assert run(make_store(patients).address, tmp_path / "cv", settings, say=quiet) is None
    assert helper == ["fold-2.training"]


def test_a_training_leaves_neither_its_group_nor_its_helpers_nor_their_environment(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(barrier=torch.distributed.barrier, launcher=SimpleNamespace(procs=[ended]))
    )
    before = dict(os.environ)
    with fit._own_group(trainer):
        os.environ |= {"LOCAL_RANK": "0", "MASTER_PORT": "1", "WORLD_SIZE": "1"}
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    assert not torch.distributed.is_initialized()
    assert ended.returncode == 0
    assert dict(os.environ) == before


@pytest.mark.slow
def test_two_processes_train_one_bundle(make_store, patients, tmp_path):
    store = make_store(patients, tiles=60)
    output = output_of(tmp_path, store.address, tmp_path / "bundle", TrainSettings(processes=2, **QUICK), 400)
    assert output.count("epoch 3 of 3") == 1
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.fields.training["figures"]["roc_auc"][0] > 0.9
    alone = run(store.address, tmp_path / "alone", TrainSettings(**QUICK), say=quiet)
    first, second = (weights(path) for path in (bundle.folder, alone.bundle))
    assert not all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_train_every_fold_of_a_cross_validation(make_store, patients, tmp_path):
    store, settings = make_store(patients), TrainSettings(folds=2, processes=2, **QUICK)
    lines = output_of(tmp_path, store.address, tmp_path / "cv", settings, 400).splitlines()
    assert [line for line in lines if line.startswith("fold ")] == ["fold 1 of 2", "fold 2 of 2"]
    assert sum(line.startswith("epoch 3 of 3") for line in lines) == 2
    held_out = read_held_out(tmp_path / "cv").columns
    assert np.unique(held_out["fold"], return_counts=True)[1].tolist() == [48, 48]
