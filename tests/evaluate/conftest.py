"""Predictions made on the spot."""

import numpy as np
import pytest

from wsi_idc.evaluate.predictions import predictions


@pytest.fixture(scope="session")
def some():
    """A maker of predictions; see `make`."""
    return make


def make(model="a", tiles=400, patients=25, seed=0, decimals=None, threshold=0.4, noise=0.3):
    """Predictions over patients of unequal size; the truth depends on the seed's default only."""
    rng = np.random.default_rng(12)
    patient = np.sort(rng.integers(patients, size=tiles))
    truth = rng.random(tiles) < 0.2 + 0.4 * (patient % 3 == 0)
    probability = np.clip(0.25 + 0.4 * truth + np.random.default_rng(seed).normal(0, noise, tiles), 0, 1)
    if decimals is not None:
        probability = probability.round(decimals)
    names = np.char.add("p", patient.astype(str))
    slides = np.char.add(names, np.where(rng.random(tiles) < 0.5, "-x", "-y"))
    return predictions(model, probability, truth, slides, names, threshold=threshold)
