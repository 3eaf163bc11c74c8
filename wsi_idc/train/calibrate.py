"""What validation tiles decide after training: the temperature, the threshold, and how far neighbours count."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar

from wsi_idc.model.config import Context
from wsi_idc.model.context import by_slide, smooth_logits
from wsi_idc.settings import TileSpec

Logits = NDArray[np.floating]
REACHES = (4.5, 6.0, 9.0, 13.5, 20.0)
"""In tiles."""
SPREADS = (0.35, 0.5, 0.7, 1.0, 1.4)


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


def fit_scale(logits: Logits, truth: NDArray[np.bool_]) -> tuple[float, float]:
    """(temperature, shift) for the least log loss of `logits / temperature + shift` (Platt, 1999).

    The temperature is between 1/20 and 20, the shift between -20 and 20: see `fit_temperature`.
    """
    values = logits.astype(np.float64)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, list[float]]:
        slope, shift = np.exp(parameters[0]), parameters[1]
        scaled = slope * values + shift
        error = sigmoid(scaled) - truth
        return _log_loss(scaled, truth), [float((error * values).mean() * slope), float(error.mean())]

    limit = float(np.log(20.0))
    found = minimize(loss, (0.0, 0.0), jac=True, bounds=((-limit, limit), (-20.0, 20.0)), method="L-BFGS-B").x
    return float(np.exp(-found[0])), float(found[1])


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
    """The context with the least log loss, of a few reaches and spreads; None where tiles alone, so scaled, have less.

    Args:
        logits: float (n,), calibrated, of each tile alone.
        cell: int (n, 2), row and column in the slide's grid.
        slide: str (n,), slide ids.
        truth: bool (n,), True where the tile is IDC.
        spec: the grid.
        mean: the logit that is expected where no tile is near.
    """
    temperature, shift = fit_scale(logits, truth)
    best, least = None, _log_loss(logits / temperature + shift, truth)
    for reach_um in [reach * spec.stride_px * spec.mpp for reach in REACHES]:
        for spread in SPREADS:

            def smooth(
                own: NDArray[np.int64], reach_um: float = reach_um, spread: float = spread
            ) -> NDArray[np.float64]:
                return smooth_logits(logits[own], cell[own], spec, reach_um, spread, mean)

            surface = by_slide(slide, smooth)
            temperature, shift = fit_scale(surface, truth)
            scaled = surface / temperature + shift
            if (loss := _log_loss(scaled, truth)) < least:
                least = loss
                best = Context(
                    reach_um=reach_um,
                    spread=spread,
                    mean=mean,
                    temperature=temperature,
                    shift=shift,
                    threshold=fit_threshold(sigmoid(scaled), truth),
                )
    return best


def _log_loss(logits: Logits, truth: NDArray[np.bool_]) -> float:
    return float(np.logaddexp(0.0, np.where(truth, -logits, logits).astype(np.float64)).mean())
