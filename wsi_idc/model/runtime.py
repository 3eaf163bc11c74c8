"""What runs a model: ONNX Runtime on the CPU; torch on CUDA, and for float32 where a bundle has weights and no graph.

All take uint8 tiles and give probabilities.
"""

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import ModelError
from wsi_idc.model.bundle import Form, LoadedBundle
from wsi_idc.settings import Precision

BATCH = 64
"""Tiles that torch is given at once on the CPU, whatever the batch that was asked for."""


class Runtime(Protocol):
    """A loaded model.

    Attributes:
        per_tile: the shape of what it says of a tile: () for the probability of the second of two classes, or (k,).
    """

    per_tile: tuple[int, ...]

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probabilities of each tile, from uint8 (n, size, size, 3) RGB.

        Returns:
            float32 (n,), P(classes[1]) of two classes; or (n, k), that of each class. They need not sum to one: a model
            may say of each class by itself whether it is there.

        Raises:
            ModelError: the graph gave another shape than it says.
        """


def load_runtime(bundle: LoadedBundle, form: Form | Precision, threads: int) -> Runtime:
    """The model, ready to run.

    Args:
        bundle: the model.
        form: how it runs; a precision stands for its form on the CPU.
        threads: of the CPU; 0 for one a core.

    Raises:
        ModelError: the bundle lacks the file, it cannot be loaded, or it is no longer the form's.
    """
    if isinstance(form, str):
        form = bundle.form(form)
    bundle.check_digest(form)
    if form.engine == "onnxruntime":
        return OnnxRuntime(bundle, bundle.folder / form.file, threads)
    return TorchRuntime(bundle, form.device, threads, precision="float16" if form.precision == "float16" else "float32")


def predict_all(runtime: Runtime, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The probabilities of any number of tiles, 256 at a time: see `Runtime.predict`."""
    parts = [runtime.predict(tiles[start : start + 256]) for start in range(0, len(tiles), 256)]
    return np.concatenate([np.empty((0, *runtime.per_tile), np.float32), *parts])


class OnnxRuntime:
    """A bundle's graph in ONNX Runtime on the CPU.

    Raises:
        ModelError: the graph cannot be loaded, or has another input or output than the bundle says, or its weights are
            in another file, which no digest would cover.
    """

    def __init__(self, bundle: LoadedBundle, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        # Weights outside the graph's file are looked for here, where none can be; else in the working directory.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path / "none"))
        try:
            self._session = onnxruntime.InferenceSession(
                path.read_bytes(), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            if "external data" in line.casefold():
                problem = f"graph.file: {path.name} keeps weights in another file (external data)"
                raise ModelError(bundle.folder, problem, "save the graph as one file") from error
            raise ModelError(bundle.folder, f"graph.file: {path.name} cannot be loaded ({line})") from error
        graph, size, classes = bundle.fields.graph, bundle.fields.tile.size_px, len(bundle.fields.classes)
        self._folder, self._input, self._output = bundle.folder, graph.input, graph.output
        _check_port(bundle, "input", self._session.get_inputs(), graph.input, "tensor(uint8)", (None, size, size, 3))
        outputs = self._session.get_outputs()
        ranks = {port.name: len(port.shape) for port in outputs}
        self.per_tile: tuple[int, ...] = () if classes == 2 and ranks.get(graph.output) != 2 else (classes,)
        _check_port(bundle, "output", outputs, graph.output, "tensor(float)", (None, *self.per_tile))
        if self.per_tile and bundle.fields.context is not None:
            problem = f"context: is for a graph of one probability a tile, and {graph.output!r} gives {classes}"
            raise ModelError(bundle.folder, problem)

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Runtime.predict`."""
        (probability,) = self._session.run([self._output], {self._input: np.ascontiguousarray(tiles)})
        wanted = (len(tiles), *self.per_tile)
        if probability.shape != wanted:
            problem = f"graph.output: {self._output!r} gave {probability.shape}, the bundle's classes need {wanted}"
            raise ModelError(self._folder, problem)
        return np.asarray(probability, np.float32)


def _check_port(
    bundle: LoadedBundle, which: str, found: list[Any], name: str, kind: str, shape: tuple[int | None, ...]
) -> None:
    """Check one input or output of the graph; None in `shape` is the free axis of tiles, a number may be free too."""
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
        needed = f"{kind} {wanted} is needed"
        if which == "output":
            needed += f" for the {len(bundle.fields.classes)} classes of bundle.json"
        raise ModelError(bundle.folder, f"graph.{which}: {name!r} is {port.type} {port.shape}, {needed}")


class TorchRuntime:
    """A bundle's network in torch, from safetensors: on CUDA, and on the CPU where there is no float32 graph.

    Raises:
        ModelError: the weights do not fit the network.
    """

    per_tile: tuple[int, ...] = ()

    def __init__(
        self,
        bundle: LoadedBundle,
        device: Literal["cpu", "cuda"],
        threads: int = 0,
        *,
        precision: Literal["float32", "float16"] = "float32",
    ) -> None:
        import torch

        from wsi_idc.model.network import load_network

        assert bundle.fields.network is not None
        if threads and device == "cpu":
            torch.set_num_threads(threads)
        self._torch = torch
        self._device = torch.device(device)
        self._half = precision == "float16"
        if device == "cuda" and not self._half:
            torch.backends.cudnn.allow_tf32 = False  # which would make float32 a name for less
        self._network = load_network(bundle.fields.network, bundle.weights).eval().to(self._device)

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Runtime.predict`."""
        if self._device.type == "cuda":
            return self._run(tiles)
        # torch adds up in another order where a batch has another size (differences to 1.2e-7): here all have one.
        parts = [self._run(_padded(tiles[start : start + BATCH])) for start in range(0, len(tiles), BATCH)]
        return np.concatenate([np.empty(0, np.float32), *parts])[: len(tiles)]

    def _run(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        torch = self._torch
        batch = torch.from_numpy(np.ascontiguousarray(tiles))
        cuda = self._device.type == "cuda"
        if cuda:
            batch = batch.pin_memory()
        with torch.inference_mode(), torch.autocast(self._device.type, torch.float16, enabled=self._half):
            logits = self._network(batch.to(self._device, non_blocking=True))
            probability: NDArray[np.float32] = torch.sigmoid(logits.float()).cpu().numpy()
        return probability


def _padded(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A batch of `BATCH` tiles, black ones at its end: the result is cut to those that were given."""
    missing = BATCH - len(tiles)
    return np.concatenate([tiles, np.zeros((missing, *tiles.shape[1:]), np.uint8)]) if missing else tiles
