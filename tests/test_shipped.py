"""The model that ships: whole, honest about itself, the same in all its forms, and used when nothing else is said."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.model.runtime import TorchRuntime, load_runtime
from wsi_idc.settings import TileSpec
from wsi_idc.train.finish import card_text

MIB = 2**20


def test_it_is_a_bundle_for_the_default_tiles_and_no_larger_than_it_must_be():
    bundle = read_bundle(SHIPPED)
    assert bundle.fields.name == SHIPPED.name
    bundle.check_fits(TileSpec())
    assert bundle.form("auto") == bundle.form("int8")
    assert (bundle.form("auto").file, bundle.form("auto").engine) == ("model.int8.onnx", "openvino")
    assert bundle.form("float32").file == bundle.form("auto", cuda=True).file == bundle.weights.name
    assert (SHIPPED / "model.int8.onnx").stat().st_size < 28 * MIB
    assert bundle.weights.stat().st_size < 50 * MIB
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 80 * MIB


def test_its_card_says_who_trained_it_how_well_it_does_and_what_it_is_not_for():
    fields, card = read_bundle(SHIPPED).fields, (SHIPPED / "CARD.md").read_text(encoding="utf-8")
    training = fields.training
    trained, tuned = set(training["train_patients"]), set(training["val_patients"])
    assert len(trained) == training["data"]["train"]["patients"] > 0 < len(tuned)
    assert not trained & tuned
    for figures in (training["figures"], training["figures_alone"]):
        value, low, high = figures["roc_auc"]
        assert low < value < high
    assert card == card_text(json.loads((SHIPPED / "bundle.json").read_text(encoding="utf-8")))
    assert "not for diagnosis" in card
    assert "new patients, neighbours counted" in card
    for text in (card, (SHIPPED / "bundle.json").read_text(encoding="utf-8")):
        assert not re.search(r"/(tmp|home|root|work)/", text)


@pytest.fixture(scope="module")
def patches(idc_slide):
    """Patches of the complete slide 8867, every fourth: uint8 (n, 50, 50, 3) RGB, and bool (n,) whether IDC."""
    paths = sorted((idc_slide("8867") / "8867").rglob("*.png"))[::4]
    tiles = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return tiles, np.array([path.parent.name == "1" for path in paths])


def test_its_forms_agree_on_real_tiles(patches):
    tiles, truth = patches
    bundle = read_bundle(SHIPPED)
    int8, float32 = (load_runtime(bundle, kind, 2).predict(tiles) for kind in ("int8", "float32"))
    assert isinstance(load_runtime(bundle, "float32", 2), TorchRuntime)
    assert np.abs(int8 - float32).mean() < 0.02
    assert abs(roc_auc_score(truth, int8) - roc_auc_score(truth, float32)) < 0.005
    assert roc_auc_score(truth, int8) > 0.9


def test_a_real_slide_is_scored_and_judged_with_nothing_else_said(wsi_idc, idc_slide, tmp_path):
    slide = idc_slide("8867") / "idc-8867.tif"
    row = f"{slide},8867,{slide.with_suffix('.geojson')}"
    (tmp_path / "manifest.csv").write_text(f"path,patient_id,annotation\n{row}\n")
    for command in (["extract", "manifest.csv"], ["infer"]):
        done = wsi_idc(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = wsi_idc("evaluate", "--split", "all", "--alone", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "chosen and calibrated on 1 of these 1 patients" in done.stdout
    found = {model["model"]: model["figures"]["roc_auc"] for model in json.loads(done.stdout.splitlines()[0])["models"]}
    together, alone = (found[name]["value"] for name in (SHIPPED.name, f"{SHIPPED.name}, tiles alone"))
    assert together > alone > 0.9


def test_slides_cut_otherwise_are_refused_with_what_to_do(wsi_idc, idc_slide, tmp_path):
    slide = idc_slide("8867") / "idc-8867.tif"
    (tmp_path / "manifest.csv").write_text(f"path\n{slide}\n")
    assert wsi_idc("extract", "manifest.csv", "--tile-size", 64, "--no-pixels", cwd=tmp_path).returncode == 0
    done = wsi_idc("infer", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{SHIPPED.name}: tile.size_px is 50, the store's tiles have 64" in done.stderr
    assert "extract with --tile-size 50 --mpp 4" in done.stderr
