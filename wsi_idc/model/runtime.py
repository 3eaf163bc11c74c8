"""What runs a model: ONNX Runtime on the CPU; torch on CUDA, and for float32 where a bundle has weights and no graph.

All take uint8 tiles and give probabilities.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import ModelError
from wsi_idc.model.bundle import Form, LoadedBundle
from wsi_idc.settings import Precision


class Runtime(Protocol):
    """A loaded model."""

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """P(IDC) of each tile: float32 (n,), from uint8 (n, size, size, 3) RGB."""


def load_runtime(bundle: LoadedBundle, form: Form | Precision, threads: int) -> Runtime:
    """The model, ready to run.

    Args:
        bundle: the model.
        precision: of the graph on the CPU.
        threads: of the CPU; 0 for one a core.
        cuda: on a GPU.

    Raises:
        ModelError: the bundle lacks the file, or it cannot be loaded.
    """
    form = form if isinstance(form, Form) else bundle.form(form)
    if form.engine == "onnxruntime":
        return OnnxRuntime(bundle, bundle.folder / form.file, threads)
    return TorchRuntime(bundle, "cuda" if form.precision == "float16" else "cpu", threads)


def predict_all(runtime: Runtime, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """P(IDC) of any number of tiles, 256 at a time: float32 (n,), from uint8 (n, size, size, 3) RGB."""
    parts = [runtime.predict(tiles[start : start + 256]) for start in range(0, len(tiles), 256)]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


class OnnxRuntime:
    """A bundle's graph in ONNX Runtime on the CPU.

    Raises:
        ModelError: the graph cannot be loaded, or has another input or output than the bundle says.
    """

    def __init__(self, bundle: LoadedBundle, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(
                path.read_bytes(), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            line = str(error).splitlines()[0]
            raise ModelError(bundle.folder, f"graph.file: {path.name} cannot be loaded ({line})") from error
        graph, size = bundle.fields.graph, bundle.fields.tile.size_px
        self._input, self._output = graph.input, graph.output
        _check_port(bundle, "input", self._session.get_inputs(), graph.input, "tensor(uint8)", (None, size, size, 3))
        _check_port(bundle, "output", self._session.get_outputs(), graph.output, "tensor(float)", (None,))

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Runtime.predict`."""
        (probability,) = self._session.run([self._output], {self._input: np.ascontiguousarray(tiles)})
        return np.asarray(probability, np.float32)


def _check_port(
    bundle: LoadedBundle, which: str, found: list[Any], name: str, kind: str, shape: tuple[int | None, ...]
) -> None:
    """Check one input or output of the graph; None in `shape` is the free axis of tiles."""
    ports = {port.name: port for port in found}
    if name not in ports:
        raise ModelError(bundle.folder, f"graph.{which}: the graph has no {name!r}, it has {', '.join(ports)}")
    port = ports[name]
    sides = tuple(side if isinstance(side, int) else None for side in port.shape)
    fits = len(sides) == len(shape) and all(
        want is None if side is None and axis == 0 else side in (want, None) if want else side is None
        for axis, (side, want) in enumerate(zip(sides, shape, strict=True))
    )
    if port.type != kind or not fits or (which == "input" and len(found) != 1):
        wanted = "(" + ", ".join("n" if side is None else str(side) for side in shape) + ")"
        raise ModelError(
            bundle.folder, f"graph.{which}: {name!r} is {port.type} {port.shape}, {kind} {wanted} is needed"
        )


class TorchRuntime:
    """A bundle's network in torch, from safetensors: on CUDA, and on the CPU where there is no float32 graph.

    Raises:
        ModelError: the weights do not fit the network.
    """

    def __init__(self, bundle: LoadedBundle, device: str, threads: int = 0) -> None:
        import torch

        from wsi_idc.model.network import load_network

        assert bundle.fields.network is not None
        if threads and device == "cpu":
            torch.set_num_threads(threads)
        self._torch = torch
        self._device = torch.device(device)
        self._network = load_network(bundle.fields.network, bundle.weights).eval().to(self._device)

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Runtime.predict`; half precision inside on CUDA."""
        torch = self._torch
        batch = torch.from_numpy(np.ascontiguousarray(tiles))
        cuda = self._device.type == "cuda"
        if cuda:
            batch = batch.pin_memory()
        with torch.inference_mode(), torch.autocast(self._device.type, torch.float16, enabled=cuda):
            logits = self._network(batch.to(self._device, non_blocking=True))
            probability: NDArray[np.float32] = torch.sigmoid(logits.float()).cpu().numpy()
        return probability
