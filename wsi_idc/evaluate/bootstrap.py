"""Figures of many patient resamples at once, from sums per patient and one sort.

The cluster bootstrap (Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8): patients, not
tiles, are drawn with replacement, since tiles of one patient are alike. A resample is a count per patient, so each
figure becomes a weighted figure: those at a threshold, the Brier score and the calibration error follow from sums per
patient by one matrix product, the ranking figures from cumulative sums over tiles sorted once.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_idc.evaluate.predictions import Predictions

CALIBRATION_BINS = 15
"""Equal-width bins over [0, 1], as in Guo et al., ICML 2017, arXiv:1706.04599."""

Floats = NDArray[np.float64]


class Counts(NamedTuple):
    """The confusion matrix's four cells, each float64, all of one shape."""

    tp: Floats
    fp: Floats
    tn: Floats
    fn: Floats


def patient_weights(n_patients: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each patient is drawn: int64 (resamples, n_patients), each row summing to n_patients."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=resamples)


def resampled_figures(data: Predictions, weights: NDArray[np.int64]) -> dict[str, Floats]:
    """Each figure in each resample.

    Args:
        data: one model's predictions.
        weights: int64 (resamples, patients), patients in sorted order, as `patient_weights` draws them.

    Returns:
        Figure name to float64 (resamples,); NaN where a resample leaves it undefined.
    """
    _, owner = np.unique(data.patient, return_inverse=True)
    factors = weights.astype(np.float64)
    probability = data.probability.astype(np.float64)
    cells = 2 * data.truth + data.called
    n_patients = weights.shape[1]
    counts = factors @ _sums(owner, cells, np.ones(len(data)), n_patients, 4)
    tn, fp, fn, tp = counts.T
    figures = from_counts(Counts(tp, fp, tn, fn))
    figures["roc_auc"], figures["average_precision"] = ranking_figures(data.truth, probability, owner, weights)
    total = counts.sum(axis=1)
    squares = _sums(owner, np.zeros(len(data), int), (probability - data.truth) ** 2, n_patients, 1)
    figures["brier"] = ratio((factors @ squares)[:, 0], total)
    bins = calibration_bin(probability)
    gaps = _sums(owner, bins, probability - data.truth, n_patients, CALIBRATION_BINS)
    figures["ece"] = ratio(np.abs(factors @ gaps).sum(axis=1), total)
    return figures


def from_counts(counts: Counts) -> dict[str, Floats]:
    """The figures at a threshold, elementwise; NaN where one is undefined.

    F1 is 2 TP / (2 TP + FP + FN); balanced accuracy the mean of recall and specificity (Brodersen et al., ICPR 2010,
    doi:10.1109/ICPR.2010.764), undefined where one class is missing.
    """
    tp, fp, tn, fn = counts
    recall, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    return {
        "accuracy": ratio(tp + tn, tp + tn + fp + fn),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": ratio(tp, tp + fp),
        "recall": recall,
        "specificity": specificity,
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
    }


def ratio(part: Floats, whole: Floats) -> Floats:
    """`part / whole`, NaN where the whole is zero."""
    result: Floats = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
    return result


def calibration_bin(probability: Floats) -> NDArray[np.int64]:
    """Each probability's bin: int64 of the same shape; bin k holds [k, k + 1) / 15, the last one also 1."""
    return np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)


def ranking_figures(
    truth: NDArray[np.bool_], probability: Floats, owner: NDArray[np.int64], weights: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """ROC AUC and average precision with each tile counted as often as its patient.

    AUC is the Mann-Whitney statistic, a tie counting half (Hanley & McNeil, Radiology 1982;143:29,
    doi:10.1148/radiology.143.1.7063747), in whole numbers up to its one division. Average precision is the sum over
    distinct probabilities of precision times the step in recall, without interpolation, as scikit-learn's.

    Args:
        truth: bool (n,).
        probability: float64 (n,).
        owner: int64 (n,), each tile's patient as a column of `weights`.
        weights: int64 (resamples, patients).

    Returns:
        Two float64 (resamples,); NaN where a resample holds one class only.
    """
    order = np.argsort(-probability, kind="stable")
    descending, positive = probability[order], truth[order]
    first = np.flatnonzero(np.concatenate([[True], np.diff(descending) != 0]))
    tie = np.repeat(np.arange(len(first)), np.diff(first, append=len(order)))
    # Only ties that hold a positive tile count: where they start and end, and which positives are theirs.
    held, begin = np.unique(tie[positive], return_index=True)
    start, end = first[held], np.append(first, len(order))[held + 1]
    owner_all, owner_positive = owner[order], owner[order][positive]
    above = np.zeros(len(order) + 1, np.int64)
    auc, precision = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    for index, row in enumerate(weights):
        np.cumsum(row[owner_all], out=above[1:])
        hits = row[owner_positive]
        if len(held) < len(hits):
            hits = np.add.reduceat(hits, begin)
        so_far = np.cumsum(hits)
        n_positive = int(so_far[-1]) if len(held) else 0
        n_negative = int(above[-1]) - n_positive
        if not n_positive or not n_negative:
            continue
        reached = above[end]
        # A positive beats the negatives that come after its tie, and half of those in it. Twice that, in whole numbers:
        beaten = 2 * n_negative - (reached - so_far) - (above[start] - (so_far - hits))
        auc[index] = int(np.sum(hits * beaten)) / (2 * n_positive * n_negative)
        precision[index] = np.sum(hits * so_far / np.maximum(reached, 1)) / n_positive
    return auc, precision


def _sums(
    owner: NDArray[np.int64], column: NDArray[np.int64], value: Floats, n_patients: int, n_columns: int
) -> Floats:
    """Values summed by patient and column: float64 (n_patients, n_columns)."""
    flat = np.bincount(owner * n_columns + column, value, n_patients * n_columns)
    return flat.astype(np.float64).reshape(n_patients, n_columns)
