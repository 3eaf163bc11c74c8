"""What a training comes to, and how its figures are told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Figure = tuple[float, float, float]
"""A figure's value, and the ends of its 95 % interval over patients; NaN where it is undefined."""


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Attributes:
        bundle: the folder that was written; in cross-validation, the folder of the folds.
        epochs: epochs that were trained, of all folds together.
        figures: name to figure: on the validation patients, or in cross-validation on all held-out patients together.
        notes: a line each, for the user.
    """

    bundle: Path
    epochs: int
    figures: dict[str, Figure]
    notes: list[str]


def tell(figure: Sequence[float | None]) -> tuple[str, str]:
    """A figure's value and its interval in words; `undefined` for what is NaN, or None as in JSON."""
    value, low, high = (math.nan if number is None else number for number in figure)
    return (
        "undefined" if math.isnan(value) else f"{value:.3f}",
        "undefined" if math.isnan(low) or math.isnan(high) else f"{low:.3f} to {high:.3f}",
    )
