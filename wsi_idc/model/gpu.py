"""torch on a GPU, kept busy: batches go there on a stream of their own while the one before is computed."""

from dataclasses import dataclass
from itertools import cycle
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from wsi_idc.model.bundle import LoadedBundle
from wsi_idc.model.network import load_network
from wsi_idc.model.runtime import batch_of

_MOST_TILES, _LEAST_TILES, _PIXELS = 1024, 16, 2**22
"""Of a batch: so many that computing it takes longer than telling the GPU what to compute, about a millisecond."""


@dataclass(frozen=True)
class _Slot:
    """Where a batch lies on its way.

    Attributes:
        host: uint8 (batch, size, size, 3), pinned, so that the GPU fetches it by itself.
        tiles: the same on the GPU.
        copied: when the GPU has them, and the host's may be written again.
        computed: when the GPU's may be.
    """

    host: Tensor
    tiles: Tensor
    copied: Any
    computed: Any


@dataclass(frozen=True)
class _Begun:
    """Probabilities that the GPU will have written; each with the event after which it has, and how many count."""

    parts: list[tuple[Tensor, Any, int]]

    def result(self) -> NDArray[np.float32]:
        """See `Pending.result`."""
        found = [np.empty(0, np.float32)]
        for probability, done, count in self.parts:
            done.synchronize()
            found.append(probability.numpy()[:count])
        return np.concatenate(found)


class GpuRuntime:
    """A bundle's network in torch on a GPU, from safetensors.

    Args:
        bundle: the model.
        half: compute in float16; what comes before the network and after it stays float32.
        device: "cpu" runs the same steps there, one after the other.

    Raises:
        ModelError: the weights do not fit the network.
    """

    per_tile: tuple[int, ...] = ()
    ahead: int = 3  # one is computed, one is on its way, and one is what the caller makes

    def __init__(self, bundle: LoadedBundle, *, half: bool, device: str = "cuda") -> None:
        assert bundle.fields.network is not None
        self._device = torch.get_device_module(device)
        self._pinned = device == "cuda"
        if not half:
            torch.backends.cudnn.allow_tf32 = False  # which would make float32 a name for less
        network = load_network(bundle.fields.network, bundle.weights).eval()
        # Normalisation within the convolutions: half as many passes over what is computed, and its variances, which
        # are small, are never rounded to float16.
        network.body = fuse(network.body)
        if half:
            network.body = _Half(network.body)
        self._network = network.to(device)
        size = bundle.fields.tile.size_px
        self.batch = batch_of(size, _PIXELS, _LEAST_TILES, _MOST_TILES)
        self._copying, self._computing = self._device.Stream(), self._device.Stream()
        shape = (self.batch, size, size, 3)
        self._slots = cycle(
            [
                _Slot(
                    torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned),
                    torch.empty(shape, dtype=torch.uint8, device=device),
                    self._device.Event(),
                    self._device.Event(),
                )
                for _ in range(2)
            ]
        )
        self._lock = Lock()
        # The weights came by another stream than the two.
        self._device.synchronize()

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Runtime.predict`."""
        return self.begin(tiles).result()

    def begin(self, tiles: NDArray[np.uint8]) -> _Begun:
        """See `Runtime.begin`; waits only while the tiles before the last ones are still on their way to the GPU."""
        starts = range(0, len(tiles), self.batch)
        with self._lock, torch.inference_mode():
            return _Begun([self._begin(tiles[start : start + self.batch]) for start in starts])

    def _begin(self, tiles: NDArray[np.uint8]) -> tuple[Tensor, Any, int]:
        slot, done = next(self._slots), self._device.Event()
        slot.copied.synchronize()
        slot.host[: len(tiles)].copy_(torch.from_numpy(np.ascontiguousarray(tiles)))
        slot.host[len(tiles) :].zero_()
        with self._device.stream(self._copying):
            self._copying.wait_event(slot.computed)
            slot.tiles.copy_(slot.host, non_blocking=True)
            slot.copied.record(self._copying)
        with self._device.stream(self._computing):
            self._computing.wait_event(slot.copied)
            probability = torch.sigmoid(self._network(slot.tiles))
            slot.computed.record(self._computing)
            found = torch.empty(probability.shape, pin_memory=self._pinned)
            found.copy_(probability, non_blocking=True)
            done.record(self._computing)
        return found, done, len(tiles)


class _Half(nn.Module):
    """A network in float16, between pictures and logits in float32."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.half()

    def forward(self, images: Tensor) -> Tensor:
        """Logits: float32 (n, 1), from float32 (n, 3, size, size)."""
        logits: Tensor = self.body(images.half())
        return logits.float()
