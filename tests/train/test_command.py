"""From the command line: train, then the bundle that came out of it scores and is judged."""

import json

import pytest
from typer.testing import CliRunner

from wsi_idc import train
from wsi_idc.cli import app
from wsi_idc.errors import UsageError
from wsi_idc.train.result import TrainResult, tell


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs a command in this process, which has imported what a training needs, and gives what it printed."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return invoke


def test_train_infer_and_evaluate_fit_together(wsi_idc, here, make_store, tmp_path):
    splits = {f"p{index}": split for index, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 3)}
    store = make_store(splits, size=32)
    place = ["--store", store.address]
    quick = ["--network", "idc-2016", "--epochs", 2, "--batch-size", 16, "--threads", 1]
    done = wsi_idc("train", *place, *quick, "--out", "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Research use only" in done.stdout and "figure on validation patients" in done.stdout
    card = json.loads((tmp_path / "m" / "bundle.json").read_text())
    assert sorted(card["training"]["train_patients"]) == ["p0", "p1", "p2", "p3"]
    assert sorted(card["training"]["val_patients"]) == ["p4", "p5"]
    assert here("infer", *place, "--model", "m").exit_code == 0
    assert here("evaluate", *place, "--model", "m", "--json").exit_code == 0
    assert (tmp_path / "evaluation" / "report.html").is_file()
    with pytest.raises(UsageError, match=r"m was trained on 4 of these 4 patients \(p0, p1, p2, ...\)"):
        here("evaluate", *place, "--model", "m", "--split", "train")


@pytest.mark.slow
def test_a_recipe_is_cross_validated_judged_and_calibrates_the_model_that_comes_after_it(here, make_store, tmp_path):
    store = make_store({"p0": "", "p1": "", "p2": "train", "p3": "train", "p4": "val", "p5": "val"}, size=32)
    place = ["--store", store.address]
    quick = [*place, "--network", "idc-2016", "--epochs", 2, "--batch-size", 16, "--threads", 1]
    done = here("train", *quick, "--out", "cv", "--folds", 2)
    assert done.exit_code == 0 and "figure on held-out patients" in done.output
    assert here("train", *quick, "--out", "m", "--cross-validation", "cv").exit_code == 0
    assert "On new patients: 2 networks" in (tmp_path / "m" / "CARD.md").read_text()
    done = here("evaluate", *place, "--model", "cv", "--split", "all", "--json")
    found = {model["model"]: model["figures"]["roc_auc"] for model in json.loads(done.stdout.splitlines()[0])["models"]}
    assert found["cv"]["value"] > 0.9
    assert "each of 4 slides is judged by the fold that never saw its patient" in done.stdout
    with pytest.raises(UsageError, match="--cross-validation m: holds no finished cross-validation"):
        here("train", *quick, "--out", "other", "--cross-validation", "m")


def test_what_cannot_be_trained_is_one_line(wsi_idc, here, make_store, tmp_path):
    store = make_store({"p0": ""})
    done = wsi_idc("train", "--store", store.address, "--out", "m", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "patient" in done.stderr
    with pytest.raises(UsageError, match="--recipe: 'magic'"):
        here("train", "--store", store.address, "--recipe", "magic")
    with pytest.raises(UsageError, match="none: no such store"):
        here("train", "--store", "none")
    for option in ("--mixup", "--smoothing", "--stem", "--teacher"):
        done = here("train", "--store", store.address, option, 1)
        assert done.exit_code == 2 and f"No such option '{option}'" in done.output


def test_a_helper_process_tells_nothing_and_ends_well(here, monkeypatch):
    monkeypatch.setattr(train, "run", lambda *_, **__: None)
    done = here("train")
    assert (done.exit_code, done.output) == (0, "")


def test_figures_say_whose_they_are_and_where_they_are_undefined(here, monkeypatch, tmp_path):
    nan = float("nan")
    figures = {"roc_auc": (0.75, nan, nan), "f1": (nan, nan, nan), "brier": (0.1, 0.05, 0.2)}
    monkeypatch.setattr(train, "run", lambda *_, **__: TrainResult(tmp_path / "m", 2, figures, []))
    lines = here("train").stdout.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["figure", "on", "validation", "patients", "value", "95", "%", "interval"],
        ["ROC", "AUC", "0.750", "undefined"],
        ["F1", "undefined", "undefined"],
        ["Brier", "score", "0.100", "0.050", "to", "0.200"],
    ]
    assert lines[4] == "these figures flatter: validation patients chose the epoch and the thresholds"
    folds = here("train", "--folds", 3).stdout
    assert "figure on held-out patients" in folds and "flatter" not in folds
    assert "figure on validation tiles" in here("train", "--split-by", "tile").stdout
    told = json.loads(here("train", "--json").stdout)
    assert told["figures"] == {"roc_auc": [0.75, None, None], "f1": [None] * 3, "brier": [0.1, 0.05, 0.2]}
    assert told["figures_on"] == "validation patients"
    assert tell([0.5, None, None]) == ("0.500", "undefined")
