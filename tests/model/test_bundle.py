"""A bundle is checked field by field, and its graph port by port."""

import json
import os
import re

import numpy as np
import onnx
import pytest

from wsi_idc.errors import ModelError
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.runtime import load_runtime
from wsi_idc.settings import TileSpec


def edit(bundle, **changes):
    file = bundle / "bundle.json"
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        where, *rest = name.split("__")
        if rest:
            fields[where][rest[0]] = value
        elif value is None:
            del fields[where]
        else:
            fields[where] = value
    file.write_text(json.dumps(fields))
    return bundle


def test_a_bundle_gives_the_mean_of_its_tiles(bundle):
    runtime = load_runtime(read_bundle(bundle), "auto", 1)
    tiles = np.zeros((3, 50, 50, 3), np.uint8)
    tiles[1], tiles[2] = 51, 255
    assert runtime.predict(tiles).tolist() == pytest.approx([0, 0.2, 1])
    assert runtime.predict(tiles[::2]).dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format": "wsi-idc-model/7"}, "format"),
        ({"name": None}, "name: missing"),
        ({"name": "a/b"}, "name: contains /"),
        ({"tile": None}, "tile: missing"),
        ({"tile__size_px": "big"}, "tile.size_px"),
        ({"tile__mpp": 4000}, "tile.mpp"),
        ({"threshold": 1.5}, "threshold: "),
        ({"threshold": float("nan")}, "threshold: "),
        ({"classes": ["one"]}, "classes: "),
        ({"classes": ["one", "one"]}, "classes: two classes have one name"),
        ({"classes": ["one", " "]}, "classes: a class has no name"),
        ({"positive": "two"}, "positive: 'two' is none of the classes"),
        ({"classes": ["a", "b", "c"], "threshold": 0.5}, "threshold: of which class"),
        ({"classes": ["a", "b", "c"], "context": {"reach_um": 1.0, "spread": 1.0}}, "context: is only for bundles of"),
        ({"training": {"train_patients": None}}, "training.train_patients: is not a list of patient ids"),
        ({"training": {"val_patients": "8863"}}, "training.val_patients: "),
        ({"training": {"held_out_patients": [1.5]}}, "training.held_out_patients: "),
        ({"training": []}, "training: "),
        ({"graph__file": "../../etc/passwd"}, "graph.file"),
    ],
)
def test_a_wrong_field_is_named(bundle, changes, field):
    with pytest.raises(ModelError) as caught:
        read_bundle(edit(bundle, **changes))
    assert field in str(caught.value) and "\n" not in str(caught.value)


def test_fields_that_are_not_known_are_kept(bundle):
    assert read_bundle(edit(bundle, licence="CC0")).fields.licence == "CC0"


def test_what_is_no_bundle_is_refused(tmp_path, bundle):
    with pytest.raises(ModelError, match=r"no bundle\.json"):
        read_bundle(tmp_path / "none")
    (bundle / "bundle.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        read_bundle(bundle)


def test_a_graph_that_is_missing_or_damaged_is_named(bundle):
    whole = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"graph\.file"):
        load_runtime(read_bundle(bundle), "auto", 1)
    (bundle / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx is missing"):
        load_runtime(read_bundle(bundle), "auto", 1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"graph__input": "images"}, "graph.input: the graph has no 'images', it has tiles"),
        ({"graph__output": "p"}, "graph.output: the graph has no 'p'"),
        ({"tile__size_px": 64}, "graph.input: 'tiles' is uint8 (n, 50, 50, 3), uint8 (n, 64, 64, 3) is needed"),
    ],
)
def test_ports_that_differ_from_the_bundle_are_named(bundle, changes, field):
    with pytest.raises(ModelError, match="^[^\n]*" + re.escape(field)):
        load_runtime(read_bundle(edit(bundle, **changes)), "auto", 1)


def test_int8_is_taken_where_it_is_and_only_then(bundle):
    loaded = read_bundle(bundle)
    assert loaded.form("auto") == loaded.form("float32")
    assert (loaded.form("auto").file, loaded.form("auto").precision) == ("model.onnx", "float32")
    with pytest.raises(ModelError, match=r"graph\.int8"):
        loaded.form("int8")
    (bundle / "model.int8.onnx").write_bytes((bundle / "model.onnx").read_bytes())
    loaded = read_bundle(edit(bundle, graph__int8="model.int8.onnx"))
    assert loaded.form("auto") == loaded.form("int8")
    assert (loaded.form("int8").file, loaded.form("int8").precision) == ("model.int8.onnx", "int8")
    assert loaded.form("float32").file == "model.onnx"
    assert loaded.forms() == [loaded.form("int8"), loaded.form("float32")]


def test_what_a_map_is_made_from_tells_all_that_its_numbers_depend_on(bundle):
    loaded = read_bundle(bundle)
    first = loaded.made_from(loaded.form("auto"))
    assert json.loads(json.dumps(first)) == first
    assert {name: first[name] for name in ("engine", "precision", "device", "output", "classes")} == {
        "engine": "openvino",
        "precision": "float32",
        "device": "cpu",
        "output": "probability",
        "classes": ["non-IDC", "IDC"],
    }
    form = loaded.form("auto")
    for changes, names in (
        ({"threshold": 0.7}, {"threshold"}),
        ({"graph__output": "mean"}, {"output"}),
        ({"classes": ["IDC", "non-IDC"]}, {"classes", "positive class"}),
        ({"positive": "non-IDC"}, {"positive class"}),
        ({"context": {"reach_um": 900.0, "spread": 1.0, "threshold": 0.7}}, {"context"}),
    ):
        changed = read_bundle(edit(bundle, **{"threshold": 0.7, **changes})).made_from(form)
        assert {name for name in first if changed[name] != first[name]} == names | {"threshold"}
        (bundle / "bundle.json").write_text(json.dumps(loaded.fields.model_dump(mode="json")))


def test_a_digest_follows_its_file(bundle):
    loaded = read_bundle(bundle)
    form = loaded.form("auto")
    assert loaded.digests() == {form.digest}
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes().replace(b"mean", b"MEAN"))
    assert loaded.form("auto").digest != form.digest
    with pytest.raises(ModelError, match=r"model\.onnx changed since the run began"):
        load_runtime(loaded, form, 1)
    assert load_runtime(loaded, loaded.form("auto"), 1).predict(np.zeros((1, 50, 50, 3), np.uint8)) == 0


def colours(*pixels):
    return np.stack([np.full((50, 50, 3), pixel, np.uint8) for pixel in pixels])


@pytest.mark.parametrize("outputs", [2, 3, 5])
def test_a_graph_of_several_classes_gives_one_probability_a_class(make, tmp_path, outputs):
    classes = [f"class {number}" for number in range(outputs)]
    loaded = read_bundle(make.write_bundle(tmp_path / "model", outputs=outputs, classes=classes))
    runtime = load_runtime(loaded, "auto", 1)
    tiles = colours((255, 0, 0), (0, 255, 0), (0, 0, 0))
    found = runtime.predict(tiles)
    expected = np.exp(4.0 * tiles[:, 0, 0] / 255 @ np.eye(3, outputs))
    assert found.dtype == np.float32
    assert np.allclose(found, expected / expected.sum(axis=1, keepdims=True))
    assert runtime.predict(tiles[:0]).shape == (0, outputs)


def test_probabilities_of_classes_that_do_not_exclude_each_other_are_taken(make, tmp_path):
    folder = make.write_bundle(tmp_path / "model", outputs=3, classes=["IDC", "DCIS", "necrosis"])
    model = onnx.load(folder / "model.onnx")
    model.graph.node[-1].CopyFrom(onnx.helper.make_node("Sigmoid", ["logits"], ["probability"]))
    onnx.save(model, folder / "model.onnx")
    found = load_runtime(read_bundle(folder), "auto", 1).predict(colours((255, 255, 255)))
    assert np.allclose(found, 1 / (1 + np.exp(-4)))


def test_one_class_is_thresholded(make, tmp_path):
    fields = read_bundle(make.write_bundle(tmp_path / "two", threshold=0.3)).fields
    some = np.array([0.25, 1.0], np.float32)
    assert (fields.positive_index, fields.operating_point) == (1, 0.3)
    assert fields.positive_of(some).tolist() == [0.25, 1.0]
    assert fields.positive_of(np.stack([1 - some, some], axis=1)).tolist() == [0.25, 1.0]
    fields = read_bundle(make.write_bundle(tmp_path / "first", positive="non-IDC")).fields
    assert fields.positive_of(some).tolist() == [0.75, 0.0]
    three = {"outputs": 3, "classes": ["glass", "benign", "IDC"]}
    fields = read_bundle(make.write_bundle(tmp_path / "a", positive="IDC", threshold=0.4, **three)).fields
    assert (fields.operating_point, fields.positive_of(np.eye(3, dtype=np.float32)).tolist()) == (0.4, [0, 0, 1])
    loaded = read_bundle(make.write_bundle(tmp_path / "b", **three))
    assert loaded.fields.operating_point is None
    made_from = loaded.made_from(loaded.form("auto"))
    assert made_from["threshold"] is made_from["positive class"] is None
    with pytest.raises(ModelError, match=r"positive: .*add positive and threshold"):
        loaded.fields.positive_of(np.eye(3, dtype=np.float32))


@pytest.mark.parametrize(
    ("outputs", "fields", "said"),
    [
        (
            4,
            {"classes": ["a", "b", "c"]},
            "graph.output: 'probability' is float32 (n, 4), float32 (n, 3)",
        ),
        (1, {"classes": ["a", "b", "c"]}, "graph.output: 'probability' is float32 (n), float32 (n, 3)"),
        (3, {}, "graph.output: 'probability' is float32 (n, 3), float32 (n, 2)"),
        (2, {"context": {"reach_um": 1.0, "spread": 1.0}}, "context: is for a graph of one probability a tile"),
    ],
)
def test_a_graph_of_other_classes_than_the_bundle_is_refused(make, tmp_path, outputs, fields, said):
    loaded = read_bundle(make.write_bundle(tmp_path / "model", outputs=outputs, **fields))
    with pytest.raises(ModelError) as caught:
        load_runtime(loaded, "auto", 1)
    assert said in str(caught.value)


def some_of(folder, *nodes):
    """A bundle of three classes whose graph gives `some`, by nodes that are added to it."""
    model = onnx.load(folder / "model.onnx")
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.4, np.float32), "least"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([True, True, False]), "two"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "tiles' axis"))
    model.graph.output[0].name = "some"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "k"
    onnx.save(model, folder / "model.onnx")
    return read_bundle(edit(folder, graph__output="some"))


def test_a_graph_that_gives_another_shape_than_it_says_is_refused(make, tmp_path):
    """Where it can be known, before anything runs; where it depends on the tiles, by black ones, before a slide is."""
    node, three = onnx.helper.make_node, {"outputs": 3, "classes": ["a", "b", "c"]}
    always = make.write_bundle(tmp_path / "always", **three)
    with pytest.raises(ModelError, match=r"graph\.output: 'some' is float32 \(n, 2\), float32 \(n, 3\) is needed"):
        load_runtime(some_of(always, node("Compress", ["probability", "two"], ["some"], axis=1)), "auto", 1)
    at_times = some_of(
        make.write_bundle(tmp_path / "at times", **three),
        node("ReduceMax", ["probability", "tiles' axis"], ["most of each"], keepdims=0),
        node("Greater", ["most of each", "least"], ["which"]),
        node("Compress", ["probability", "which"], ["some"], axis=1),
    )
    with pytest.raises(ModelError, match=r"graph\.output: 'some' gave \(\d+, 0\), .* need \(\d+, 3\)"):
        load_runtime(at_times, "auto", 1)


def test_patients_are_text_whatever_they_were_written_as(bundle):
    training = {"train_patients": [8863, "8864"], "val_patients": [], "seed": 3, "figures": {"auc": [1, 2]}}
    found = read_bundle(edit(bundle, training=training)).fields.training
    assert found == {**training, "train_patients": ["8863", "8864"]}


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"[]", "must be an object"),
        (b"3", "must be an object"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"training": ' + b"[" * 100_000, "nested too deep"),
        (b"1" * 5000, "not JSON"),
        (b"\xff", "not JSON"),
        (b" " * (16 * 2**20 + 1), "larger than 16 MiB"),
    ],
    ids=["list", "number", "deep", "deep in a field", "long number", "not UTF-8", "huge"],
)
def test_a_bundle_that_is_odd_is_refused_in_one_line(bundle, contents, said):
    (bundle / "bundle.json").write_bytes(contents)
    with pytest.raises(ModelError, match=f"^[^\n]*{said}[^\n]*$"):
        read_bundle(bundle)


def test_a_bundle_that_cannot_be_read_says_why(bundle, monkeypatch):
    file = bundle / "bundle.json"
    with monkeypatch.context() as patched:
        patched.setattr(
            "pathlib.Path.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
        with pytest.raises(ModelError, match="cannot be read: Permission denied"):
            read_bundle(bundle)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ModelError, match="is not a file"):
        read_bundle(bundle)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(ModelError, match="cannot be read: Too many levels"):
        read_bundle(bundle)


@pytest.mark.parametrize("place", ["weights.bin", "../weights.bin", "/etc/hostname"])
def test_weights_outside_the_graph_are_never_taken(bundle, monkeypatch, place):
    """No digest would cover them, and the working directory would say which they are."""
    graph = onnx.load(bundle / "model.onnx")
    (weights,) = [tensor for tensor in graph.graph.initializer if tensor.name == "most"]
    for folder in (bundle, bundle.parent):
        (folder / "weights.bin").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=place)
    (bundle / "model.onnx").write_bytes(graph.SerializeToString())
    monkeypatch.chdir(bundle)
    with pytest.raises(ModelError, match=r"^[^\n]*model\.onnx keeps weights in another file[^\n]*; save[^\n]*$"):
        load_runtime(read_bundle(bundle), "auto", 1)


@pytest.mark.parametrize(("mpp", "fits"), [(4.0, True), (4.39, True), (3.61, True), (4.41, False), (3.59, False)])
def test_the_stores_resolution_may_differ_by_a_tenth(bundle, mpp, fits):
    loaded = read_bundle(bundle)
    if fits:
        loaded.check_fits(TileSpec(mpp=mpp))
    else:
        with pytest.raises(ModelError, match=r"tile\.mpp is 4 um/px.*extract with --tile-size 50 --mpp 4"):
            loaded.check_fits(TileSpec(mpp=mpp))


def test_the_stores_tile_size_must_be_the_same(bundle):
    with pytest.raises(ModelError, match=r"tile\.size_px is 50, the store's tiles have 64"):
        read_bundle(bundle).check_fits(TileSpec(size_px=64))


def test_the_published_model_is_a_bundle(published_model):
    runtime = load_runtime(read_bundle(published_model), "auto", 1)
    probability = runtime.predict(np.full((5, 50, 50, 3), 200, np.uint8))
    assert probability.shape == (5,) and len(set(probability.tolist())) == 1
