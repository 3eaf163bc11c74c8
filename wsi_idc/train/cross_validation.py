"""Cross-validation: a bundle a fold, and the figures of all held-out patients together."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import UsageError
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

    Probabilities of all folds are put together; a tile is called by its own fold's threshold, so they are shifted in
    logits until every fold's threshold lies at one half.

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
    folds: list[Predictions] = []
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
    rows = [{"fold": data.model, **_figures(data, settings.seed)} for data in folds]
    pooled = _pool(folds)
    whole = evaluate_one(pooled, seed=settings.seed)
    _write_csv(out / "folds.csv", [_flat(row) for row in rows])
    _write_csv(out / "held-out.csv", list(_tile_rows(folds)))
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


def _predict(folder: Path, tiles: LabelledTiles, split: Split, settings: TrainSettings, number: int) -> Predictions:
    bundle = read_bundle(folder)
    cache = folder.with_name(folder.name + ".training") / "held-out.npy"
    pixels = read_pixels(tiles, split.held_out, cache, settings.memory_gb * 2**30)
    probability: NDArray[np.floating] = predict_all(load_runtime(bundle, "float32", settings.threads), pixels)
    cache.unlink(missing_ok=True)
    if context := bundle.fields.context:
        alone, cell, spec = probability, tiles.cell[split.held_out], tiles.spec
        slide = tiles.slide[split.held_out]
        probability = by_slide(slide, lambda own: in_context(alone[own], cell[own], spec, context))
    return predictions(
        str(number),
        probability,
        tiles.part[split.held_out],
        tiles.slide[split.held_out],
        tiles.patient[split.held_out],
        threshold=bundle.fields.operating_point,
        positive_from=settings.positive_from,
    )


def _figures(data: Predictions, seed: int) -> dict[str, Any]:
    evaluation = evaluate_one(data, seed=seed)
    figures = {key: (figure.value, figure.low, figure.high) for key, figure in evaluation.figures.items()}
    return {"patients": data.n_patients, "tiles": len(data), "threshold": data.threshold, **figures}


def _pool(folds: list[Predictions]) -> Predictions:
    return predictions(
        "cross-validation",
        np.concatenate([centred(data.probability, data.threshold) for data in folds]),
        np.concatenate([data.truth for data in folds]),
        np.concatenate([data.slide for data in folds]),
        np.concatenate([data.patient for data in folds]),
        threshold=0.5,
    )


def centred(probability: NDArray[np.floating], threshold: float) -> NDArray[np.float64]:
    """Probabilities shifted in logits until the threshold lies at one half: float64 (n,)."""
    from scipy.special import expit, logit

    certain = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.asarray(expit(logit(certain) - logit(threshold)))


def _tile_rows(folds: list[Predictions]) -> "Iterable[dict[str, Any]]":
    for data in folds:
        for slide, patient, truth, probability in zip(
            data.slide, data.patient, data.truth, data.probability, strict=True
        ):
            yield {
                "fold": data.model,
                "slide": slide,
                "patient": patient,
                "truth": int(truth),
                "probability": f"{probability:.6f}",
            }


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
