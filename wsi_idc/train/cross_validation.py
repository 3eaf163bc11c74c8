"""Cross-validation: a bundle a fold, and the figures of all held-out patients together."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import UsageError
from wsi_idc.evaluate.held_out import write_held_out
from wsi_idc.evaluate.metrics import FIGURES, evaluate_one
from wsi_idc.evaluate.predictions import Predictions, predictions
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.context import by_slide, in_context
from wsi_idc.model.runtime import load_runtime, predict_all
from wsi_idc.train.data import LabelledTiles, Say, read_pixels
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import Split

if TYPE_CHECKING:
    from wsi_idc.train.loop import TrainResult


def cross_validate(
    tiles: LabelledTiles,
    splits: Iterable[Split],
    out: Path,
    settings: TrainSettings,
    train: "Callable[[Path, Split], TrainResult]",
    say: Say,
) -> "TrainResult":
    """Train each fold that has no bundle yet, and predict the patients that it never saw.

    Probabilities of all folds are put together as they are; a tile is called by its own fold's threshold.

    Args:
        tiles: the store's labelled tiles.
        splits: the folds.
        out: takes `fold-1`, `fold-2` ..., `folds.csv`, `held-out.csv` and `cross-validation.json`.
        settings: what the user said.
        train: trains one split into a folder.
        say: takes lines for the user.
    """
    from wsi_idc.train.loop import TrainResult

    out.mkdir(parents=True, exist_ok=True)
    folds: list[dict[str, NDArray[Any]]] = []
    epochs = 0
    for number, split in enumerate(splits, start=1):
        folder = out / f"fold-{number}"
        if folder.exists():
            _check_fold(folder, tiles, split, settings)
            say(f"fold {number}: done before")
        else:
            say(f"fold {number} of {settings.folds}")
            epochs += train(folder, split).epochs
        folds.append(_predict(folder, tiles, split, settings, number))
    rows = [
        {"fold": number, **_figures(_judged(str(number), columns), settings.seed)}
        for number, columns in enumerate(folds, start=1)
    ]
    together = {key: np.concatenate([columns[key] for columns in folds]) for key in folds[0]}
    pooled = _judged("cross-validation", together)
    whole = evaluate_one(pooled, seed=settings.seed)
    _write_csv(out / "folds.csv", [_flat(row) for row in rows])
    write_held_out(out, _tile_rows(together))
    figures = {key: (figure.value, figure.low, figure.high) for key, figure in whole.figures.items()}
    summary = {"settings": settings.recorded(), "patients": pooled.n_patients, "folds": rows, "pooled": figures}
    (out / "cross-validation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return TrainResult(out, epochs, figures, list(whole.notes))


def _check_fold(folder: Path, tiles: LabelledTiles, split: Split, settings: TrainSettings) -> None:
    training = read_bundle(folder).fields.training
    same = (
        training.get("settings") == settings.recorded()
        and training.get("held_out_patients") == np.unique(tiles.patient[split.held_out]).tolist()
        and training.get("data_identity") == tiles.identity
    )
    if not same:
        raise UsageError(folder, "was trained with other settings, or on another store", "choose another --out")


def _predict(
    folder: Path, tiles: LabelledTiles, split: Split, settings: TrainSettings, number: int
) -> dict[str, NDArray[Any]]:
    """The held-out tiles by one fold: the columns of `HeldOut`, and `fold`."""
    fields, places = read_bundle(folder).fields, split.held_out
    cache = folder.with_name(folder.name + ".training") / "held-out.npy"
    pixels = read_pixels(tiles, places, cache, settings.memory_gb * 2**30)
    alone = predict_all(load_runtime(read_bundle(folder), "float32", settings.threads), pixels)
    cache.unlink(missing_ok=True)
    together: NDArray[np.floating] = alone
    if context := fields.context:
        cell, spec = tiles.cell[places], tiles.spec
        together = by_slide(tiles.slide[places], lambda own: in_context(alone[own], cell[own], spec, context))
    count = len(places)
    return {
        "fold": np.full(count, str(number)),
        "slide": tiles.slide[places],
        "row": tiles.row[places],
        "patient": tiles.patient[places],
        "truth": tiles.positive(settings.positive_from)[places].astype(np.int8),
        "probability": together.astype(np.float32),
        "threshold": np.full(count, fields.operating_point),
        "alone": alone,
        "alone_threshold": np.full(count, fields.threshold),
    }


def _judged(name: str, columns: dict[str, NDArray[Any]]) -> Predictions:
    slide, patient, threshold = (columns[key] for key in ("slide", "patient", "threshold"))
    return predictions(name, columns["probability"], columns["truth"], slide, patient, threshold=threshold)


def _figures(data: Predictions, seed: int) -> dict[str, Any]:
    evaluation = evaluate_one(data, seed=seed)
    figures = {key: (figure.value, figure.low, figure.high) for key, figure in evaluation.figures.items()}
    return {"patients": data.n_patients, "tiles": len(data), "threshold": data.thresholds[0], **figures}


def _tile_rows(columns: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    # A float32 is told exactly by nine digits, so that ties stay ties and no others come up.
    exact = {key: [f"{value:.9g}" for value in columns[key]] for key in ("probability", "alone")}
    whole = {key: values.tolist() for key, values in columns.items()} | exact
    return [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in row.items() if key not in FIGURES}
    for key in FIGURES:
        flat |= {key: row[key][0], f"{key}_low": row[key][1], f"{key}_high": row[key][2]}
    return flat


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
