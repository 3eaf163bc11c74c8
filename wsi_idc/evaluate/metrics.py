"""Figures of one or several models over the same tiles, each with an interval over patients.

Point figures come from scikit-learn; intervals are 95 % percentile intervals of a bootstrap over patients
(Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; `bootstrap` says how). A figure that is
undefined, such as a ROC AUC of one class, is NaN and counted in a note.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import UsageError
from wsi_idc.evaluate.bootstrap import (
    CALIBRATION_BINS,
    Counts,
    Floats,
    calibration_bin,
    from_counts,
    patient_weights,
    resampled_figures,
)
from wsi_idc.evaluate.predictions import Predictions, require_same_tiles

FIGURES: dict[str, str] = {
    "roc_auc": "ROC AUC",
    "average_precision": "Average precision",
    "f1": "F1",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall (sensitivity)",
    "specificity": "Specificity",
    "brier": "Brier score",
    "ece": f"Calibration error (ECE, {CALIBRATION_BINS} bins)",
}
"""Every figure, in the order in which it is shown."""

LOWER_IS_BETTER = frozenset({"brier", "ece"})
RESAMPLES = 2000
FEW_PATIENTS = 20
"""Below it a percentile interval over patients is too narrow to be believed, and a note says so."""


@dataclass(frozen=True)
class Figure:
    """One figure and its 95 % interval; NaN where undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Confusion:
    """Tiles by truth and by call at the threshold."""

    tp: int
    fp: int
    tn: int
    fn: int


@dataclass(frozen=True)
class GroupRow:
    """The figures of one slide or one patient; `slides` counts a patient's slides."""

    slide: str
    patient: str
    slides: int
    tiles: int
    positive: int
    mean_probability: float
    confusion: Confusion
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """One model's figures.

    Args:
        predictions: what was evaluated.
        figures: name to figure, in the order of `FIGURES`.
        confusion: tiles by truth and call.
        samples: name to float64 (resamples,), the bootstrap's figures; kept for paired differences.
        notes: what is undefined or was left out, a line each.
    """

    predictions: Predictions
    figures: Mapping[str, Figure]
    confusion: Confusion
    samples: Mapping[str, Floats] = field(repr=False)
    notes: Sequence[str]

    @property
    def intervals(self) -> dict[str, tuple[float, float, float]]:
        """Each figure's name to (value, low, high)."""
        return {key: (figure.value, figure.low, figure.high) for key, figure in self.figures.items()}

    @cached_property
    def per_slide(self) -> list[GroupRow]:
        """Each slide's figures, in the order of the ids."""
        return group_rows(self.predictions, "slide")

    @cached_property
    def per_patient(self) -> list[GroupRow]:
        """Each patient's figures, in the order of the ids."""
        return group_rows(self.predictions, "patient")


@dataclass(frozen=True)
class Difference:
    """A figure of `a` minus that of `b` over the same resampled patients.

    Args:
        a: the first model.
        b: the model subtracted from it.
        figure: a name of `FIGURES`.
        value: the difference and its 95 % interval.
        at_or_below_zero: share of the resamples with a difference at or below zero; NaN where undefined.
        favours: the model whose figure is the better one, "" while the interval holds zero or is undefined.
    """

    a: str
    b: str
    figure: str
    value: Figure
    at_or_below_zero: float
    favours: str

    def reversed(self) -> "Difference":
        """The same of `b` minus `a`; of its resamples nobody counted how many are at zero."""
        value = Figure(0.0 - self.value.value, 0.0 - self.value.high, 0.0 - self.value.low)
        return replace(self, a=self.b, b=self.a, value=value, at_or_below_zero=float("nan"))


@dataclass(frozen=True)
class Results:
    """Several models over the same tiles: figures, and the difference of each pair in the order given."""

    evaluations: Sequence[Evaluation]
    differences: Sequence[Difference]
    resamples: int
    seed: int

    @property
    def few(self) -> int | None:
        """How many patients there are, where they are too few for their intervals to be believed; else None."""
        count = self.evaluations[0].predictions.n_patients
        return count if count < FEW_PATIENTS else None

    def notes(self) -> list[str]:
        """All models' notes, a line each; what is so of every one of several is said once, of all."""
        models = [evaluation.predictions.model for evaluation in self.evaluations]
        own = [
            [note.removeprefix(f"{model}: ") for note in evaluation.notes]
            for model, evaluation in zip(models, self.evaluations, strict=True)
        ]
        common = [note for note in own[0] if len(own) > 1 and all(note in notes for notes in own)]
        return [f"all models: {note}" for note in common] + [
            f"{model}: {note}" for model, notes in zip(models, own, strict=True) for note in notes if note not in common
        ]

    def difference(self, figure: str, a: str, b: str) -> Difference | None:
        """The figure of one model minus that of another; None of a model and itself."""
        for row in self.differences:
            if row.figure == figure and (row.a, row.b) == (a, b):
                return row
            if row.figure == figure and (row.a, row.b) == (b, a):
                return row.reversed()
        return None

    def favours(self, row: Difference) -> str:
        """Which model a difference favours, in words, and of how few patients where they are few."""
        if not row.favours:
            return "neither"
        return row.favours if self.few is None else f"{row.favours} ({self.few} patients only)"


def evaluate(models: Sequence[Predictions], *, resamples: int = RESAMPLES, seed: int = 0) -> Results:
    """Every figure of every model, and the paired difference of each pair.

    Raises:
        UsageError: no models, two of one name, models over different tiles, or no resamples.
    """
    if not models:
        raise UsageError("--model", "nothing to evaluate", "name a model whose probability maps are in the store")
    names = [data.model for data in models]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("--model", f"{name} is given twice", "name each model once")
    for other in models[1:]:
        require_same_tiles(models[0], other)
    evaluations = [evaluate_one(data, resamples=resamples, seed=seed) for data in models]
    differences = [row for a, b in combinations(evaluations, 2) for row in compare(a, b)]
    return Results(evaluations, differences, resamples, seed)


def evaluate_one(data: Predictions, *, resamples: int = RESAMPLES, seed: int = 0) -> Evaluation:
    """One model's figures with 95 % intervals by bootstrap over patients; the seed decides which are drawn.

    Raises:
        UsageError: fewer than one resample.
    """
    if resamples < 1:
        raise UsageError("--resamples", f"{resamples} is not a positive number", f"{RESAMPLES:,} is the usual")
    n_patients = data.n_patients
    samples = resampled_figures(data, patient_weights(n_patients, resamples, seed))
    points = point_figures(data.truth, data.probability, data.called)
    figures = {name: _figure(points[name], samples[name], n_patients) for name in FIGURES}
    confusion = confusion_of(data.truth, data.called)
    notes = [*data.notes(), *_undefined(data, figures, samples)]
    return Evaluation(data, figures, confusion, samples, notes)


def compare(a: Evaluation, b: Evaluation) -> list[Difference]:
    """The paired patient bootstrap of each figure's difference, `a` minus `b`: both over the same resamples.

    Raises:
        UsageError: different tiles, or evaluations with another number of resamples.
    """
    require_same_tiles(a.predictions, b.predictions)
    rows = []
    for name in FIGURES:
        first, second = a.samples[name], b.samples[name]
        if first.shape != second.shape:
            pair = f"{a.predictions.model} and {b.predictions.model}"
            raise UsageError(pair, "resampled differently", "evaluate both with the same number of resamples")
        delta = first - second
        defined = delta[~np.isnan(delta)]
        point = a.figures[name].value - b.figures[name].value
        value = _figure(point, delta, a.predictions.n_patients)
        share = float((defined <= 0).mean()) if not np.isnan(value.low) else float("nan")
        favours = ""
        if value.low > 0 or value.high < 0:
            favours = (a if (value.low > 0) != (name in LOWER_IS_BETTER) else b).predictions.model
        rows.append(Difference(a.predictions.model, b.predictions.model, name, value, share, favours))
    return rows


def point_figures(
    truth: NDArray[np.bool_], probability: NDArray[np.floating], called: NDArray[np.bool_]
) -> dict[str, float]:
    """Every figure of one set of tiles; NaN where undefined.

    The expected calibration error (Naeini et al., AAAI 2015; Guo et al., ICML 2017, arXiv:1706.04599) is over 15
    equal-width bins of P(IDC): the mean over tiles of |mean P(IDC) - part that is IDC| of the tile's bin. Resampling
    adds to it, so that its interval leans upward and can lie above the figure itself where tiles are few. The Brier
    score is the mean squared difference of probability and truth (Brier, Mon Weather Rev 1950;78:1).

    Args:
        truth: bool (n,), n > 0.
        probability: float (n,).
        called: bool (n,), called IDC.
    """
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    score = probability.astype(np.float64)
    cells = confusion_of(truth, called)
    counts = Counts(*(np.array(float(n)) for n in (cells.tp, cells.fp, cells.tn, cells.fn)))
    figures = {name: float(value) for name, value in from_counts(counts).items()}
    both = bool(truth.any()) and not bool(truth.all())
    figures["roc_auc"] = float(roc_auc_score(truth, score)) if both else float("nan")
    figures["average_precision"] = float(average_precision_score(truth, score)) if both else float("nan")
    figures["brier"] = float(brier_score_loss(truth, score, pos_label=True))
    gaps = np.bincount(calibration_bin(score), weights=score - truth)
    figures["ece"] = float(np.abs(gaps).sum() / len(score))
    return {name: figures[name] for name in FIGURES}


def confusion_of(truth: NDArray[np.bool_], called: NDArray[np.bool_]) -> Confusion:
    """Tiles by truth and by call."""
    tn, fp, fn, tp = np.bincount(2 * truth + called, minlength=4).tolist()
    return Confusion(tp=tp, fp=fp, tn=tn, fn=fn)


def group_rows(data: Predictions, by: Literal["slide", "patient"]) -> list[GroupRow]:
    """The figures of each slide or each patient, in the order of their ids; a patient's row names no slide."""
    keys = data.slide if by == "slide" else data.patient
    names, owner = np.unique(keys, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    pieces = np.split(order, np.cumsum(np.bincount(owner))[:-1])
    return [_group_row(data, by, str(name), piece) for name, piece in zip(names, pieces, strict=True)]


def _group_row(data: Predictions, by: str, name: str, tiles: NDArray[np.int64]) -> GroupRow:
    truth, probability, called = data.truth[tiles], data.probability[tiles], data.called[tiles]
    return GroupRow(
        slide=name if by == "slide" else "",
        patient=str(data.patient[tiles[0]]),
        slides=len(np.unique(data.slide[tiles])),
        tiles=len(tiles),
        positive=int(truth.sum()),
        mean_probability=float(probability.mean(dtype=np.float64)),
        confusion=confusion_of(truth, called),
        figures=point_figures(truth, probability, called),
    )


def _figure(value: float, samples: Floats, n_patients: int) -> Figure:
    """A figure with its percentile interval; none from one patient, where every resample is the same."""
    defined = samples[~np.isnan(samples)]
    if np.isnan(value) or n_patients < 2 or not len(defined):
        return Figure(value, float("nan"), float("nan"))
    low, high = np.percentile(defined, [2.5, 97.5])
    return Figure(value, float(low), float(high))


def _undefined(data: Predictions, figures: Mapping[str, Figure], samples: Mapping[str, Floats]) -> Iterator[str]:
    """Notes on what has no figure or no interval."""
    missing = [FIGURES[name] for name, figure in figures.items() if np.isnan(figure.value)]
    if missing:
        reason = "no tile is called IDC at the threshold"
        if data.truth.all() or not data.truth.any():
            reason = f"all {len(data):,} tiles are {'IDC' if data.truth.all() else 'non-IDC'}"
        yield f"{data.model}: {len(missing)} figures are undefined, since {reason}: {', '.join(missing)}"
    if data.n_patients < 2:
        yield f"{data.model}: one patient only, so no figure has an interval"
        return
    if data.n_patients < FEW_PATIENTS:
        yield f"{data.model}: {data.n_patients} patients only, so intervals are rough and likely too narrow"
    for name, figure in figures.items():
        lost = int(np.isnan(samples[name]).sum())
        if lost and not np.isnan(figure.value):
            share = f"{lost:,} of {len(samples[name]):,} resamples"
            yield f"{data.model}: {FIGURES[name]} is undefined in {share}, which its interval leaves out"
