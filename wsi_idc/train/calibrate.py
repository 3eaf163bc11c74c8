"""What validation tiles decide after training: temperatures, thresholds, and whether neighbours count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar

from wsi_idc.model.config import Context
from wsi_idc.model.context import by_slide, in_context, smooth_logits
from wsi_idc.settings import TileSpec
from wsi_idc.units import Um

Logits = NDArray[np.floating]
REACH = 20.0
"""Of a context, in tiles."""
SPREAD = 2.0
"""Of a context."""
LIMIT = 4.0
"""Of a context. All three are set here and not fitted to a training's few validation patients, one of whom may be a
complete slide that outweighs the others: fitted so, they smoothed new patients too much (docs/model.md)."""


@dataclass(frozen=True)
class Judges:
    """Tiles by a network that was not trained on their patients.

    Attributes:
        logits: float32 (n,), before any temperature.
        cell: int32 (n, 2), row and column in the slide's grid.
        slide: str (n,), slide ids.
        truth: bool (n,), True where the tile is IDC.
    """

    logits: Logits
    cell: NDArray[np.int32]
    slide: NDArray[np.str_]
    truth: NDArray[np.bool_]


@dataclass(frozen=True)
class Calibration:
    """What makes probabilities of a network's logits.

    Attributes:
        temperature: what logits are divided by.
        threshold: the operating point of tiles alone.
        context: how neighbours count, with a threshold of its own; None where they do not.
    """

    temperature: float
    threshold: float
    context: Context | None

    def alone(self, logits: Logits) -> NDArray[np.float64]:
        """P(IDC) of tiles by themselves, from logits before any temperature: float64 (n,)."""
        return sigmoid(logits / np.float32(self.temperature))

    def together(self, judges: Judges, spec: TileSpec) -> NDArray[np.float64]:
        """P(IDC) with the neighbours' part, if they count: float64 (n,)."""
        alone, context = self.alone(judges.logits), self.context
        if context is None:
            return alone
        return by_slide(judges.slide, lambda own: in_context(alone[own], judges.cell[own], spec, context))

    @property
    def operating_point(self) -> float:
        """The threshold of `together`."""
        return self.context.threshold if self.context else self.threshold


def calibrate(parts: Sequence[Judges], spec: TileSpec, *, mean: float | None) -> Calibration:
    """Temperatures, thresholds, and whether neighbours count, by all judges alike.

    Args:
        parts: tiles by several networks; each keeps its slides to itself.
        spec: the grid.
        mean: the logit that is expected where no tile is near; None leaves neighbours out.
    """
    truth = np.concatenate([part.truth for part in parts])
    raw = np.concatenate([part.logits for part in parts])
    temperature = fit_temperature(raw, truth)
    logits = raw / np.float32(temperature)
    threshold = fit_threshold(sigmoid(logits), truth)
    context = None
    if mean is not None:
        cell = np.concatenate([part.cell for part in parts])
        slide = np.concatenate([np.char.add(f"{number}/", part.slide) for number, part in enumerate(parts)])
        context = fit_context(logits, cell, slide, truth, spec, mean=mean)
    return Calibration(temperature, threshold, context)


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
    context = Context(reach_um=Um(REACH * spec.size_px * spec.mpp), spread=SPREAD, mean=mean, limit=LIMIT)
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
