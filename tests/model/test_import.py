"""Other people's models become bundles that say what they said; what cannot, or is not to be trusted, is refused."""

import io
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from scipy.special import expit

from tests.model.foreign import ARCHITECTURE, by_wsinfer, config, mean_graph, network, wsinfer_folder
from wsi_idc.errors import ModelError, UsageError
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.foreign import ImportOptions
from wsi_idc.model.graphs import Preparation
from wsi_idc.model.importing import import_model
from wsi_idc.model.known import made_tiles
from wsi_idc.model.runtime import load_runtime

TRUST = ImportOptions(trust=True)
STATED = ImportOptions(tile_px=50, mpp=4.0, classes=("non-IDC", "IDC"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def tiles_of(count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 50, 50, 3), dtype=np.uint8)


def says(folder: Path, tiles: np.ndarray) -> np.ndarray:
    return load_runtime(read_bundle(folder), "float32", 1).predict(tiles)


def refused(source: Path, options: ImportOptions = STATED, kind=ModelError, **changes) -> str:
    """The one line that an import ends with; nothing is left of it."""
    out = source.parent / "made"
    before = sorted(source.parent.iterdir())
    with pytest.raises(kind) as caught:
        import_model(source, out, replace(options, **changes))
    assert sorted(source.parent.iterdir()) == before
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    assert caught.value.exit_code == 2
    return line


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("script", [False, True])
def test_a_wsinfer_model_says_what_it_says_in_wsinfer(tmp_path, outputs, script):
    names = ["grade3", "tumor", "benign"][:outputs]
    made = wsinfer_folder(tmp_path / "zoo", outputs, weights=not script, script=script, class_names=names)
    done = import_model(tmp_path / "zoo", tmp_path / "bundle", ImportOptions(trust=script))
    tiles = np.concatenate([tiles_of(), made_tiles(50)])
    wanted = by_wsinfer(made, config(), tiles)
    found = says(done.folder, tiles)
    assert np.ptp(found) > 0.1
    assert np.abs(found - (wanted if outputs > 2 else wanted[:, -1])).max() < 1e-3
    fields = read_bundle(done.folder).fields
    assert fields.classes == (("not grade3", "grade3") if outputs == 1 else tuple(names))
    assert (fields.tile.size_px, fields.tile.mpp, fields.name) == (50, 4.0, "bundle")
    assert fields.operating_point == (None if outputs == 3 else 0.5)


def test_a_tile_is_resized_as_torchvision_resizes_a_picture():
    """Within one grey level where a sum lies between two."""
    tiles = tiles_of()
    for side in (32, 64):
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["images"], ["raw"])],
            "same",
            [onnx.helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, side, side])],
            [onnx.helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["n", 3, side, side])],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        from wsi_idc.model.graphs import Port, complete, run_graph

        preparation = Preparation(50, side, white=255)
        port = Port("images", TensorProto.FLOAT, (None, 3, side, side))
        whole = complete(model, port, "raw", preparation, "none", 3 * side * side)
        found = run_graph(whole, Path("graph"), "probability", tiles).reshape(-1, 3, side, side)
        gap = np.abs(found - preparation.prepared(tiles))
        assert gap.max() <= 1.0 and (gap > 0.5).mean() < 0.005


def test_a_torchvision_resnet_comes_in_by_its_name(tmp_path):
    """timm's ResNets have the names and the shapes of torchvision's."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    torch.manual_seed(1)
    made = resnet18(num_classes=1).eval()
    state = {name: value for name, value in made.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "weights.safetensors")
    options = replace(STATED, architecture="resnet18", resize_px=32, classes=("tumor",))
    done = import_model(tmp_path / "weights.safetensors", tmp_path / "bundle", options)
    transform = [{"name": "Resize", "arguments": {"size": 32}}, {"name": "ToTensor"}]
    wanted = by_wsinfer(made, {"transform": transform}, tiles_of())[:, 0]
    assert np.abs(says(done.folder, tiles_of()) - wanted).max() < 1e-3


@pytest.mark.parametrize(
    ("shape", "kind", "options", "of_mean"),
    [
        (("n", 3, 50, 50), TensorProto.FLOAT, {}, lambda m: expit(m / 255)),
        (("n", 50, 50, 3), TensorProto.FLOAT, {"white": 255, "mean": (128.0,) * 3}, lambda m: expit(m - 128)),
        (("n", 3, None, None), TensorProto.FLOAT, {"std": (0.1,) * 3}, lambda m: expit(m / 25.5)),
        ((1, 3, 50, 50), TensorProto.FLOAT16, {}, lambda m: expit(m / 255)),
        (("n", None, None, None), TensorProto.FLOAT, {"layout": "nhwc"}, lambda m: expit(m / 255)),
        (("n", 50, 50, 3), TensorProto.UINT8, {"mean": None, "std": None}, expit),
    ],
)
def test_an_onnx_graph_of_any_layout_and_kind(tmp_path, shape, kind, options, of_mean):
    path = mean_graph(tmp_path / "graph.onnx", shape, kind)
    done = import_model(path, tmp_path / "bundle", replace(STATED, **options))
    tiles = tiles_of()
    wanted = of_mean(tiles.mean((1, 2, 3), dtype=np.float64))
    assert np.abs(says(done.folder, tiles) - wanted).max() < 1e-3


@pytest.mark.parametrize(
    ("end", "outputs", "output", "expected"),
    [
        (("Identity",), 1, None, lambda z: expit(z[:, 0])),
        (("Identity",), 2, None, lambda z: (np.exp(z) / np.exp(z).sum(1, keepdims=True))[:, 1]),
        (("Identity",), 2, "sigmoid", lambda z: expit(z[:, 1])),
        (("Identity",), 3, None, lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)),
        (("Softmax", "Identity"), 2, None, lambda z: (np.exp(z) / np.exp(z).sum(1, keepdims=True))[:, 1]),
        (("Sigmoid",), 1, None, lambda z: expit(z[:, 0])),
        (("Identity",), 1, "none", lambda z: z[:, 0]),
    ],
)
def test_one_logit_means_sigmoid_and_several_softmax_unless_the_graph_has_it(tmp_path, end, outputs, output, expected):
    path = mean_graph(tmp_path / "graph.onnx", end=end, outputs=outputs)
    classes = ("a", "b", "c")[: max(outputs, 2)]
    done = import_model(path, tmp_path / "bundle", replace(STATED, classes=classes, output=output))
    logits = tiles_of().mean((1, 2, 3), dtype=np.float64)[:, None] / 255 * np.arange(1, outputs + 1)
    assert np.abs(says(done.folder, tiles_of()) - expected(logits)).max() < 1e-4
    assert any("ends in" in note for note in done.notes) == (end != ("Identity",))


def test_the_order_of_channels(tmp_path):
    """A graph that looks at the first channel alone."""
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "zero"], ["first"], axis=1),
            helper.make_node("ReduceMean", ["first", "axes"], ["probability"], keepdims=0),
        ],
        "first",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 50, 50])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n"])],
        [
            onnx.numpy_helper.from_array(np.array(0, np.int64), "zero"),
            onnx.numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "first.onnx")
    for channels, place in (("rgb", 0), ("bgr", 2)):
        options = replace(STATED, channels=channels, output="none")
        done = import_model(tmp_path / "first.onnx", tmp_path / channels, options)
        assert says(done.folder, tiles_of()) == pytest.approx(tiles_of()[..., place].mean((1, 2)) / 255, abs=1e-4)


def test_a_published_model_comes_in_from_its_graph(tmp_path, published_model):
    options = replace(STATED, mean=None, std=None)
    copied = _copy(published_model / "model.onnx", tmp_path)
    missing = refused(copied, replace(options, tile_px=None), kind=UsageError)
    assert missing.startswith("--tile-size: ")
    done = import_model(published_model / "model.onnx", tmp_path / "bundle", options)
    assert np.array_equal(says(done.folder, tiles_of()), says(published_model, tiles_of()))


def _copy(file: Path, folder: Path) -> Path:
    (folder / file.name).write_bytes(file.read_bytes())
    return folder / file.name


def test_the_bundle_remembers_where_it_came_from_and_what_it_answers(tmp_path):
    wsinfer_folder(tmp_path / "zoo")
    options = ImportOptions(name="theirs", title="A title", licence="CC-BY-4.0", positive="notumor", threshold=0.7)
    folder = import_model(tmp_path / "zoo", tmp_path / "bundle", options).folder
    fields = read_bundle(folder).fields
    assert (fields.name, fields.title, fields.licence) == ("theirs", "A title", "CC-BY-4.0")
    assert (fields.positive, fields.operating_point) == ("notumor", 0.7)
    known = fields.training["imported"]
    assert (known["from"], known["architecture"], known["activation"]) == ("WSInfer folder", ARCHITECTURE, "softmax")
    assert known["preparation"]["input_px"] == 32
    assert fields.known.probability == pytest.approx(says(folder, made_tiles(50)), abs=1e-5)
    card = (folder / "CARD.md").read_text()
    assert "Research use only" in card and "CC-BY-4.0" in card


def test_without_trust_torchscript_is_never_loaded(tmp_path, monkeypatch):
    import torch

    wsinfer_folder(tmp_path / "zoo", weights=False, script=True)
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was loaded"))
    assert "TorchScript is code that would run here; add --trust" in refused(tmp_path / "zoo", ImportOptions())


def test_weights_are_taken_before_torchscript(tmp_path, monkeypatch):
    import torch

    wsinfer_folder(tmp_path / "zoo", script=True)
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was loaded"))
    assert import_model(tmp_path / "zoo", tmp_path / "bundle", TRUST).difference < 1e-3


def test_torchscript_that_the_graph_does_not_follow_is_refused(tmp_path):
    """A choice by the pixels: a graph that is traced has one side of it."""
    import torch

    class Chooses(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = images.mean((1, 2, 3)).unsqueeze(1)
            return torch.cat([torch.zeros_like(means), torch.rand_like(means) * 9], 1)

    wsinfer_folder(tmp_path / "zoo", weights=False)
    torch.jit.script(Chooses()).save(str(tmp_path / "zoo" / "torchscript_model.pt"))
    assert "differs from it by" in refused(tmp_path / "zoo", TRUST)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    wsinfer_folder(tmp_path / "zoo", weights=False)
    with zipfile.ZipFile(tmp_path / "zoo" / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/0", bytes(80 * 2**20))
    assert "would unpack to 80 MiB" in refused(tmp_path / "zoo", TRUST)


def test_a_pickle_is_never_opened(tmp_path):
    class Runs:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    wsinfer_folder(tmp_path / "zoo", weights=False)
    for name in ("a.pt", "a.pth", "a.bin", "a.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(Runs()))
        assert "can hold code" in refused(tmp_path / name, TRUST)
    (tmp_path / "zoo" / "a.pt").write_bytes(pickle.dumps(Runs()))
    assert "is no TorchScript file" in refused(tmp_path / "zoo", TRUST)
    import torch

    stream = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, stream)
    (tmp_path / "zoo" / "a.pt").write_bytes(stream.getvalue())
    assert "cannot be loaded" in refused(tmp_path / "zoo", TRUST)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": None}, "architecture: missing"),
        ({"num_classes": 0}, "num_classes"),
        ({"class_names": ["one"]}, "class_names has 1 names, num_classes is 2"),
        ({"class_names": ["one", "one"]}, "two classes have one name"),
        ({"patch_size_pixels": 10**9}, "patch_size_pixels"),
        ({"spacing_um_px": 0}, "spacing_um_px"),
        ({"spacing_um_px": float("nan")}, "spacing_um_px"),
        ({"spec_version": "7"}, "spec_version"),
        ({"transform": []}, "transform: nothing"),
        ({"transform": [{"name": "ToTensor"}, {"name": "Resize", "arguments": {"size": 32}}]}, "in this order"),
        ({"transform": [{"name": "Run", "arguments": {}}]}, "transform.0.name"),
        ({"transform": [{"name": "Resize"}, {"name": "ToTensor"}]}, "Resize: size"),
        ({"transform": [{"name": "Resize", "arguments": {"size": 10**6}}, {"name": "ToTensor"}]}, "Resize: size"),
        (
            {"transform": [{"name": "Resize", "arguments": {"size": 32, "interpolation": 3}}, {"name": "ToTensor"}]},
            "Resize: interpolation is not known",
        ),
        (
            {"transform": [{"name": "ToTensor"}, {"name": "Normalize", "arguments": {"mean": [0, 0], "std": [1]}}]},
            "Normalize: mean: three numbers",
        ),
        (
            {
                "transform": [
                    {"name": "ToTensor"},
                    {"name": "Normalize", "arguments": {"mean": [0] * 3, "std": [0] * 3}},
                ]
            },
            "Normalize: std: must be above zero",
        ),
        ({"architecture": "hf-hub:somebody/something"}, "timm knows no"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, changes, words):
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    if "one" in changes.get("class_names", []):
        wsinfer_folder(tmp_path / "whole")
        (folder / "model.safetensors").write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes())
    assert words in refused(folder, ImportOptions())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b"[1]", "holds no fields"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": "' + b"x" * (16 * 2**20) + b'"}', "is larger than 16 MiB"),
    ],
)
def test_a_config_that_is_no_json_or_huge(tmp_path, content, words):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "config.json").write_bytes(content)
    assert words in refused(tmp_path / "zoo", ImportOptions())


def test_weights_that_do_not_fit_are_named(tmp_path):
    wsinfer_folder(tmp_path / "zoo")
    weights = tmp_path / "zoo" / "model.safetensors"
    whole = weights.read_bytes()
    (tmp_path / "zoo" / "config.json").write_text(json.dumps(config(num_classes=3, class_names=["a", "b", "c"])))
    assert "fc.bias is (2,), the network has (3,)" in refused(tmp_path / "zoo", ImportOptions())
    (tmp_path / "zoo" / "config.json").write_text(json.dumps(config()))
    for content, words in (
        (whole[: len(whole) // 2], "weights cannot be read"),
        ((2**60).to_bytes(8, "little") + b"{}", "weights cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (b"", "weights cannot be read"),
    ):
        weights.write_bytes(content)
        assert words in refused(tmp_path / "zoo", ImportOptions())
    weights.unlink()
    assert "has no model.safetensors" in refused(tmp_path / "zoo", ImportOptions())


def test_weights_need_their_architecture(tmp_path):
    from safetensors.torch import save_file

    save_file(network().state_dict(), tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    assert refused(path, kind=UsageError).startswith("--architecture: is needed")
    assert "timm knows no 'resnet5'" in refused(path, kind=UsageError, architecture="resnet5")
    assert "the weights are not of timm's resnet18" in refused(path, architecture="resnet18")
    line = refused(path, ImportOptions(architecture=ARCHITECTURE), kind=UsageError)
    assert line.startswith("--tile-size, --mpp, --classes, --mean, --std: must be said")


@pytest.mark.parametrize("place", ["../weights", "{folder}/weights", "link", "", "a\0b", "none"])
def test_weights_from_outside_the_graphs_folder_are_refused(tmp_path, place):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "weights").write_bytes(np.float32(1).tobytes())
    (inside / "link").symlink_to(tmp_path / "weights")
    path = mean_graph_of(inside / "graph.onnx", place.format(folder=tmp_path))
    words = "which is not there" if place == "none" else "outside its folder"
    assert words in refused(path)


def mean_graph_of(path: Path, external: str) -> Path:
    """`mean_graph` with its weights elsewhere."""
    try:
        return mean_graph(path, external=external)
    except Exception:
        return path


def test_weights_beside_the_graph_become_part_of_the_bundle(tmp_path):
    (tmp_path / "weights").write_bytes(np.float32(1).tobytes())
    done = import_model(mean_graph(tmp_path / "graph.onnx", external="weights"), tmp_path / "bundle", STATED)
    (tmp_path / "weights").unlink()
    assert says(done.folder, tiles_of()) == pytest.approx(expit(tiles_of().mean((1, 2, 3)) / 255), abs=1e-4)


@pytest.mark.parametrize(
    ("graph", "options", "kind", "words"),
    [
        ({"shape": ("n", 3, 50)}, {}, ModelError, "takes float of 3 axes"),
        ({"kind": TensorProto.DOUBLE}, {}, ModelError, "takes double of 4 axes"),
        ({"shape": ("n", 3, 224, 224)}, {}, ModelError, "add --resize 224"),
        ({"shape": ("n", 3, 50, 60)}, {}, ModelError, "square"),
        ({"shape": ("n", 1, 50, 50)}, {"layout": "nchw"}, ModelError, "square"),
        ({"shape": ("n", None, None, None)}, {}, UsageError, "--layout: is needed"),
        ({"shape": ("n", 3, 50, 50)}, {"layout": "nhwc"}, UsageError, "--layout: the graph's input is nchw"),
        ({"outputs": 3}, {}, ModelError, "classes: 2 are named, the model gives 3"),
        ({"scale": 9.0}, {"output": "none"}, ModelError, "no probabilities; say what they are"),
        ({"scale": float("nan")}, {}, ModelError, "no probabilities"),
        ({}, {"output": "softmax"}, UsageError, "softmax of one number is 1"),
        ({}, {"output_name": "other"}, ModelError, "has no output 'other'"),
        ({}, {"architecture": "resnet18"}, UsageError, "--architecture: is for weights"),
        ({}, {"mpp": 4000.0}, UsageError, "--mpp: 4000: must be from 0.05 to 100"),
        ({}, {"tile_px": 10**6}, UsageError, "--tile-size"),
        ({}, {"std": (0.0, 1.0, 1.0)}, UsageError, "--std"),
        ({}, {"positive": "c"}, UsageError, "--positive: 'c' is none of the classes"),
        ({}, {"threshold": 2.0}, UsageError, "--threshold"),
        ({}, {"name": "../a"}, UsageError, "--name"),
        ({"kind": TensorProto.UINT8, "shape": ("n", 50, 50, 3)}, {}, UsageError, "--mean: the graph takes uint8"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(tmp_path, graph, options, kind, words):
    assert words in refused(mean_graph(tmp_path / "graph.onnx", **graph), kind=kind, **options)


def test_what_is_no_model_is_refused(tmp_path, bundle):
    for name, content, words in (
        ("a.onnx", b"not a graph", "is no"),
        ("b.onnx", b"", "is no sound ONNX graph"),
        ("c.txt", b"", "is of no kind"),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in refused(tmp_path / name)
    assert "no such file" in refused(tmp_path / "absent.onnx")
    assert "is a bundle already" in refused(bundle)
    (tmp_path / "empty").mkdir()
    assert "no config.json there" in refused(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "is not a file" in refused(tmp_path / "pipe.onnx")


def test_a_bundle_that_is_there_is_replaced_only_when_it_is_said(tmp_path):
    path = mean_graph(tmp_path / "graph.onnx")
    import_model(path, tmp_path / "bundle", STATED)
    (tmp_path / "bundle" / "old").write_text("")
    with pytest.raises(UsageError, match="is there already; replace it with --force"):
        import_model(path, tmp_path / "bundle", STATED)
    with pytest.raises(ModelError):
        import_model(path, tmp_path / "bundle", replace(STATED, classes=("a", "b", "c")), force=True)
    assert (tmp_path / "bundle" / "old").exists()
    import_model(path, tmp_path / "bundle", STATED, force=True)
    assert not (tmp_path / "bundle" / "old").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match=r"has no bundle\.json, so it is nothing that --force replaces"):
        import_model(path, tmp_path / "mine", STATED, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "graph.onnx", "mine"]


def test_an_imported_bundle_scores_a_store_at_once(tmp_path, slides, recorder):
    from wsi_idc.catalogue import bundles_at_hand, stored_models
    from wsi_idc.extract import extract
    from wsi_idc.infer import infer
    from wsi_idc.manifest import read_manifest
    from wsi_idc.settings import ExtractSettings, InferSettings
    from wsi_idc.store import open_store

    store = tmp_path / "tiles.zarr"
    path = mean_graph(tmp_path / "graph.onnx")
    bundle = read_bundle(import_model(path, tmp_path / "theirs", STATED).folder)
    extract(read_manifest(slides)[:2], store, ExtractSettings(), listener=recorder)
    infer(store, bundle, InferSettings(), only=["a"], listener=recorder)
    (stored,) = stored_models(open_store(store), bundles_at_hand(tmp_path))
    assert (stored.name, stored.current, stored.stale, stored.slides) == ("theirs", 1, 0, 2)
    assert stored.bundle == str(tmp_path / "theirs")
    # Another model of that name: its maps are not these.
    import_model(path, tmp_path / "theirs", replace(STATED, white=255), force=True)
    (stored,) = stored_models(open_store(store), bundles_at_hand(tmp_path))
    assert (stored.current, stored.stale) == (0, 1)
    (stored,) = stored_models(open_store(store), bundles_at_hand(None))
    assert (stored.bundle, stored.current) == ("", 1)
