"""Whole training runs on a small store: what they write, how they go on, and how they fail."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wsi_idc.errors import ModelError, UsageError, WsiIdcError
from wsi_idc.evaluate.gather import gather
from wsi_idc.evaluate.held_out import read_held_out
from wsi_idc.evaluate.metrics import evaluate
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.network import load_network
from wsi_idc.model.runtime import load_runtime
from wsi_idc.store import open_store
from wsi_idc.train import TrainSettings, run
from wsi_idc.train.callbacks import WholeCheckpoints

QUICK = {"network": "idc-2016", "input_px": 16, "batch_size": 16, "epochs": 3, "lr": 0.002, "threads": 1}

SCRIPT = """
import sys
from pathlib import Path
from wsi_idc.train import TrainSettings, run

if __name__ == "__main__":
    store, out, settings, resume = sys.argv[1:]
    run(Path(store), Path(out), TrainSettings.model_validate_json(settings), resume=resume == "resume",
        say=lambda line: print(line, flush=True))
"""


def quiet(line: str) -> None:
    """Takes lines and drops them."""


def start(tmp_path: Path, store: Path, out: Path, settings: TrainSettings, resume: str = "") -> subprocess.Popen[str]:
    """A training as a process of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(store), str(out), settings.model_dump_json(), resume]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("recipe", ["default", "seed"])
def test_a_bundle_is_whole_and_its_forms_agree(make_store, patients, tmp_path, recipe):
    store = make_store(patients, unknown=2)
    lines: list[str] = []
    settings = TrainSettings(recipe=recipe, **QUICK)
    result = run(store.address, tmp_path / "bundle", settings, say=lines.append)
    bundle = read_bundle(result.bundle)
    training = bundle.fields.training
    assert training["train_patients"] == ["a", "b", "c", "d"]
    assert training["val_patients"] == ["e", "f"]
    assert training["unlabelled_tiles"] == 14
    assert "not for diagnosis" in training["limits"][0]
    assert result.epochs == 3
    assert len({path.stat().st_mode for path in bundle.folder.iterdir()}) == 1
    assert result.figures["roc_auc"][0] > 0.9
    assert sum(line.startswith("epoch ") for line in lines) == 3
    assert any("14 tiles have no label" in line for line in lines)
    expected = {"CARD.md", "bundle.json", "history.csv", "history.png", "model.onnx", "model.safetensors"}
    assert expected <= {path.name for path in result.bundle.iterdir()}
    assert (result.bundle / "history.csv").read_text().splitlines()[0] == "epoch,train_loss,val_loss,val_auc,lr"
    assert "nan" not in (result.bundle / "history.csv").read_text()
    tiles = np.asarray(store.slide("slide-g").tiles[...])
    with torch.no_grad():
        logits = load_network(bundle.fields.network, bundle.weights)(torch.from_numpy(tiles))
    found = load_runtime(bundle, "float32", 1).predict(tiles)
    assert np.abs(found - torch.sigmoid(logits).numpy()).max() < 1e-4
    work = tmp_path / "bundle.training"
    assert not [path.name for path in work.rglob("*") if path.suffix in {".ckpt", ".npy", ".partial"}]
    assert list(work.glob("tensorboard/events*"))


def test_the_seed_decides_everything(make_store, patients, tmp_path):
    store = make_store(patients)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        run(store.address, tmp_path / name, TrainSettings(seed=seed, **QUICK), say=quiet)
    assert same(tmp_path / "one", tmp_path / "again")
    assert not same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("recipe", ["default", "seed"])
def test_a_killed_run_goes_on_to_the_same_weights(make_store, patients, tmp_path, recipe):
    store = make_store(patients, tiles=200)
    settings = TrainSettings(recipe=recipe, **(QUICK | {"epochs": 6, "patience": 2}))
    process = start(tmp_path, store.address, tmp_path / "killed", settings)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "killed.training" / "last.ckpt").exists()
    assert not (tmp_path / "killed").exists()
    lines: list[str] = []
    broken = run(store.address, tmp_path / "killed", settings, resume=True, say=lines.append)
    assert any(line.startswith("going on after epoch") for line in lines)
    whole = run(store.address, tmp_path / "whole", settings, say=quiet)
    assert broken.epochs == whole.epochs
    assert same(tmp_path / "killed", tmp_path / "whole")
    tables = [(tmp_path / name / "history.csv").read_text() for name in ("killed", "whole")]
    assert tables[0] == tables[1]


def test_a_run_that_was_trained_but_not_written_is_only_finished(make_store, patients, tmp_path, monkeypatch):
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
    run(store.address, tmp_path / "whole", settings, say=quiet)
    assert same(tmp_path / "bundle", tmp_path / "whole")


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
    from wsi_idc.train.callbacks import Lines

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


def test_an_interrupted_run_goes_on(broken_off, tmp_path):
    lines: list[str] = []
    run(broken_off, tmp_path / "bundle", TrainSettings(**QUICK), resume=True, say=lines.append)
    assert "going on after epoch 1" in lines
    run(broken_off, tmp_path / "whole", TrainSettings(**QUICK), say=quiet)
    assert same(tmp_path / "bundle", tmp_path / "whole")


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
        run(make_store(patients).path, tmp_path / "bundle", TrainSettings(**QUICK), say=quiet)


def test_a_name_that_cannot_be_a_bundles_is_refused(make_store, patients, tmp_path):
    with pytest.raises(UsageError, match="the bundle's name"):
        run(make_store(patients).path, tmp_path / ".hidden", TrainSettings(**QUICK), say=quiet)


def test_starting_and_learning_from_other_bundles(make_store, patients, tmp_path):
    store = make_store(patients)
    run(store.address, tmp_path / "first", TrainSettings(**QUICK), say=quiet)
    later = {**QUICK, "init": tmp_path / "first", "teacher": tmp_path / "first", "epochs": 1, "lr": 1e-9}
    lines: list[str] = []
    run(store.address, tmp_path / "second", TrainSettings(**later), say=lines.append)
    assert any(line.startswith("asking the teacher first") for line in lines)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-3) for name in first if "body" in name)


def test_a_bundle_of_another_tile_size_is_refused(make_store, patients, tmp_path):
    run(make_store(patients).path, tmp_path / "first", TrainSettings(**QUICK), say=quiet)
    other = make_store(patients, size=20, name="other.zarr")
    with pytest.raises(ModelError, match=r"tile\.size_px is 16, the store's tiles have 20"):
        run(other.path, tmp_path / "second", TrainSettings(init=tmp_path / "first", **QUICK), say=quiet)


def test_a_teacher_that_saw_the_validation_patients_is_refused(make_store, patients, tmp_path):
    store = make_store(patients)
    run(store.address, tmp_path / "first", TrainSettings(**QUICK), say=quiet)
    node = open_store(store.address, read_only=False).slide_node("slide-a")
    node.update({"split": "val"})
    with pytest.raises(UsageError, match="was trained on 1 of the patients that validate"):
        run(store.address, tmp_path / "second", TrainSettings(teacher=tmp_path / "first", **QUICK), say=quiet)


def test_cross_validation_predicts_every_patient_once_and_goes_on_where_it_was(make_store, patients, tmp_path):
    store, settings = make_store(patients), TrainSettings(folds=2, **QUICK)
    result = run(store.address, tmp_path / "cv", settings, say=quiet)
    rows = (tmp_path / "cv" / "held-out.csv").read_text().splitlines()[1:]
    assert len(rows) == 4 * 24
    assert {row.split(",")[3] for row in rows} == {"a", "b", "c", "d"}
    summary = json.loads((tmp_path / "cv" / "cross-validation.json").read_text())
    assert summary["patients"] == 4
    assert len(summary["folds"]) == 2
    for number in (1, 2):
        training = read_bundle(tmp_path / "cv" / f"fold-{number}").fields.training
        assert not set(training["train_patients"]) & set(training["held_out_patients"])
    lines: list[str] = []
    again = run(store.address, tmp_path / "cv", settings, say=lines.append)
    assert lines == ["fold 1: done before", "fold 2: done before"]
    assert again.figures == result.figures
    found = gather(store, [read_held_out(tmp_path / "cv")], "all", positive_from=0.5, trained_on=False)
    (judged,) = evaluate(found.models).evaluations
    assert {name: figure.value for name, figure in judged.figures.items()} == pytest.approx(
        {name: value for name, (value, _, _) in result.figures.items()}
    )
    after = TrainSettings(folds=2, init=tmp_path / "cv", **QUICK | {"epochs": 1, "lr": 1e-9})
    run(store.address, tmp_path / "cv2", after, say=quiet)
    for number in (1, 2):
        first, second = (load_file(tmp_path / name / f"fold-{number}" / "model.safetensors") for name in ("cv", "cv2"))
        assert all(torch.allclose(first[key], second[key], atol=1e-3) for key in first if "weight" in key)
    parted = TrainSettings(folds=4, init=tmp_path / "cv", **QUICK | {"epochs": 1})
    run(store.address, tmp_path / "cv4", parted, say=quiet)
    held_out = [read_bundle(tmp_path / "cv4" / f"fold-{n}").fields.training["held_out_patients"] for n in range(1, 5)]
    first = read_bundle(tmp_path / "cv" / "fold-1").fields.training["held_out_patients"]
    assert sorted(held_out[0] + held_out[1]) == first
    with pytest.raises(UsageError, match="without a fold that held out the patients who are held out now"):
        run(store.address, tmp_path / "cv3", TrainSettings(init=tmp_path / "cv", **QUICK), say=quiet)
    with pytest.raises(UsageError, match="fold-1: was trained with other settings"):
        run(store.address, tmp_path / "cv", settings.model_copy(update={"seed": 4}), say=quiet)


def test_batches_that_cannot_be_shared_evenly_are_refused(make_store, patients, tmp_path):
    with pytest.raises(UsageError, match="cannot be shared evenly by 3 devices"):
        run(make_store(patients).path, tmp_path / "bundle", TrainSettings(processes=3, **QUICK), say=quiet)


@pytest.mark.slow
def test_two_processes_train_one_bundle(make_store, patients, tmp_path):
    store = make_store(patients, tiles=60)
    process = start(tmp_path, store.address, tmp_path / "bundle", TrainSettings(processes=2, **QUICK))
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert output.count("epoch 3 of 3") == 1
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.fields.training["figures"]["roc_auc"][0] > 0.9
    alone = run(store.address, tmp_path / "alone", TrainSettings(**QUICK), say=quiet)
    first, second = (weights(path) for path in (bundle.folder, alone.bundle))
    assert not all(torch.equal(first[name], second[name]) for name in first)
