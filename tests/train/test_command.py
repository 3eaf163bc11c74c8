"""From the command line: train, then the bundle that came out of it scores and is judged."""

import json


def test_train_infer_and_evaluate_fit_together(wsi_idc, make_store, tmp_path):
    splits = {f"p{index}": split for index, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 3)}
    store = make_store(splits, size=32)
    place = ["--store", store.address]
    done = wsi_idc(
        "train", *place, "--out", "m", "--network", "idc-2016", "--epochs", 2, "--batch-size", 16, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Research use only" in done.stdout
    card = json.loads((tmp_path / "m" / "bundle.json").read_text())
    assert sorted(card["training"]["train_patients"]) == ["p0", "p1", "p2", "p3"]
    assert sorted(card["training"]["val_patients"]) == ["p4", "p5"]
    done = wsi_idc("infer", *place, "--model", "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = wsi_idc("evaluate", *place, "--model", "m", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "evaluation" / "report.html").is_file()
    done = wsi_idc("evaluate", *place, "--model", "m", "--split", "train", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "m was trained on 4 of these 4 patients (p0, p1, p2, ...)" in done.stderr


def test_a_recipe_is_cross_validated_judged_and_calibrates_the_model_that_comes_after_it(wsi_idc, make_store, tmp_path):
    store = make_store({"p0": "", "p1": "", "p2": "train", "p3": "train", "p4": "val", "p5": "val"}, size=32)
    place = ["--store", store.address]
    quick = [*place, "--network", "idc-2016", "--epochs", 2, "--batch-size", 16]
    for arguments in (["--out", "cv", "--folds", 2], ["--out", "m", "--cross-validation", "cv"]):
        done = wsi_idc("train", *quick, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "On new patients: 2 networks" in (tmp_path / "m" / "CARD.md").read_text()
    done = wsi_idc("evaluate", *place, "--model", "cv", "--split", "all", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {model["model"]: model["figures"]["roc_auc"] for model in json.loads(done.stdout.splitlines()[0])["models"]}
    assert found["cv"]["value"] > 0.9
    assert "each of 4 slides is judged by the fold that never saw its patient" in done.stdout
    done = wsi_idc("train", *quick, "--out", "other", "--cross-validation", "m", cwd=tmp_path)
    assert done.returncode == 2
    assert "--cross-validation m: holds no finished cross-validation" in done.stderr


def test_what_cannot_be_trained_is_one_line(wsi_idc, make_store, tmp_path):
    store = make_store({"p0": ""})
    done = wsi_idc("train", "--store", store.address, "--out", "m", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "patient" in done.stderr
    done = wsi_idc("train", "--store", store.address, "--recipe", "magic", cwd=tmp_path)
    assert done.returncode == 2 and "--recipe: 'magic'" in done.stderr
    assert wsi_idc("train", "--store", "none", cwd=tmp_path).returncode == 2
