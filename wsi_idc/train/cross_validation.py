"""Cross-validation: a bundle a fold, and the figures of all held-out patients together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import UsageError
from wsi_idc.evaluate.held_out import write_held_out
from wsi_idc.evaluate.metrics import FIGURES, Evaluation, evaluate_one
from wsi_idc.evaluate.predictions import predictions
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.network import load_network
from wsi_idc.train.calibrate import Judges, calibrate
from wsi_idc.train.data import LabelledTiles, Say, read_pixels
from wsi_idc.train.judge import expected_logit, judge_tiles
from wsi_idc.train.one import run_split
from wsi_idc.train.outputs import put_json, put_table
from wsi_idc.train.ranks import rank
from wsi_idc.train.result import TrainResult
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import Split
from wsi_idc.train.study import SUMMARY


@dataclass(frozen=True)
class Fold:
    """A trained fold: what its network says of the patients who validate and of those whom it never saw."""

    number: int
    split: Split
    val: Judges
    held_out: Judges
    mean: float | None


def cross_validate(
    tiles: LabelledTiles,
    splits: Iterable[Split],
    out: Path,
    settings: TrainSettings,
    say: Say,
    *,
    resume: bool,
    progress: bool,
) -> TrainResult | None:
    """Train each fold that has no bundle yet, and predict the patients that it never saw.

    The temperatures and thresholds that a fold's held-out patients are judged by come from its validation patients and
    from the held-out patients of the other folds; none of its own has a part in them.

    Args:
        tiles: the store's labelled tiles.
        splits: the folds.
        out: takes `fold-1`, `fold-2` ..., `folds.csv`, `held-out.csv` and `cross-validation.json`.
        settings: what the user said.
        say: takes lines for the user.
        resume: go on where a fold was broken off.
        progress: draw a progress bar on the terminal.

    Returns:
        What came out; None in a helper process. One is started for each fold that is trained, the first that has no
        bundle then, and ends with it.

    Raises:
        UsageError: a fold that is there was made otherwise; and as `one.run_split`.
    """
    out.mkdir(parents=True, exist_ok=True)
    folds: list[Fold] = []
    epochs = 0
    for number, split in enumerate(splits, start=1):
        folder = out / f"fold-{number}"
        if folder.exists():
            if rank():
                continue
            _check_fold(folder, tiles, split, settings)
            say(f"fold {number}: done before")
        else:
            say(f"fold {number} of {settings.folds}")
            result = run_split(tiles, split, folder, settings, say, resume=resume, progress=progress)
            if result is None:
                return None
            epochs += result.epochs
            for note in result.notes:
                say(note)
        folds.append(_predict(folder, tiles, split, settings, number))
    columns = [_columns(fold, folds, tiles) for fold in folds]
    rows = []
    for fold, own in zip(folds, columns, strict=True):
        judged, threshold = _judge(str(fold.number), own, settings.seed), float(own["threshold"][0])
        counts = {"patients": judged.predictions.n_patients, "tiles": len(judged.predictions)}
        rows.append({"fold": fold.number, **counts, "threshold": threshold, **judged.intervals})
    pooled = {key: np.concatenate([own[key] for own in columns]) for key in columns[0]}
    whole = _judge("cross-validation", pooled, settings.seed)
    put_table(out / "folds.csv", [_flat(row) for row in rows])
    write_held_out(out, _tile_rows(pooled))
    summary = {
        "settings": settings.recorded(),
        "data_identity": tiles.identity,
        "patients": whole.predictions.n_patients,
        "folds": rows,
        "pooled": whole.intervals,
        "pooled_alone": _judge("alone", pooled, settings.seed, "alone").intervals,
    }
    put_json(out / SUMMARY, summary)
    return TrainResult(out, epochs, whole.intervals, list(whole.notes))


def _check_fold(folder: Path, tiles: LabelledTiles, split: Split, settings: TrainSettings) -> None:
    training = read_bundle(folder).fields.training
    same = (
        not settings.unlike(training.get("settings", {}))
        and training.get("held_out_patients") == np.unique(tiles.patient[split.held_out]).tolist()
        and training.get("data_identity") == tiles.identity
    )
    if not same:
        raise UsageError(folder, "was trained with other settings, or on another store", "choose another --out")


def _predict(folder: Path, tiles: LabelledTiles, split: Split, settings: TrainSettings, number: int) -> Fold:
    bundle = read_bundle(folder)
    network = load_network(bundle.fields.network or {}, bundle.weights)
    network.temperature.fill_(1.0)
    cache = folder.with_name(folder.name + ".training") / "held-out.npy"
    cache.parent.mkdir(exist_ok=True)

    def judges(places: NDArray[np.int64]) -> Judges:
        pixels = read_pixels(tiles, places, cache, settings.memory_gb * 2**30)
        found = judge_tiles(network, tiles, places, pixels, settings)
        cache.unlink(missing_ok=True)
        return found

    mean = expected_logit(tiles, split, settings)
    return Fold(number, split, judges(split.val), judges(split.held_out), mean)


def _columns(fold: Fold, folds: Sequence[Fold], tiles: LabelledTiles) -> dict[str, NDArray[Any]]:
    """The columns of `HeldOut` for the patients whom a fold never saw."""
    others = [other.held_out for other in folds if other is not fold]
    calibration = calibrate([fold.val, *others], tiles.spec, mean=fold.mean)
    places, judges = fold.split.held_out, fold.held_out
    count = len(places)
    return {
        "fold": np.full(count, str(fold.number)),
        "slide": tiles.slide[places],
        "row": tiles.row[places],
        "patient": tiles.patient[places],
        "truth": judges.truth.astype(np.int8),
        "logit": judges.logits,
        "probability": calibration.together(judges, tiles.spec).astype(np.float32),
        "threshold": np.full(count, calibration.operating_point),
        "alone": calibration.alone(judges.logits).astype(np.float32),
        "alone_threshold": np.full(count, calibration.threshold),
    }


def _judge(name: str, columns: dict[str, NDArray[Any]], seed: int, which: str = "") -> Evaluation:
    values = columns[which or "probability"]
    threshold = columns[f"{which}_threshold" if which else "threshold"]
    data = predictions(name, values, columns["truth"], columns["slide"], columns["patient"], threshold=threshold)
    return evaluate_one(data, seed=seed)


def _tile_rows(columns: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    # A float32 is told exactly by nine digits, so that ties stay ties and no others come up.
    exact = {key: [f"{value:.9g}" for value in columns[key]] for key in ("logit", "probability", "alone")}
    whole = {key: values.tolist() for key, values in columns.items()} | exact
    return [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in row.items() if key not in FIGURES}
    for key in FIGURES:
        flat |= {key: row[key][0], f"{key}_low": row[key][1], f"{key}_high": row[key][2]}
    return flat
