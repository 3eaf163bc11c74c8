"""A bundle is checked field by field, and its graph port by port."""

import json

import numpy as np
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
        ({"threshold": 1.5}, "threshold"),
        ({"classes": ["one"]}, "classes"),
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
        ({"tile__size_px": 64}, "graph.input: 'tiles' is tensor"),
    ],
)
def test_ports_that_differ_from_the_bundle_are_named(bundle, changes, field):
    with pytest.raises(ModelError, match="^[^\n]*" + field.replace(".", r"\.")):
        load_runtime(read_bundle(edit(bundle, **changes)), "auto", 1)


def test_int8_is_taken_where_it_is_and_only_then(bundle):
    loaded = read_bundle(bundle)
    assert loaded.model_file("auto") == loaded.model_file("float32") == bundle / "model.onnx"
    with pytest.raises(ModelError, match=r"graph\.int8"):
        loaded.model_file("int8")
    (bundle / "model.int8.onnx").write_bytes((bundle / "model.onnx").read_bytes())
    loaded = read_bundle(edit(bundle, graph__int8="model.int8.onnx"))
    assert loaded.model_file("auto") == loaded.model_file("int8") == bundle / "model.int8.onnx"
    assert loaded.model_file("float32") == bundle / "model.onnx"


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
