"""The colours of probabilities, on every picture and page."""

from functools import cache

import numpy as np
from numpy.typing import NDArray


@cache
def table() -> NDArray[np.uint8]:
    """uint8 (256, 3) RGB of probabilities from 0 to 1: cividis, perceptually even, the same to colour-blind eyes."""
    import cv2  # Matplotlib has the same colours to a grey level, and takes twenty times as long to import.

    levels = np.arange(256, dtype=np.uint8)[:, None]
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_CIVIDIS)[:, 0, ::-1], np.uint8)


def coloured(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Probabilities, or parts, as uint8 (..., 3) RGB; of NaN the colour of 0."""
    return np.asarray(table()[np.rint(np.nan_to_num(np.clip(values, 0, 1)) * 255).astype(np.intp)])


def stops(count: int = 9) -> list[str]:
    """The colours from 0 to 1, evenly spaced, as CSS has them."""
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in table()[np.linspace(0, 255, count).astype(int)]]
