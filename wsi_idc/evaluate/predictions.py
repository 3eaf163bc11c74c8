"""What is evaluated: one model's probabilities over tiles whose truth is known."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_idc.errors import UsageError


@dataclass(frozen=True)
class Predictions:
    """One model's probabilities over labelled tiles; `predictions` makes it from a store's arrays.

    Args:
        model: short name, one a model; names rows and columns.
        probability: float32 or float64 (n,), P(IDC) in [0, 1], no NaN.
        truth: bool (n,), True where the tile is IDC.
        slide: str (n,), slide ids.
        patient: str (n,), patient ids.
        threshold: float (n,), the operating point of the model that scored the tile: it is called IDC from this
            probability on.
        title: the model in words, for headings.
        tile: int64 (n,), each tile's place among all that were offered, so that two models can be paired.
        unknown: tiles left out because their truth is unknown.
        unscored: tiles with a known truth left out because they have no probability.
        lone_slides: slides without a patient id, each taken as a patient of its own.
    """

    model: str
    probability: NDArray[np.floating]
    truth: NDArray[np.bool_]
    slide: NDArray[np.str_]
    patient: NDArray[np.str_]
    threshold: NDArray[np.floating]
    title: str
    tile: NDArray[np.int64]
    unknown: int = 0
    unscored: int = 0
    lone_slides: int = 0

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def called(self) -> NDArray[np.bool_]:
        """Bool (n,): called IDC."""
        return self.probability >= self.threshold

    @property
    def thresholds(self) -> list[float]:
        """Every operating point that occurs: one, but for the folds of a cross-validation."""
        return [float(value) for value in np.unique(self.threshold)]

    @property
    def threshold_words(self) -> str:
        """The operating points, for people."""
        return " and ".join(f"{value:.4g}" for value in self.thresholds)

    @property
    def n_patients(self) -> int:
        """Patients, counted."""
        return len(np.unique(self.patient))

    @property
    def n_slides(self) -> int:
        """Slides, counted."""
        return len(np.unique(self.slide))

    def notes(self) -> list[str]:
        """What was left out or assumed, a line each."""
        lines = []
        if self.unknown:
            lines.append(f"{self.model}: {self.unknown:,} tiles have no label and are left out")
        if self.unscored:
            lines.append(f"{self.model}: {self.unscored:,} labelled tiles have no probability and are left out")
        if self.lone_slides:
            lines.append(
                f"{self.model}: {self.lone_slides:,} slides have no patient; each counts as a patient of its own"
            )
        return lines


def predictions(
    model: str,
    probability: ArrayLike,
    truth: ArrayLike,
    slide: ArrayLike,
    patient: ArrayLike,
    *,
    threshold: float | ArrayLike,
    title: str = "",
    positive_from: float = 0.5,
) -> Predictions:
    """Predictions over the tiles that have both a truth and a probability; the others are dropped and counted.

    Args:
        model: short name, one a model.
        probability: float (n,), P(IDC); NaN where the model gave none.
        truth: bool or int (n,), or float (n,) as the part of the tile that is IDC; NaN where unknown.
        slide: str (n,), slide ids.
        patient: str (n,), patient ids; an empty one makes its slide a patient of its own.
        threshold: the operating point, of all tiles or of each: it is called IDC from this probability on.
        title: the model in words; the name where empty.
        positive_from: the part that is IDC from which a tile is true.

    Raises:
        UsageError: no tiles, no labels, no probabilities, probabilities outside [0, 1], or a slide of two patients.
        ValueError: arrays of different lengths.
    """
    scores, part = np.asarray(probability), np.asarray(truth)
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    slides, patients = np.asarray(slide, dtype=np.str_), np.asarray(patient, dtype=np.str_)
    if not scores.shape == part.shape == slides.shape == patients.shape or scores.ndim != 1:
        raise ValueError(f"shapes differ: {scores.shape}, {part.shape}, {slides.shape}, {patients.shape}")
    at = np.broadcast_to(np.asarray(threshold, np.float64), scores.shape)
    if (wrong := at[~((at >= 0.0) & (at <= 1.0))]).size:
        raise UsageError(model, f"threshold {wrong[0]:g} is not between 0 and 1", "mend the bundle's threshold")
    if not len(scores):
        raise UsageError(model, "no tiles to evaluate", "choose another --split, or extract and infer first")
    known = ~np.isnan(part.astype(np.float64))
    if not known.any():
        raise UsageError(model, f"none of {len(part):,} tiles has a label", "give annotations to extract")
    scored = ~np.isnan(scores)
    kept = known & scored
    if not kept.any():
        problem = f"all probabilities of the {int(known.sum()):,} labelled tiles are NaN"
        raise UsageError(model, problem, "run infer again for these slides")
    if scores[kept].min() < 0 or scores[kept].max() > 1:
        raise UsageError(model, "probabilities outside 0 to 1", "the model's output is not a probability")
    lone = np.unique(slides[kept & (patients == "")])
    patients = np.where(patients == "", np.char.add("slide ", slides), patients)
    owners: dict[str, str] = {}
    for name, owner in sorted(set(zip(slides[kept].tolist(), patients[kept].tolist(), strict=True))):
        if owners.setdefault(name, owner) != owner:
            raise UsageError(f"slide {name}", f"has two patients, {owners[name]} and {owner}", "mend the manifest")
    return Predictions(
        model=model,
        probability=scores[kept],
        truth=part[kept] >= positive_from,
        slide=slides[kept],
        patient=patients[kept],
        threshold=at[kept],
        title=title or model,
        tile=np.flatnonzero(kept),
        unknown=int((~known).sum()),
        unscored=int((known & ~scored).sum()),
        lone_slides=len(lone),
    )


def require_same_tiles(a: Predictions, b: Predictions) -> None:
    """Two models can be paired.

    Raises:
        UsageError: the models were scored on different tiles, or against different labels.
    """
    advice = "infer both models over the same store and split, or evaluate them apart"
    pair = f"{a.model} and {b.model}"
    if not all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tile", "slide", "patient")):
        raise UsageError(pair, f"scored on different tiles ({len(a):,} and {len(b):,})", advice)
    if not np.array_equal(a.truth, b.truth):
        raise UsageError(pair, "their tiles have different labels", advice)
