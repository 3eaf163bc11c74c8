"""What validation tiles decide after training: temperatures, thresholds, and whether neighbours count."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar

from wsi_idc.model.config import Context
from wsi_idc.model.context import by_slide, smooth_logits
from wsi_idc.settings import TileSpec

Logits = NDArray[np.floating]
REACH = 20.0
"""Of a context, in tiles."""
SPREAD = 2.0
"""Of a context."""
LIMIT = 4.0
"""Of a context. All three are set here and not fitted to a training's few validation patients, one of whom may be a
complete slide that outweighs the others: fitted so, they smoothed new patients too much (docs/model.md)."""


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
    """The context's scale, shift and threshold; None where tiles alone, so scaled, have less log loss.

    Args:
        logits: float (n,), calibrated, of each tile alone.
        cell: int (n, 2), row and column in the slide's grid.
        slide: str (n,), slide ids.
        truth: bool (n,), True where the tile is IDC.
        spec: the grid.
        mean: the logit that is expected where no tile is near.
    """
    context = Context(reach_um=REACH * spec.size_px * spec.mpp, spread=SPREAD, mean=mean, limit=LIMIT)
    surface = by_slide(slide, lambda own: smooth_logits(logits[own], cell[own], spec, context))
    temperature, shift = fit_scale(surface, truth)
    scaled = surface / temperature + shift
    alone_temperature, alone_shift = fit_scale(logits, truth)
    if _log_loss(scaled, truth) >= _log_loss(logits / alone_temperature + alone_shift, truth):
        return None
    threshold = fit_threshold(sigmoid(scaled), truth)
    return context.model_copy(update={"temperature": temperature, "shift": shift, "threshold": threshold})


def _log_loss(logits: Logits, truth: NDArray[np.bool_]) -> float:
    return float(np.logaddexp(0.0, np.where(truth, -logits, logits).astype(np.float64)).mean())
