"""The networks, and that all their forms are one function."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import interpolate

from wsi_idc.errors import ModelError
from wsi_idc.model.config import NetworkConfig
from wsi_idc.model.network import build_network, export_onnx, load_network, quantize, save_weights

SMALL = NetworkConfig(kind="idc-2016", tile_px=20, input_px=16)


def some_tiles(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def trained(config: NetworkConfig):
    """A network whose normalisation has seen tiles and whose temperature is not one."""
    torch.manual_seed(1)
    network = build_network(config).train()
    with torch.no_grad():
        network(torch.from_numpy(some_tiles(8, config.tile_px)))
        network.temperature.fill_(1.7)
    return network.eval()


def test_the_2016_network_has_the_published_number_of_weights():
    network = build_network(NetworkConfig(kind="idc-2016", input_px=32))
    assert sum(value.numel() for value in network.parameters()) == 144_993


def test_resnet50_is_torchvisions_with_one_logit():
    from torchvision.models import resnet50

    own = {name: value.shape for name, value in build_network({"kind": "resnet50"}).body.state_dict().items()}
    assert own == {name: value.shape for name, value in resnet50(num_classes=1).state_dict().items()}


def test_elu_leaves_no_relu():
    names = {type(part).__name__ for part in build_network(NetworkConfig(activation="elu")).modules()}
    assert "ELU" in names
    assert "ReLU" not in names


@pytest.mark.parametrize(("stem", "side"), [("standard", 13), ("stride-1", 25), ("no-pool", 25)])
def test_gentle_stems_keep_more_of_the_tile(stem, side):
    body = build_network(NetworkConfig(stem=stem)).body
    with torch.no_grad():
        found = body.maxpool(body.relu(body.bn1(body.conv1(torch.zeros(1, 3, 50, 50)))))
    assert tuple(found.shape[2:]) == (side, side)


@pytest.mark.parametrize("target", [32, 64])
def test_resizing_is_torchs_antialiased_bilinear(target):
    network = build_network(NetworkConfig(kind="idc-2016", tile_px=50, input_px=target))
    images = torch.rand(2, 3, 50, 50)
    own = network._resize @ images @ network._resize.T
    assert torch.allclose(own, interpolate(images, (target, target), mode="bilinear", antialias=True), atol=1e-6)


def test_contrast_is_spread_over_the_full_range_and_flat_tiles_stay_finite():
    network = build_network(SMALL.model_copy(update={"contrast": "stretch"})).eval()
    images = torch.rand(3, 3, 20, 20)
    with torch.no_grad():
        assert torch.allclose(network.logits(images * 0.3 + 0.2), network.logits(images * 0.6), atol=1e-4)
        assert torch.isfinite(network.logits(torch.full((1, 3, 20, 20), 0.5))).all()


def test_averaged_flips_do_not_care_which_way_a_tile_lies():
    network = trained(SMALL.model_copy(update={"flips": "averaged"}))
    tiles = torch.from_numpy(some_tiles(4, 20))
    with torch.no_grad():
        assert torch.allclose(network(tiles), network(tiles.flip(1)), atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL.model_copy(update={"contrast": "stretch", "activation": "elu", "flips": "averaged"}),
        NetworkConfig(kind="resnet50", tile_px=32, input_px=32),
    ],
    ids=["idc-2016", "all preprocessing", "resnet50"],
)
def test_network_weights_and_graph_are_one_function(tmp_path: Path, config):
    network = trained(config)
    save_weights(network, tmp_path / "model.safetensors")
    export_onnx(network, tmp_path / "model.onnx")
    loaded = load_network(config.model_dump(mode="json"), tmp_path / "model.safetensors")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 5):
        tiles = some_tiles(count, config.tile_px)
        (found,) = session.run(["probability"], {"tiles": tiles})
        with torch.no_grad():
            logits = loaded(torch.from_numpy(tiles))
            assert torch.equal(logits, network(torch.from_numpy(tiles)))
        assert logits.shape == found.shape == (count,)
        assert np.abs(found - torch.sigmoid(logits).numpy()).max() < 1e-5


def test_int8_stays_near_float32_for_any_number_of_calibration_tiles(tmp_path: Path):
    export_onnx(trained(SMALL), tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", some_tiles(70, 20))
    tiles = some_tiles(9, 20)
    exact, near = (
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"tiles": tiles})[0]
        for name in ("model.onnx", "int8.onnx")
    )
    assert np.abs(exact - near).max() < 0.02
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["int8.onnx", "model.onnx"]


def test_int8_weights_take_seven_bits_so_that_no_processor_saturates(tmp_path: Path):
    import onnx
    from onnx import numpy_helper

    export_onnx(trained(SMALL), tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", some_tiles(16, 20))
    values = [numpy_helper.to_array(value) for value in onnx.load(tmp_path / "int8.onnx").graph.initializer]
    kernels = [value for value in values if value.dtype == np.int8 and value.ndim > 1]
    assert kernels
    assert max(int(np.abs(value.astype(int)).max()) for value in kernels) <= 64


def test_an_unknown_field_is_named():
    with pytest.raises(ModelError, match=r"network\.colour"):
        build_network({"kind": "resnet50", "colour": "green"})


def test_damaged_weights_are_named(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ModelError, match=r"model\.safetensors: weights cannot be read"):
        load_network(SMALL, tmp_path / "model.safetensors")


def test_weights_of_another_network_are_refused(tmp_path: Path):
    save_weights(trained(SMALL), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="weights: body"):
        load_network(SMALL.model_copy(update={"input_px": 32}), tmp_path / "model.safetensors")
