"""Cross-validation: a bundle a fold, and the figures of all held-out patients together."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import UsageError
from wsi_idc.evaluate.held_out import read_held_out, write_held_out
from wsi_idc.evaluate.metrics import FIGURES, Evaluation, evaluate_one
from wsi_idc.evaluate.predictions import predictions
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.network import load_network
from wsi_idc.train.calibrate import Judges, calibrate
from wsi_idc.train.data import LabelledTiles, Say, read_pixels
from wsi_idc.train.judge import expected_logit, judge_tiles
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import Split

if TYPE_CHECKING:
    from wsi_idc.train.loop import TrainResult

SUMMARY = "cross-validation.json"


@dataclass(frozen=True)
class Fold:
    """A trained fold: what its network says of the patients who validate and of those whom it never saw."""

    number: int
    split: Split
    val: Judges
    held_out: Judges
    mean: float | None


@dataclass(frozen=True)
class Study:
    """A cross-validation that is done, as another training uses it.

    Attributes:
        judges: a part a fold, the held-out patients.
        recorded: name, counts and figures, for the card.
    """

    judges: list[Judges]
    recorded: dict[str, Any]


def cross_validate(
    tiles: LabelledTiles,
    splits: Iterable[Split],
    out: Path,
    settings: TrainSettings,
    train: "Callable[[Path, Split], TrainResult]",
    say: Say,
) -> "TrainResult":
    """Train each fold that has no bundle yet, and predict the patients that it never saw.

    The temperatures and thresholds that a fold's held-out patients are judged by come from its validation patients and
    from the held-out patients of the other folds; none of its own has a part in them.

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
    folds: list[Fold] = []
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
    columns = [_columns(fold, folds, tiles) for fold in folds]
    rows = []
    for fold, own in zip(folds, columns, strict=True):
        judged, threshold = _judge(str(fold.number), own, settings.seed), float(own["threshold"][0])
        counts = {"patients": judged.predictions.n_patients, "tiles": len(judged.predictions)}
        rows.append({"fold": fold.number, **counts, "threshold": threshold, **judged.intervals})
    pooled = {key: np.concatenate([own[key] for own in columns]) for key in columns[0]}
    whole = _judge("cross-validation", pooled, settings.seed)
    _write_csv(out / "folds.csv", [_flat(row) for row in rows])
    write_held_out(out, _tile_rows(pooled))
    summary = {
        "settings": settings.recorded(),
        "data_identity": tiles.identity,
        "patients": whole.predictions.n_patients,
        "folds": rows,
        "pooled": whole.intervals,
        "pooled_alone": _judge("alone", pooled, settings.seed, "alone").intervals,
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return TrainResult(out, epochs, whole.intervals, list(whole.notes))


def read_study(folder: Path, tiles: LabelledTiles, settings: TrainSettings) -> Study:
    """A cross-validation of the recipe that is being trained, on the same store.

    Raises:
        UsageError: none is there, it is damaged, or it is of other settings or another store.
    """
    option = f"--cross-validation {folder}"
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        known, identity = dict(summary["settings"]), summary["data_identity"]
        counts = {"patients": int(summary["patients"]), "folds": len(summary["folds"])}
        figures, alone = summary["pooled"], summary["pooled_alone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "give the folder of a finished train --folds; run that again if an older version made it"
        raise UsageError(option, "holds no finished cross-validation", advice) from error
    if identity != tiles.identity:
        raise UsageError(option, "was made on another store", "cross-validate on the store that is trained on")
    # A final training starts from other weights than a fold, and may look at another number of folds.
    apart = {"folds", "init", "teacher"}
    wanted = settings.recorded()
    if other := sorted(name for name in wanted if name not in apart and known.get(name) != wanted[name]):
        raise UsageError(option, f"was made with other settings ({', '.join(other)})", "give the same ones")
    columns = read_held_out(folder).columns
    place = {key: index for index, key in enumerate(zip(tiles.slide.tolist(), tiles.row.tolist(), strict=True))}
    judges = []
    for fold in np.unique(columns["fold"]):
        own = np.flatnonzero(columns["fold"] == fold)
        keys = zip(columns["slide"][own].tolist(), columns["row"][own].tolist(), strict=True)
        places = np.array([place[key] for key in keys])
        truth = tiles.positive(settings.positive_from)[places]
        judges.append(Judges(columns["logit"][own], tiles.cell[places], tiles.slide[places], truth))
    recorded = {
        "name": folder.resolve().name,
        **counts,
        "tiles": len(columns["fold"]),
        "interval": f"95 %, bootstrap over {counts['patients']} patients",
        "figures": figures,
    }
    return Study(judges, recorded | ({"figures_alone": alone} if alone != figures else {}))


def _check_fold(folder: Path, tiles: LabelledTiles, split: Split, settings: TrainSettings) -> None:
    training = read_bundle(folder).fields.training
    same = (
        training.get("settings") == settings.recorded()
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


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
