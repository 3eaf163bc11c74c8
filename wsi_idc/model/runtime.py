"""What runs a model: OpenVINO on the CPU; torch on CUDA, and for float32 where a bundle has weights and no graph.

All take uint8 tiles and give probabilities. On the CPU each batch is computed by one thread, and several batches side
by side: threads that share a batch wait for each other, and for whoever else keeps one of the cores busy.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import log2
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_idc.cores import cores
from wsi_idc.errors import ModelError
from wsi_idc.model.bundle import Form, LoadedBundle
from wsi_idc.settings import Precision

_MOST_TILES, _LEAST_TILES, _PIXELS = 64, 4, 2**19
"""Of a batch on the CPU; of large tiles fewer, whose activations would leave the cache. Of 50 px, 64 cost 7 % less time
each than 32 and 23 % less than 16; of 224 px, 8 cost 13 % less than 16."""


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
        batch: tiles that go through it at once, always as many, with black ones where there are fewer: kernels add up
            in another order where a batch has another size, and a probability must not depend on the tiles beside it.
        ahead: so many batches a caller should have begun before it asks for the first one's result, or the model waits.
    """

    per_tile: tuple[int, ...]
    batch: int
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
    if form.engine == "openvino":
        return OpenVinoRuntime(bundle, bundle.folder / form.file, threads)
    if form.device == "cpu":
        return TorchRuntime(bundle, threads)
    from wsi_idc.model.gpu import GpuRuntime

    return GpuRuntime(bundle, half=form.precision == "float16")


def batch_of(size_px: int, pixels: int = _PIXELS, least: int = _LEAST_TILES, most: int = _MOST_TILES) -> int:
    """Tiles of a batch, by default on the CPU: a power of two, as `least` and `most` must be.

    Args:
        size_px: side of the tiles.
        pixels: that a batch has, or fewer.
        least, most: tiles that it has all the same.
    """
    return int(2 ** np.clip(int(log2(pixels / size_px**2)), log2(least), log2(most)))


class _SideBySide(ABC):
    """A model whose batches are computed side by side, each by one thread.

    Args:
        per_tile: see `Runtime`.
        size_px: side of the tiles.
        threads: so many.
        initializer: what each of them does first.
    """

    def __init__(
        self, per_tile: tuple[int, ...], size_px: int, threads: int, initializer: Callable[[], None] | None = None
    ) -> None:
        self.per_tile, self.batch, self.ahead = per_tile, batch_of(size_px), threads + 1
        self._pool = ThreadPoolExecutor(threads, "score", initializer)

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Runtime.predict`."""
        begun = [self.begin(part) for part in self._parts(tiles)]
        return self._whole([part.result() for part in begun])

    def begin(self, tiles: NDArray[np.uint8]) -> Pending:
        """See `Runtime.begin`."""
        return self._pool.submit(self._scored, tiles)

    def _scored(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = [self._score(padded(part, self.batch))[: len(part)] for part in self._parts(tiles)]
        return self._whole(parts)

    def _parts(self, tiles: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        return [tiles[start : start + self.batch] for start in range(0, len(tiles), self.batch)]

    def _whole(self, parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate([np.empty((0, *self.per_tile), np.float32), *parts])

    @abstractmethod
    def _score(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probabilities of `batch` tiles, by the thread that calls."""


def padded(tiles: NDArray[np.uint8], batch: int) -> NDArray[np.uint8]:
    """A whole batch, black tiles at its end."""
    if len(tiles) == batch:
        return np.ascontiguousarray(tiles)
    return np.concatenate([tiles, np.zeros((batch - len(tiles), *tiles.shape[1:]), np.uint8)])


class OpenVinoRuntime(_SideBySide):
    """A bundle's graph in OpenVINO on the CPU: one compiled model, whose threads share its weights.

    Raises:
        ModelError: the graph cannot be loaded, or has another input or output than the bundle says, or its weights are
            in another file, which no digest would cover.
    """

    def __init__(self, bundle: LoadedBundle, path: Path, threads: int) -> None:
        openvino = _openvino()
        fields, threads = bundle.fields, threads or cores()
        graph, size, classes = fields.graph, fields.tile.size_px, len(fields.classes)
        data = path.read_bytes()
        # The place of each part of such weights is named so.
        if b"location" in data:
            from wsi_idc.model.graphs import keeps_weights_elsewhere

            if keeps_weights_elsewhere(data):
                problem = f"graph.file: {path.name} keeps weights in another file (external data)"
                raise ModelError(bundle.folder, problem, "save the graph as one file")
        core = openvino.Core()
        try:
            model = core.read_model(data)
        except Exception as error:
            raise _unusable(bundle, path, error) from error
        _check_port(bundle, "input", model.inputs, graph.input, "uint8", (None, size, size, 3))
        (rank,) = [len(port.partial_shape) for port in model.outputs if graph.output in port.names] or [0]
        per_tile = () if classes == 2 and rank != 2 else (classes,)
        _check_port(bundle, "output", model.outputs, graph.output, "float32", (None, *per_tile))
        if per_tile and fields.context is not None:
            problem = f"context: is for a graph of one probability a tile, and {graph.output!r} gives {classes}"
            raise ModelError(bundle.folder, problem)
        super().__init__(per_tile, size, threads)
        # Where a processor has bfloat16, float32 parts of a graph would run in it; pinned threads would share a core
        # with another process while a second one is idle.
        options = {
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model.reshape([self.batch, size, size, 3])
            compiled = core.compile_model(model, "CPU", options)
        except Exception as error:
            raise _unusable(bundle, path, error) from error
        self._bundle, self._path, self._output = bundle, path, graph.output
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(threads):
            self._idle.put(compiled.create_infer_request())
        with _FIRST:
            self._score(np.zeros((self.batch, size, size, 3), np.uint8))

    def _score(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        request = self._idle.get()
        try:
            request.infer([tiles], share_inputs=True)
            probability = np.array(request.get_tensor(self._output).data, np.float32)
        except RuntimeError as error:
            raise _unusable(self._bundle, self._path, error, "run") from error
        finally:
            self._idle.put(request)
        wanted = (len(tiles), *self.per_tile)
        if probability.shape != wanted:
            problem = f"graph.output: {self._output!r} gave {probability.shape}, the bundle's classes need {wanted}"
            raise ModelError(self._bundle.folder, problem)
        return probability


def _openvino() -> Any:
    """OpenVINO without its model converter, whose import reports to a server on the internet that it was imported."""
    converter = "openvino.tools.ovc"
    with _FIRST:
        blocked = converter not in sys.modules
        if blocked:
            sys.modules[converter] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            if blocked:
                del sys.modules[converter]
    return openvino


_FIRST = Lock()
"""Held by who does something of OpenVINO's for the first time. Two threads that give it their first array at once wait
for each other for ever: one holds a lock of its binding's and waits for Python's, the other the reverse (2026.4)."""


def _unusable(bundle: LoadedBundle, path: Path, error: Exception, how: str = "loaded") -> ModelError:
    """What OpenVINO says of a graph comes after lines that name its own files."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from ")]
    reason = (lines or [type(error).__name__])[0]
    return ModelError(bundle.folder, f"graph.file: {path.name} cannot be {how} ({reason})")


_KINDS = {"u8": "uint8", "f32": "float32"}


def _check_port(
    bundle: LoadedBundle, which: str, found: list[Any], name: str, kind: str, shape: tuple[int | None, ...]
) -> None:
    """Check one input or output of the graph; None in `shape` is the free axis of tiles, a number may be free too."""
    ports = {port_name: port for port in found for port_name in sorted(port.names)}
    if name not in ports:
        raise ModelError(bundle.folder, f"graph.{which}: the graph has no {name!r}, it has {', '.join(ports)}")
    port = ports[name]
    element = port.element_type.to_string()
    sides = tuple(None if side.is_dynamic else side.get_length() for side in port.partial_shape)
    fits = len(sides) == len(shape) and all(
        want is None if side is None and axis == 0 else side in (want, None) if want else side is None
        for axis, (side, want) in enumerate(zip(sides, shape, strict=True))
    )
    if _KINDS.get(element) != kind or not fits or (which == "input" and len(found) != 1):
        needed = f"{kind} {_shape(shape)} is needed"
        if which == "output":
            needed += f" for the {len(bundle.fields.classes)} classes of bundle.json"
        told = f"{_KINDS.get(element, element)} {_shape(sides)}"
        raise ModelError(bundle.folder, f"graph.{which}: {name!r} is {told}, {needed}")


def _shape(sides: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("n" if side is None else str(side) for side in sides) + ")"


class TorchRuntime(_SideBySide):
    """A bundle's network in torch on the CPU, in float32, from safetensors.

    Raises:
        ModelError: the weights do not fit the network.
    """

    def __init__(self, bundle: LoadedBundle, threads: int = 0) -> None:
        import torch

        from wsi_idc.model.network import load_network

        assert bundle.fields.network is not None
        self._torch = torch
        self._network = load_network(bundle.fields.network, bundle.weights).eval()
        torch.get_num_threads()  # from here on, the number of this thread stays what it is
        alone = partial(torch.set_num_threads, 1)
        super().__init__((), bundle.fields.tile.size_px, threads or cores(), alone)

    def _score(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        torch = self._torch
        with torch.inference_mode():
            probability: NDArray[np.float32] = torch.sigmoid(self._network(torch.from_numpy(tiles))).numpy()
        return probability
