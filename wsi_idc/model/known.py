"""Tiles that are the same on every machine, and what a model answers to them."""

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from wsi_idc.digests import checksum
from wsi_idc.model.config import Known

_MOST, _PIXELS = 32, 2**22
"""So many tiles, or fewer large ones, but two."""
_GLASS, _STROMA, _NUCLEI = np.array([(243, 240, 245), (216, 150, 190), (140, 95, 165)], np.int32)


def made_tiles(size_px: int) -> NDArray[np.uint8]:
    """Tiles painted in the colours of H&E, from few to many nuclei: uint8 (n, size, size, 3) RGB, 32 up to 362 px.

    Whole numbers all the way, from a hash and not from a library's random numbers: the same pixels on every processor
    and with every version. No real tissue looks like this: they tell two forms of a model apart, and no good model from
    a bad one.
    """
    count = max(2, min(_MOST, _PIXELS // size_px**2))
    return np.stack([_tile(number * _MOST // count, size_px) for number in range(count)])


def answers(predict: Callable[[NDArray[np.uint8]], NDArray[np.float32]], size_px: int) -> Known:
    """What a model answers to the made tiles.

    Args:
        predict: the model, see `Runtime.predict`.
        size_px: the side of its tiles.
    """
    tiles = made_tiles(size_px)
    found = predict(tiles).astype(np.float64).round(6).tolist()
    return Known.model_validate({"tiles": checksum(tiles), "probability": found})


def _tile(number: int, size: int) -> NDArray[np.uint8]:
    fibres, nuclei = (_field(f"{name} {number}", size, step) for name, step in (("fibres", 11), ("nuclei", 3)))
    tissue = np.minimum(255, 60 + fibres)[..., None]
    dense = np.clip((nuclei - (200 - 4 * number)) * 2, 0, 255)[..., None]
    pixels = (_GLASS * (255 - tissue) + _STROMA * tissue) // 255
    pixels = (pixels * (255 - dense) + _NUCLEI * dense) // 255
    grain = _bytes(f"grain {number}", (size, size, 3)) // 16 - 8
    return np.asarray(np.clip(pixels + grain, 0, 255), np.uint8)


def _field(name: str, size: int, step: int) -> NDArray[np.int32]:
    """Values between 0 and 255, at random at every `step`th pixel and straight in between: (size, size)."""
    side = size // step + 2
    corners = _bytes(name, (side, side))
    place, part = np.divmod(np.arange(size, dtype=np.int32), np.int32(step))
    rows = corners[place] * (step - part)[:, None] + corners[place + 1] * part[:, None]
    values: NDArray[np.int32] = (rows[:, place] * (step - part) + rows[:, place + 1] * part) // step**2
    return values


def _bytes(name: str, shape: tuple[int, ...]) -> NDArray[np.int32]:
    count = int(np.prod(shape))
    data = hashlib.shake_128(f"wsi-idc {name}".encode()).digest(count)
    return np.frombuffer(data, np.uint8).astype(np.int32).reshape(shape)
