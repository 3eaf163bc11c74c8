"""Whole training runs on a small store: what they write, how they go on, and how they fail."""

import dataclasses
import errno
import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.runs import QUICK, quiet, same, weights
from wsi_idc.errors import ModelError, UsageError, WsiIdcError
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.known import made_tiles
from wsi_idc.model.network import load_network
from wsi_idc.model.runtime import load_runtime
from wsi_idc.train import TrainSettings, run
from wsi_idc.train.callbacks import Lines, WholeCheckpoints
from wsi_idc.train.others import seen_and_held_out
from wsi_idc.train.settings import RECIPES


@pytest.mark.parametrize("recipe", ["default", "seed"])
def test_a_bundle_is_whole_and_its_forms_agree(make_store, make, patients, tmp_path, recipe):
    store = make_store(patients, unknown=2)
    lines: list[str] = []
    settings = TrainSettings(recipe=recipe, **QUICK)
    result = run(store.address, tmp_path / "bundle", settings, say=lines.append)
    bundle = read_bundle(result.bundle)
    training = bundle.fields.training
    assert training["train_patients"] == ["a", "b", "c", "d"]
    assert training["val_patients"] == ["e", "f"]
    assert training["unlabelled_tiles"] == 14
    assert "Not for diagnosis" in training["limits"][0]
    assert result.epochs == 3
    assert len({path.stat().st_mode for path in bundle.folder.iterdir()}) == 1
    assert result.figures["roc_auc"][0] > 0.9
    assert sum(line.startswith("epoch ") for line in lines) == 3
    assert any("14 tiles have no label" in line for line in lines)
    # The notes are told by who asked for the training, with the figures, and not twice.
    assert any("2 patients only" in note for note in result.notes)
    assert not set(result.notes) & set(lines)
    expected = {"CARD.md", "bundle.json", "history.csv", "history.png", "model.onnx", "model.safetensors"}
    assert expected <= {path.name for path in result.bundle.iterdir()}
    assert (result.bundle / "history.csv").read_text().splitlines()[0] == "epoch,train_loss,val_loss,val_auc,lr"
    assert "nan" not in (result.bundle / "history.csv").read_text()
    tiles = make.pixels_of(store.slide("slide-g"))
    with torch.no_grad():
        logits = load_network(bundle.fields.network, bundle.weights)(torch.from_numpy(tiles))
    found = load_runtime(bundle, "float32", 1).predict(tiles)
    assert np.abs(found - torch.sigmoid(logits).numpy()).max() < 1e-4
    answers = load_runtime(bundle, "float32", 1).predict(made_tiles(bundle.fields.tile.size_px))
    assert answers == pytest.approx(np.array(bundle.fields.known.probability), abs=1e-4)
    work = tmp_path / "bundle.training"
    assert not [path.name for path in work.rglob("*") if path.suffix in {".ckpt", ".npy", ".part"}]
    assert list(work.glob("tensorboard/events*"))


def test_the_seed_decides_everything(make_store, patients, trained, tmp_path):
    store = make_store(patients)
    for name, seed in (("again", 0), ("other", 1)):
        run(store.address, tmp_path / name, TrainSettings(seed=seed, **QUICK), say=quiet)
    assert same(tmp_path / "again", trained)
    assert not same(tmp_path / "other", trained)


def test_a_killed_run_goes_on_to_the_same_weights(make_store, patients, tmp_path):
    # The server imports what a training needs, once, while this process trains.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["wsi_idc.train.entry", "wsi_idc.train.fit"])
    forkserver.ensure_running()
    store = make_store(patients, tiles=200)
    how = {recipe: TrainSettings(recipe=recipe, **(QUICK | {"epochs": 6, "patience": 2})) for recipe in RECIPES}
    whole = {recipe: run(store.address, tmp_path / f"{recipe}-whole", how[recipe], say=quiet) for recipe in how}
    for recipe, settings in how.items():
        out = tmp_path / f"{recipe}-killed"
        lines, said = processes.Pipe(duplex=False)
        process = processes.Process(target=run, args=(store.address, out, settings), kwargs={"say": said.send})
        process.start()
        while not lines.recv().startswith("epoch 2"):
            pass
        time.sleep(0.05)
        process.kill()
        process.join()
        assert (tmp_path / f"{recipe}-killed.training" / "last.ckpt").exists()
        assert not out.exists()
        later: list[str] = []
        broken = run(store.address, out, settings, resume=True, say=later.append)
        assert any(line.startswith("going on after epoch") for line in later)
        assert broken.epochs == whole[recipe].epochs
        assert same(out, whole[recipe].bundle)
        tables = [(folder / "history.csv").read_text() for folder in (out, whole[recipe].bundle)]
        assert tables[0] == tables[1]
        assert not list((tmp_path / f"{recipe}-killed.training").rglob("*.part"))


def test_a_run_that_was_trained_but_not_written_is_only_finished(make_store, patients, trained, tmp_path, monkeypatch):
    store, settings = make_store(patients), TrainSettings(**QUICK)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("wsi_idc.train.finish.export_onnx", full)
        with pytest.raises(WsiIdcError, match=r"No space left on device\); the training is kept"):
            run(store.address, tmp_path / "bundle", settings, say=quiet)
    assert not (tmp_path / "bundle").exists()
    lines: list[str] = []
    run(store.address, tmp_path / "bundle", settings, resume=True, say=lines.append)
    assert not [line for line in lines if line.startswith("epoch ")]
    assert same(tmp_path / "bundle", trained)


def test_a_full_disk_keeps_the_checkpoint_before_it(tmp_path, monkeypatch):
    checkpoints, path = WholeCheckpoints(), tmp_path / "last.ckpt"
    checkpoints.save_checkpoint({"state_dict": {"weight": torch.ones(2)}}, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WsiIdcError, match=r"last\.ckpt: checkpoint cannot be written \(No space left"):
        checkpoints.save_checkpoint({"state_dict": {"weight": torch.zeros(2)}}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def broken_off(make_store, patients, tmp_path, monkeypatch) -> Path:
    """A store whose training was broken off after one epoch, by Ctrl-C."""
    store = make_store(patients)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        handler = signal.getsignal(signal.SIGINT)
        broken.setattr(Lines, "on_train_epoch_start", lambda self, trainer, _: trainer.current_epoch and interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(store.address, tmp_path / "bundle", TrainSettings(**QUICK), say=quiet)
        assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "bundle").exists()
    return store.address


def test_an_interrupted_run_goes_on(broken_off, trained, tmp_path):
    lines: list[str] = []
    run(broken_off, tmp_path / "bundle", TrainSettings(**QUICK), resume=True, say=lines.append)
    assert "going on after epoch 1" in lines
    assert same(tmp_path / "bundle", trained)


def test_a_damaged_checkpoint_is_named(broken_off, tmp_path):
    last = tmp_path / "bundle.training" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"last\.ckpt: damaged checkpoint"):
        run(broken_off, tmp_path / "bundle", TrainSettings(**QUICK), resume=True, say=quiet)


def test_a_checkpoint_with_code_in_it_is_refused(broken_off, tmp_path):
    last = tmp_path / "bundle.training" / "last.ckpt"
    torch.save({"state_dict": {}, "epoch": 0, "code": Path}, last)
    with pytest.raises(UsageError, match=r"last\.ckpt: damaged checkpoint"):
        run(broken_off, tmp_path / "bundle", TrainSettings(**QUICK), resume=True, say=quiet)


def test_other_settings_do_not_go_on(broken_off, tmp_path):
    with pytest.raises(UsageError, match="was begun with other settings"):
        run(broken_off, tmp_path / "bundle", TrainSettings(**QUICK | {"seed": 8}), resume=True, say=quiet)


def test_a_broken_run_is_not_thrown_away_unasked(broken_off, tmp_path):
    with pytest.raises(UsageError, match="add --resume to go on"):
        run(broken_off, tmp_path / "bundle", TrainSettings(**QUICK), say=quiet)


def test_a_bundle_is_never_overwritten(make_store, patients, tmp_path):
    (tmp_path / "bundle").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        run(make_store(patients).address, tmp_path / "bundle", TrainSettings(**QUICK), say=quiet)


def test_a_name_that_cannot_be_a_bundles_is_refused(make_store, patients, tmp_path):
    with pytest.raises(UsageError, match="the bundle's name"):
        run(make_store(patients).address, tmp_path / ".hidden", TrainSettings(**QUICK), say=quiet)


@pytest.fixture
def change_recipe(monkeypatch):
    """Changes what only a recipe can say, in the default recipe."""

    def change(**fields):
        monkeypatch.setitem(RECIPES, "default", dataclasses.replace(RECIPES["default"], **fields))

    return change


def test_starting_and_learning_from_other_bundles(make_store, patients, trained, tmp_path, change_recipe):
    store = make_store(patients)
    change_recipe(teacher=trained, mixup=0.2, smoothing=0.1)
    later = {**QUICK, "init": trained, "epochs": 1, "lr": 1e-9}
    lines: list[str] = []
    run(store.address, tmp_path / "second", TrainSettings(**later), say=lines.append)
    assert any(line.startswith("asking the teacher first") for line in lines)
    first, second = weights(trained), weights(tmp_path / "second")
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-3) for name in first if "body" in name)
    recorded = read_bundle(tmp_path / "second").fields.training["settings"]
    assert [recorded[name] for name in ("init", "teacher", "mixup", "smoothing")] == ["first", "first", 0.2, 0.1]


def test_a_bundle_of_another_tile_size_is_refused(make_store, patients, trained, tmp_path):
    other = make_store(patients, size=20, name="other.zarr")
    with pytest.raises(ModelError, match=r"tile\.size_px is 16, the store's tiles have 20"):
        run(other.address, tmp_path / "second", TrainSettings(init=trained, **QUICK), say=quiet)


def test_a_bundle_that_saw_the_validation_patients_is_refused(make_store, patients, trained, tmp_path, change_recipe):
    store = make_store(patients | {"a": "val"})
    with pytest.raises(UsageError, match=r"--init .*first: was trained on 1 of the patients that val"):
        run(store.address, tmp_path / "second", TrainSettings(init=trained, **QUICK), say=quiet)
    change_recipe(teacher=trained)
    with pytest.raises(UsageError, match=r"the recipe's teacher .*first: was trained on 1 of the patients"):
        run(store.address, tmp_path / "second", TrainSettings(**QUICK), say=quiet)


def test_a_card_with_patients_as_numbers_hides_none_of_them(make_store, make, tmp_path):
    store = make_store({"1": "train", "2": "train", "3": "val", "4": "val"})
    numbers = make.write_bundle(tmp_path / "numbers", size_px=16, training={"train_patients": [3, 5]})
    with pytest.raises(UsageError, match=r"was trained on 1 of the patients that validate \(3\.\.\.\)"):
        run(store.address, tmp_path / "second", TrainSettings(init=numbers, **QUICK), say=quiet)
    assert seen_and_held_out(TrainSettings(init=numbers)) == ({"3", "5"}, [])
    damaged = make.write_bundle(tmp_path / "damaged", size_px=16, training={"train_patients": None})
    with pytest.raises(ModelError, match=r"training\.train_patients: is not a list of patient ids"):
        run(store.address, tmp_path / "third", TrainSettings(init=damaged, **QUICK), say=quiet)


def test_batches_that_cannot_be_shared_evenly_are_refused(make_store, patients, tmp_path):
    with pytest.raises(UsageError, match="cannot be shared evenly by 3 devices"):
        run(make_store(patients).address, tmp_path / "bundle", TrainSettings(processes=3, **QUICK), say=quiet)
