"""What a cross-validation leaves behind: each tile's probability by the fold that never saw its patient."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.csvs import csv_text
from wsi_idc.errors import UsageError
from wsi_idc.files import write_whole

FILE = "held-out.csv"
_COLUMNS = {
    "fold": np.str_,
    "slide": np.str_,
    "row": np.int64,
    "patient": np.str_,
    "truth": np.int8,
    "logit": np.float32,
    "probability": np.float32,
    "threshold": np.float64,
    "alone": np.float32,
    "alone_threshold": np.float64,
}


@dataclass(frozen=True)
class HeldOut:
    """A cross-validation, to be judged like a model.

    Attributes:
        folder: where it is.
        columns: name to array (n,), a place a tile: `row` is the tile's place in its slide's arrays, `logit` is the
            network's before any temperature, `probability` has the neighbours' part and `alone` has not, each with the
            threshold of its fold.
    """

    folder: Path
    columns: Mapping[str, NDArray[Any]]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def slides(self) -> set[str]:
        """Slides that were held out."""
        return set(np.unique(self.columns["slide"]).tolist())

    def of_slide(self, slide_id: str, count: int, truth: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
        """One slide's `probability`, `threshold`, `alone` and `alone_threshold`: float64 (count,), NaN where none.

        Args:
            slide_id: a slide that was held out.
            count: its tiles.
            truth: bool (count,), whether each is IDC.

        Raises:
            UsageError: the tiles, or their labels, are not those that were held out.
        """
        own = self.columns["slide"] == slide_id
        rows = self.columns["row"][own]
        if len(rows) and (rows.max() >= count or (truth[rows] != self.columns["truth"][own].astype(bool)).any()):
            problem = f"its tiles or labels are not those that {self.name} held out"
            raise UsageError(slide_id, problem, "evaluate on the store that was cross-validated")
        found = {}
        for name in ("probability", "threshold", "alone", "alone_threshold"):
            found[name] = np.full(count, np.nan)
            found[name][rows] = self.columns[name][own]
        return found


def write_held_out(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the file, a row a tile; the keys are those of `HeldOut.columns` and `fold`."""
    write_whole(folder / FILE, csv_text(rows, list(_COLUMNS), "exact").encode())


def read_held_out(folder: Path) -> HeldOut:
    """A cross-validation's folder.

    Raises:
        UsageError: the file is damaged or was written by an older version.
    """
    path = folder / FILE
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        columns: dict[str, NDArray[Any]] = {
            name: np.array([row[name] for row in rows]).astype(kind) for name, kind in _COLUMNS.items()
        }
    except (KeyError, ValueError, TypeError) as error:
        problem = f"damaged, or written by another version ({error})"
        raise UsageError(path, problem, "train --folds again; folds that are done are kept") from error
    if not rows:
        raise UsageError(path, "holds no tile", "train --folds again; folds that are done are kept")
    return HeldOut(folder, columns)
