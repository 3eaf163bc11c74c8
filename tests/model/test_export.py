"""What is exported says in WSInfer, by WSInfer's own conventions, what the bundle says."""

import json
import zipfile

import numpy as np
import pytest

from tests.model.foreign import by_wsinfer
from wsi_idc.errors import ModelError, UsageError
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.exporting import export_model
from wsi_idc.model.foreign import ImportOptions
from wsi_idc.model.importing import import_model
from wsi_idc.model.runtime import load_runtime


@pytest.fixture
def trained(bundle):
    """A bundle with a network of random weights, resized, stretched, mirrored and calibrated."""
    import torch

    from wsi_idc.model.config import NetworkConfig
    from wsi_idc.model.network import build_network, export_onnx, save_weights

    torch.manual_seed(3)
    config = NetworkConfig(kind="idc-2016", input_px=32, contrast="stretch", flips="averaged")
    network = build_network(config).eval()
    network.temperature.fill_(0.05)
    save_weights(network, bundle / "model.safetensors")
    export_onnx(network, bundle / "model.onnx")
    context = {"reach_um": 4000.0, "spread": 2.0, "threshold": 0.4}
    fields = json.loads((bundle / "bundle.json").read_text())
    fields |= {"network": config.model_dump(mode="json"), "name": "ours", "context": context, "threshold": 0.3}
    (bundle / "bundle.json").write_text(json.dumps(fields))
    return bundle


@pytest.fixture
def exported(trained, tmp_path):
    """The model's folder in a folder of WSInfer models."""
    return export_model(read_bundle(trained), tmp_path / "models").folder


def tiles_of(size: int = 50) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (6, size, size, 3), dtype=np.uint8)


def test_wsinfer_says_of_a_tile_what_the_bundle_says(trained, exported):
    import torch

    config = json.loads((exported / "config.json").read_text())
    model = torch.jit.load(str(exported / "torchscript_model.pt"), map_location="cpu").eval()
    wanted = load_runtime(read_bundle(trained), "float32", 1).predict(tiles_of())
    assert np.ptp(wanted) > 0.01
    found = by_wsinfer(model, config, tiles_of())
    assert found.shape == (6, 2)
    assert np.abs(found[:, 1] - wanted).max() < 1e-5
    # One at a time, as the extension does on some devices.
    assert np.abs(by_wsinfer(model, config, tiles_of()[:1])[0, 1] - wanted[0]) < 1e-5
    with torch.no_grad():
        # Softmax of zero and the logit is its sigmoid.
        assert not model(torch.rand(3, 3, 50, 50))[:, 0].any()
        # QuPath rounds: a tile may come with a pixel more or less.
        assert model(torch.rand(1, 3, 51, 49)).shape == (1, 2)


def test_the_config_is_of_wsinfers_schema(trained, exported):
    """The rules of its model-config.schema.json, 1.0."""
    config = json.loads((exported / "config.json").read_text())
    required = {
        "spec_version": str,
        "architecture": str,
        "num_classes": int,
        "patch_size_pixels": int,
        "spacing_um_px": float,
        "class_names": list,
        "transform": list,
    }
    assert {name: type(value) for name, value in config.items()} == required
    assert config["spec_version"] == "1.0"
    assert (config["patch_size_pixels"], config["spacing_um_px"]) == (50, 4.0)
    assert config["class_names"] == ["non-IDC", "IDC"] and config["num_classes"] == 2
    assert config["transform"] == [{"name": "ToTensor"}]


def test_the_folder_is_whole_for_an_extension_without_a_network(exported, tmp_path):
    """What QuPath's extension looks for: a registry with `models`, and local/NAME with config.json and one .pt."""
    models = tmp_path / "models"
    assert exported == models / "local" / "ours"
    assert json.loads((models / "wsinfer-zoo-registry.json").read_text()) == {"models": {}}
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "torchscript_model.pt"]
    with zipfile.ZipFile(exported / "torchscript_model.pt") as archive:
        (version,) = (name for name in archive.namelist() if name.endswith("/version"))
        # Readable by libtorch from 1.6 on; the extension brings its own.
        assert int(archive.read(version)) <= 10
    words = (exported / "README.md").read_text()
    for needed in ("Research use only", "Model directory", "No context", "No threshold", "0.300", "local/ours"):
        assert needed in words


def test_what_is_in_the_folder_of_models_stays(trained, exported, tmp_path):
    registry = tmp_path / "models" / "wsinfer-zoo-registry.json"
    registry.write_text('{"models": {"theirs": {}}}')
    (exported / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="is there already; replace it with --force"):
        export_model(read_bundle(trained), tmp_path / "models")
    assert (exported / "README.md").read_text() == "mine"
    export_model(read_bundle(trained), tmp_path / "models", force=True)
    assert (exported / "README.md").read_text() != "mine"
    assert "theirs" in registry.read_text()
    assert [path.name for path in exported.parent.iterdir()] == ["ours"]


def test_an_exported_model_comes_back_in(trained, exported, tmp_path):
    done = import_model(exported, tmp_path / "back", ImportOptions(trust=True))
    wanted = load_runtime(read_bundle(trained), "float32", 1).predict(tiles_of())
    found = load_runtime(read_bundle(done.folder), "float32", 1).predict(tiles_of())
    assert np.abs(found - wanted).max() < 1e-3


def test_what_cannot_be_exported_is_refused(bundle, trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        export_model(read_bundle(trained), tmp_path / "file")
    (trained / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="weights cannot be read"):
        export_model(read_bundle(trained), tmp_path / "models")
    (trained / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="it is only a graph"):
        export_model(read_bundle(bundle), tmp_path / "models")
    assert not list(tmp_path.glob("models/local/*"))
    assert not list(tmp_path.glob("models/local/.*"))
