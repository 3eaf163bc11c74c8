"""What runs a model: ONNX Runtime on the CPU; torch on CUDA, and for float32 where a bundle has weights and no graph.

All take uint8 tiles and give probabilities. On the CPU each batch is computed by one thread, and several batches side
by side: threads that share a batch wait for each other, and for whoever else keeps one of the cores busy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import ModelError
from wsi_idc.model.bundle import Form, LoadedBundle
from wsi_idc.settings import Precision

BATCH = 32
"""Tiles that go through a model at once. Always as many, with black ones where there are fewer: kernels add up in
another order where a batch has another size, and a probability must not depend on the tiles beside it."""


class Pending(Protocol):
    """A batch that was begun."""

    def result(self) -> NDArray[np.float32]:
        """Its probabilities, as `Runtime.predict` gives them; waits until they are there.

        Raises:
            ModelError: the graph gave another shape than it says.
        """


class Runtime(Protocol):
    """A loaded model. Several threads may use it at once.

    Attributes:
        per_tile: the shape of what it says of a tile: () for the probability of the second of two classes, or (k,).
        ahead: so many batches a caller should have begun before it asks for the first one's result, or the model waits.
    """

    per_tile: tuple[int, ...]
    ahead: int

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probabilities of any number of tiles, from uint8 (n, size, size, 3) RGB.

        Those of a tile are the same bits whatever tiles come with it, and however many threads there are.

        Returns:
            float32 (n,), P(classes[1]) of two classes; or (n, k), that of each class. They need not sum to one: a model
            may say of each class by itself whether it is there.

        Raises:
            ModelError: the graph gave another shape than it says.
        """

    def begin(self, tiles: NDArray[np.uint8]) -> Pending:
        """Begin what `predict` does, and return at once. The tiles must stay as they are until the result is there."""


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
    """See `Runtime.predict`."""
    return runtime.predict(tiles)


class _SideBySide(ABC):
    """A model whose batches are computed side by side, each by one thread.

    Args:
        per_tile: see `Runtime`.
        threads: so many; 0 for one a core.
        initializer: what each of them does first.
    """

    def __init__(self, per_tile: tuple[int, ...], threads: int, initializer: Callable[[], None] | None = None) -> None:
        if not threads:
            from dask.system import CPU_COUNT

            threads = CPU_COUNT
        self.per_tile, self.ahead = per_tile, threads + 1
        self._pool = ThreadPoolExecutor(threads, "score", initializer)

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Runtime.predict`."""
        begun = [self.begin(tiles[start : start + BATCH]) for start in range(0, len(tiles), BATCH)]
        return np.concatenate([np.empty((0, *self.per_tile), np.float32), *(part.result() for part in begun)])

    def begin(self, tiles: NDArray[np.uint8]) -> Pending:
        """See `Runtime.begin`."""
        return self._pool.submit(self._scored, tiles)

    def _scored(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = [self._score(_padded(tiles[start : start + BATCH])) for start in range(0, len(tiles), BATCH)]
        return np.concatenate([np.empty((0, *self.per_tile), np.float32), *parts])[: len(tiles)]

    @abstractmethod
    def _score(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probabilities of `BATCH` tiles, by the thread that calls."""


class OnnxRuntime(_SideBySide):
    """A bundle's graph in ONNX Runtime on the CPU: one session of one thread, run by several at once.

    Raises:
        ModelError: the graph cannot be loaded, or has another input or output than the bundle says, or its weights are
            in another file, which no digest would cover.
    """

    def __init__(self, bundle: LoadedBundle, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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
        per_tile = () if classes == 2 and ranks.get(graph.output) != 2 else (classes,)
        _check_port(bundle, "output", outputs, graph.output, "tensor(float)", (None, *per_tile))
        if per_tile and bundle.fields.context is not None:
            problem = f"context: is for a graph of one probability a tile, and {graph.output!r} gives {classes}"
            raise ModelError(bundle.folder, problem)

        super().__init__(per_tile, threads)

    def _score(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        (probability,) = self._session.run([self._output], {self._input: tiles})
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


class TorchRuntime(_SideBySide):
    """A bundle's network in torch, from safetensors: on CUDA, and on the CPU where there is no float32 graph.

    Raises:
        ModelError: the weights do not fit the network.
    """

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
        self._torch = torch
        self._device = torch.device(device)
        self._half = precision == "float16"
        if device == "cuda" and not self._half:
            torch.backends.cudnn.allow_tf32 = False  # which would make float32 a name for less
        self._network = load_network(bundle.fields.network, bundle.weights).eval().to(self._device)
        torch.get_num_threads()  # from here on, this thread's own number stays what it is
        alone = partial(torch.set_num_threads, 1) if device == "cpu" else None
        super().__init__((), threads if device == "cpu" else 1, alone)

    def _score(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        torch = self._torch
        batch = torch.from_numpy(tiles)
        if self._device.type == "cuda":
            batch = batch.pin_memory()
        with torch.inference_mode(), torch.autocast(self._device.type, torch.float16, enabled=self._half):
            logits = self._network(batch.to(self._device, non_blocking=True))
            probability: NDArray[np.float32] = torch.sigmoid(logits.float()).cpu().numpy()
        return probability


def _padded(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A batch of `BATCH` tiles, black ones at its end: the result is cut to those that were given."""
    if len(tiles) == BATCH:
        return np.ascontiguousarray(tiles)
    return np.concatenate([tiles, np.zeros((BATCH - len(tiles), *tiles.shape[1:]), np.uint8)])
