"""What a trained network says of tiles that it was not trained on."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logit

from wsi_idc.model.network import TileNetwork
from wsi_idc.train.calibrate import Judges
from wsi_idc.train.data import LabelledTiles
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import Split


def judge_tiles(
    network: TileNetwork,
    tiles: LabelledTiles,
    places: NDArray[np.int64],
    pixels: NDArray[np.uint8],
    settings: TrainSettings,
) -> Judges:
    """Chosen tiles by a network whose temperature is 1.

    Args:
        network: left on the CPU, in evaluation.
        tiles: the store's labelled tiles.
        places: int64 (n,), which of them.
        pixels: theirs, uint8 (n, size, size, 3) RGB.
        settings: the part of a tile that makes it positive, and where to work.
    """
    network.eval().to("cuda" if settings.gpus else "cpu")
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), 256):
            batch = torch.from_numpy(np.ascontiguousarray(pixels[start : start + 256]))
            parts.append(network(batch.to(network.temperature.device)).float().cpu().numpy())
    network.to("cpu")
    truth = tiles.positive(settings.positive_from)[places]
    return Judges(np.concatenate(parts), tiles.cell[places], tiles.slide[places], truth)


def expected_logit(tiles: LabelledTiles, split: Split, settings: TrainSettings) -> float | None:
    """That of the training tiles' share of IDC; None where neighbours are to be left out."""
    # Split by tile, the neighbours of a validation tile trained the network: there is nothing to learn from them.
    if not settings.resolve().context or settings.split_by == "tile":
        return None
    return float(logit(tiles.positive(settings.positive_from)[split.train].mean()))
