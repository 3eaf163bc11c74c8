"""The networks: uint8 tiles in, logits out, all preprocessing inside, so that training and inference cannot differ.

`TileNetwork` holds the resize, contrast, normalisation, body and calibration temperature; `export_onnx` writes the same
function as a graph, and `quantize` its int8 form.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from wsi_idc.errors import ModelError
from wsi_idc.files import write_whole
from wsi_idc.model.config import NetworkConfig

OPSET = 17
_SMALLEST_RANGE = 1.0 / 16.0


class TileNetwork(nn.Module):
    """Logits of tiles, calibrated.

    Attributes:
        config: what it was built from.
        temperature: float32 (), logits are divided by it (Guo et al., ICML 2017, arXiv:1706.04599).
    """

    temperature: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.body = _resnet50(config) if config.kind == "resnet50" else _idc_2016(config)
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("_mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        weights = resize_weights(config.tile_px, config.input_px) if config.tile_px != config.input_px else None
        self.register_buffer("_resize", weights, persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """Calibrated logits: float32 (n,), from uint8 (n, size, size, 3) RGB."""
        return self.calibrated(tiles.permute(0, 3, 1, 2).to(torch.float32) / 255.0)

    def calibrated(self, images: Tensor) -> Tensor:
        """Calibrated logits: float32 (n,), from float32 (n, 3, size, size) RGB in 0..1."""
        logits = self.logits(images)
        if self.config.flips == "averaged":
            mirrored = [self.logits(images.flip(axes)) for axes in ((3,), (2,), (2, 3))]
            logits = (logits + mirrored[0] + mirrored[1] + mirrored[2]) / 4.0
        return logits / self.temperature

    def logits(self, images: Tensor) -> Tensor:
        """Uncalibrated logits: float32 (n,), from float32 (n, 3, size, size) RGB in 0..1; what training minimises."""
        resize, mean, std = cast("Tensor | None", self._resize), cast(Tensor, self._mean), cast(Tensor, self._std)
        if resize is not None:
            images = torch.matmul(torch.matmul(resize, images), resize.transpose(0, 1))
        if self.config.contrast == "stretch":
            low = images.amin((1, 2, 3), keepdim=True)
            spread = (images.amax((1, 2, 3), keepdim=True) - low).clamp(min=_SMALLEST_RANGE)
            images = (images - low) / spread
        images = (images - mean) / std
        if not torch.onnx.is_in_onnx_export():
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.body(images).squeeze(1)
        return logits


class Probability(nn.Module):
    """P(IDC) of tiles: float32 (n,); what the ONNX graph computes."""

    def __init__(self, network: TileNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: Tensor) -> Tensor:
        """From uint8 (n, size, size, 3) RGB."""
        return torch.sigmoid(self.network(tiles))


def build_network(config: NetworkConfig | Mapping[str, Any]) -> TileNetwork:
    """A network with fresh weights, from torch's global random state.

    Raises:
        ModelError: a field of the config is unknown or out of range.
    """
    if not isinstance(config, NetworkConfig):
        try:
            config = NetworkConfig.model_validate(dict(config))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ModelError(f"network.{name}", first["msg"], "this bundle needs another wsi-idc") from error
    return TileNetwork(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_network(config: NetworkConfig | Mapping[str, Any], weights: Path) -> TileNetwork:
    """A network with the weights of a safetensors file, in evaluation mode.

    Raises:
        ModelError: the file is damaged or belongs to another network.
    """
    network = build_network(config)
    load_weights(network, weights)
    return network.eval()


def load_weights(network: TileNetwork, weights: Path) -> None:
    """Put the weights of a safetensors file into a network.

    Raises:
        ModelError: the file is damaged or belongs to another network.
    """
    state = read_weights(weights, "copy the bundle again")
    put_weights(network, state, weights, "the weights and bundle.json belong to different networks")


def read_weights(weights: Path, again: str) -> dict[str, Tensor]:
    """The arrays of a safetensors file, by name.

    Raises:
        ModelError: it is damaged; `again` is the advice.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(weights)
        return state
    except (SafetensorError, OSError) as error:
        raise ModelError(weights, f"weights cannot be read ({error})", again) from error


def put_weights(network: nn.Module, state: Mapping[str, Tensor], weights: Path, advice: str) -> None:
    """Put arrays into a network, every one in its place.

    Args:
        network: takes them.
        state: the arrays of a file; counters of batches seen, which no inference needs, may be absent.
        weights: that file.
        advice: what to do where they do not fit.

    Raises:
        ModelError: they belong to another network.
    """
    own = network.state_dict()
    for name in sorted(own.keys() | state.keys()):
        found, wanted = (tuple(part[name].shape) if name in part else None for part in (state, own))
        if found != wanted and not (found is None and name.endswith("num_batches_tracked")):
            problem = f"weights: {name} is {found or 'absent'}, the network has {wanted or 'none'}"
            raise ModelError(weights, problem, advice)
    network.load_state_dict({**own, **state})


def save_weights(network: TileNetwork, path: Path) -> None:
    """Write safetensors: matrices and kernels in half precision, all else as it is.

    The network's own weights become the rounded ones, so that every form of the model is the same function.
    """
    from safetensors.torch import save

    with torch.no_grad():
        for value in network.state_dict().values():
            if value.ndim > 1:
                value.copy_(value.half())
    state = {name: value.half() if value.ndim > 1 else value for name, value in network.state_dict().items()}
    # Not save_file, whose files only their owner may read: models are shared.
    write_whole(path, save({name: value.contiguous() for name, value in state.items()}))


def export_onnx(network: TileNetwork, path: Path) -> None:
    """Write the graph: `tiles` uint8 (n, size, size, 3) RGB -> `probability` float32 (n,)."""
    import warnings

    size = network.config.tile_px
    example = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    model = Probability(network).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            path,
            input_names=["tiles"],
            output_names=["probability"],
            dynamic_axes={"tiles": {0: "n"}, "probability": {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )


def quantize(graph: Path, out: Path, calibration: NDArray[np.uint8]) -> None:
    """Write the int8 graph: static, per channel, ranges at the 99.99th percentile of the calibration tiles.

    Weights take seven bits: without VNNI, eight-bit products saturate in sixteen-bit sums, and the result would depend
    on the processor.

    Args:
        graph: a float32 graph that `export_onnx` wrote.
        out: where the int8 graph goes.
        calibration: uint8 (n, size, size, 3) RGB, training tiles.
    """
    import contextlib
    import io
    import tempfile

    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=out.parent) as folder, contextlib.redirect_stdout(io.StringIO()):
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(graph, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out,
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "Relu", "MaxPool", "Add", "GlobalAveragePool"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": 99.99},
        )


class _Batches:
    """Calibration tiles, as ONNX Runtime's quantiser asks for them: batches of one size, a rest left out."""

    def __init__(self, tiles: NDArray[np.uint8], size: int = 64) -> None:
        size = min(size, len(tiles))
        starts = range(0, len(tiles) - size + 1, size)
        self._batches: Iterator[NDArray[np.uint8]] = iter([tiles[start : start + size] for start in starts])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The next batch, or None."""
        batch = next(self._batches, None)
        return None if batch is None else {"tiles": batch}

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> dict[str, NDArray[np.uint8]]:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch


def _resnet50(config: NetworkConfig) -> nn.Module:
    """ResNet-50 (He et al., CVPR 2016, arXiv:1512.03385) with one logit; residual branches start at zero."""
    from torchvision.models import resnet50

    network: nn.Module = resnet50(num_classes=1, zero_init_residual=True)
    if config.stem == "stride-1":
        cast(nn.Conv2d, network.conv1).stride = (1, 1)
    elif config.stem == "no-pool":
        network.maxpool = nn.Identity()
    if config.activation == "elu":
        _replace_relu(network)
    return network


def _replace_relu(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.ELU(inplace=True))
        else:
            _replace_relu(child)


def _idc_2016(config: NetworkConfig) -> nn.Module:
    """5x5 convolutions of 32, 32 and 64 channels with pooling, two linear layers (J Pathol Inform 2016;7:29)."""
    act = nn.ELU if config.activation == "elu" else nn.ReLU
    side = config.input_px
    for _ in range(3):
        side = (side - 1) // 2 + 1
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.MaxPool2d(3, 2, 1),
        act(),
        nn.Conv2d(32, 32, 5, padding=2),
        act(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Conv2d(32, 64, 5, padding=2),
        act(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Flatten(),
        nn.Linear(64 * side * side, 64),
        act(),
        nn.Linear(64, 1),
    )


def resize_weights(source: int, target: int) -> Tensor:
    """One axis of a bilinear resize with antialiasing: float32 (target, source), rows summing to one."""
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(source)[None, :] - centres[:, None]) / support
    weights = np.clip(1.0 - distance, 0.0, None)
    return torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))
