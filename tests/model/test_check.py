"""`wsi-idc model`: whether a bundle still answers what it answered, and which bundles there are."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from wsi_idc.cli.main import app
from wsi_idc.digests import checksum
from wsi_idc.model import check
from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.model.check import check_bundle
from wsi_idc.model.known import answers, made_tiles
from wsi_idc.model.runtime import load_runtime


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No second is spent on the rate."""
    monkeypatch.setattr(check, "_SECONDS", 0.0)


def run(*arguments):
    return CliRunner().invoke(app, ["model", *map(str, arguments)])


def edit(bundle, **changes):
    fields = json.loads((bundle / "bundle.json").read_text()) | changes
    (bundle / "bundle.json").write_text(json.dumps(fields))
    return read_bundle(bundle)


def known(bundle):
    return answers(load_runtime(read_bundle(bundle), "float32", 1).predict, 50).model_dump(mode="json")


def test_the_made_tiles_are_the_same_everywhere():
    """Pixels, to the last: answers are recorded for them. Another digest needs the shipped bundle's answers anew."""
    assert checksum(made_tiles(50)) == "ab23eff55153e3a4" == read_bundle(SHIPPED).fields.known.tiles
    assert made_tiles(224).shape == (32, 224, 224, 3)
    assert made_tiles(512).shape == (16, 512, 512, 3)
    shades = made_tiles(50).mean((1, 2, 3))
    assert np.ptp(shades) > 20


def test_the_shipped_model_answers_as_it_did():
    """Its int8 graph; its float32 weights are held against the graph in test_shipped."""
    bundle = read_bundle(SHIPPED)
    found = load_runtime(bundle, "int8", 1).predict(made_tiles(50))
    gaps = np.abs(found - np.array(bundle.fields.known.probability))
    assert gaps.max() < check.TOLERANCES["int8"] and gaps.mean() < 0.01


def test_a_bundle_that_answers_as_it_did_passes(bundle):
    edit(bundle, known=known(bundle))
    done = run("check", bundle)
    assert done.exit_code == 0, done.output
    assert "held against the answers that the bundle was written with" in done.stdout
    found = check_bundle(read_bundle(bundle), 1)
    assert [(form.form.file, form.largest) for form in found.forms] == [("model.onnx", pytest.approx(0, abs=1e-6))]
    assert found.forms[0].rate > 0


def test_a_bundle_that_answers_otherwise_fails(bundle):
    wrong = known(bundle)
    wrong["probability"][3] += 0.01
    edit(bundle, known=wrong)
    done = run("check", bundle)
    assert done.exit_code == 1
    assert "failed model.onnx in float32: a probability differs by 0.01, 0.001 is allowed" in done.stderr
    (form, last) = [json.loads(line) for line in run("check", bundle, "--json").stdout.splitlines()]
    assert form["largest_difference"] == pytest.approx(0.01, abs=1e-4) and form["fault"]
    assert last["event"] == "checked" and last["passed"] is False


def test_forms_that_disagree_fail_where_no_answers_are_known(bundle, make):
    """An int8 graph of another model: it is held against the float32 one."""
    make.write_bundle(bundle.parent / "other", name="other")
    import onnx

    other = onnx.load(bundle.parent / "other" / "model.onnx")
    other.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.array(999, np.float32), "most"))
    onnx.save(other, bundle / "model.int8.onnx")
    graph = {"file": "model.onnx", "int8": "model.int8.onnx", "input": "tiles", "output": "probability"}
    found = check_bundle(edit(bundle, graph=graph), 1)
    assert not found.passed and found.against == "model.onnx in float32"
    assert [bool(form.fault) for form in found.forms] == [False, True]
    (bundle / "model.int8.onnx").write_bytes(b"no graph")
    found = check_bundle(read_bundle(bundle), 1)
    assert "cannot be loaded" in found.forms[1].fault


def test_what_says_nothing_is_told(bundle):
    done = check_bundle(read_bundle(bundle), 1)
    assert done.passed and "nothing to hold it against" in done.notes[0]
    stale = known(bundle) | {"tiles": "0" * 16}
    assert "other tiles than this version makes" in check_bundle(edit(bundle, known=stale), 1).notes[0]
    few = known(bundle)
    few["probability"] = few["probability"][:2]
    assert "the known answers are (2,)" in check_bundle(edit(bundle, known=few), 1).forms[0].fault


def test_models_at_hand_are_listed_and_a_broken_one_is_named(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "broken")
    (tmp_path / "broken" / "bundle.json").write_text("{")
    shutil.copytree(bundle, tmp_path / "hollow")
    (tmp_path / "hollow" / "model.onnx").unlink()
    done = run("list", tmp_path)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[1].startswith("idc-resnet50  50 px at 4 um/px  non-IDC, IDC  0.335")
    assert any(line.startswith("broken") and "not JSON" in line for line in lines)
    assert any(line.startswith("mean") and "hollow: no graph and no weights" in line for line in lines)
    listed = [json.loads(line) for line in run("list", tmp_path, "--json").stdout.splitlines()]
    assert [model["name"] for model in listed] == ["idc-resnet50", "broken", "mean", "mean"]
    assert str(run("list", tmp_path / "none").exception).endswith("name a folder of bundles")


def test_show_says_what_a_bundle_is(bundle):
    training = {"train_patients": [7, "a"], "figures": {"roc_auc": [0.9, 0.8, None]}, "limits": ["\x1b[31mred"]}
    edit(bundle, training=training, licence="CC0", title="<b>")
    done = run("show", bundle)
    assert done.exit_code == 0, done.output
    told = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    told = {name: value.strip() for name, value in told.items()}
    assert (told["name"], told["licence"], told["title"], told["train patients"]) == ("mean", "CC0", "<b>", "2")
    assert told["forms"] == "float32 by openvino on cpu"
    assert told["limit"] == r"\x1b[31mred"
    assert told["roc_auc"].split() == ["0.900", "0.800", "to", "unknown"]
    assert "Research use only" in done.stdout
    record = json.loads(run("show", bundle, "--json").stdout)
    assert set(record["digests"]) == {"model.onnx"}
    assert "positive class             IDC" in run("show").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "none"), "no bundle.json there"),
        (("check", "none"), "no bundle.json there"),
        (("export", "none"), "no bundle.json there"),
        (("import", "none"), "no such file or folder"),
        (("import", "none", "--mean", "1,2"), "--mean: '1,2': three numbers are needed"),
        (("import", "none", "--layout", "chw"), "--layout: 'chw' is not known; give nchw or nhwc"),
        (("import", "none", "--output", "relu"), "give sigmoid, softmax or none"),
    ],
)
def test_a_slip_of_the_user_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    error = run(*arguments).exception
    assert words in str(error) and "\n" not in str(error) and error.exit_code == 2


def test_import_by_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graph = SHIPPED / "model.int8.onnx"
    options = ["--tile-size", "50", "--mpp", "4", "--classes", "non-IDC,IDC", "--name", "same", "--threshold", "0.3"]
    done = run("import", graph, *options)
    assert done.exit_code == 0, done.output
    assert "wrote same: use it with --model same. Research use only" in done.stdout
    assert run("show", "same").stdout.count("0.300") == 2
    assert "held against the answers" in run("check", "same").stdout
