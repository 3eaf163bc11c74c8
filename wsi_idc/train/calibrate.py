"""What validation tiles decide after training: the temperature, the threshold, and how far neighbours count."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from wsi_idc.model.config import Context
from wsi_idc.model.context import by_slide, smooth_logits
from wsi_idc.settings import TileSpec

Logits = NDArray[np.floating]
REACHES = (6.0, 9.0, 13.5, 20.0, 30.0)
"""In tiles."""
SPREADS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)


def sigmoid(logits: Logits) -> NDArray[np.float64]:
    """Probabilities of logits."""
    from scipy.special import expit

    return np.asarray(expit(logits.astype(np.float64)))


def fit_temperature(logits: Logits, truth: NDArray[np.bool_]) -> float:
    """The number that logits are divided by for the least log loss (Guo et al., ICML 2017, arXiv:1706.04599).

    Between 1/20 and 20, so that tiles which are told apart without error keep finite logits.
    """

    def loss(log_temperature: float) -> float:
        return _log_loss(logits / np.exp(log_temperature), truth)

    bounds = (-np.log(20.0), np.log(20.0))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def fit_threshold(probability: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    """The threshold with the greatest sum of F1 and balanced accuracy, midway between two probabilities."""
    order = np.argsort(-probability, kind="stable")
    ranked = probability[order].astype(np.float64)
    hits = np.cumsum(truth[order])
    calls = np.arange(1, len(ranked) + 1)
    positives = int(truth.sum())
    false = calls - hits
    f1 = 2 * hits / (calls + positives)
    balanced = (hits / positives + 1 - false / (len(ranked) - positives)) / 2
    ends = np.r_[ranked[1:] < ranked[:-1], True]
    best = int(np.argmax(np.where(ends, f1 + balanced, -1.0)))
    below = ranked[best + 1] if best + 1 < len(ranked) else 0.0
    return float(np.clip((ranked[best] + below) / 2, 1e-4, 1 - 1e-4))


def fit_context(
    logits: Logits,
    cell: NDArray[np.integer],
    slide: NDArray[np.str_],
    truth: NDArray[np.bool_],
    spec: TileSpec,
    *,
    mean: float,
) -> Context | None:
    """The context with the least log loss, of a few reaches and spreads; None where a tile alone has the least.

    Args:
        logits: float (n,), calibrated, of each tile alone.
        cell: int (n, 2), row and column in the slide's grid.
        slide: str (n,), slide ids.
        truth: bool (n,), True where the tile is IDC.
        spec: the grid.
        mean: the logit that is expected where no tile is near.
    """
    best, least = None, _log_loss(logits, truth)
    for reach_um in [reach * spec.stride_px * spec.mpp for reach in REACHES]:
        for spread in SPREADS:

            def smooth(
                own: NDArray[np.int64], reach_um: float = reach_um, spread: float = spread
            ) -> NDArray[np.float64]:
                return smooth_logits(logits[own], cell[own], spec, reach_um, spread, mean)

            surface = by_slide(slide, smooth)
            temperature = fit_temperature(surface, truth)
            loss = _log_loss(surface / temperature, truth)
            if loss < least:
                threshold = fit_threshold(sigmoid(surface / temperature), truth)
                least = loss
                best = Context(
                    reach_um=reach_um, spread=spread, mean=mean, temperature=temperature, threshold=threshold
                )
    return best


def _log_loss(logits: Logits, truth: NDArray[np.bool_]) -> float:
    return float(np.logaddexp(0.0, np.where(truth, -logits, logits).astype(np.float64)).mean())
