"""What validation tiles decide after training: the temperature and the threshold."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

Logits = NDArray[np.float32]


def sigmoid(logits: Logits) -> NDArray[np.float64]:
    """Probabilities of logits."""
    from scipy.special import expit

    return np.asarray(expit(logits.astype(np.float64)))


def fit_temperature(logits: Logits, truth: NDArray[np.bool_]) -> float:
    """The number that logits are divided by for the least log loss (Guo et al., ICML 2017, arXiv:1706.04599).

    Between 1/20 and 20, so that tiles which are told apart without error keep finite logits.
    """
    signed = np.where(truth, logits, -logits).astype(np.float64)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, -signed / np.exp(log_temperature)).mean())

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
