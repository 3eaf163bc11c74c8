"""From a trained network to a bundle: calibration, graphs, checks that all forms agree, the card."""

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE
from wsi_idc.errors import WsiIdcError
from wsi_idc.evaluate.metrics import FIGURES, Evaluation, evaluate_one
from wsi_idc.evaluate.page import plain
from wsi_idc.evaluate.predictions import predictions
from wsi_idc.files import write_whole
from wsi_idc.model.bundle import Bundle, read_bundle
from wsi_idc.model.known import answers
from wsi_idc.model.network import TileNetwork, export_onnx, quantize, save_weights
from wsi_idc.model.runtime import TorchRuntime, load_runtime
from wsi_idc.train.calibrate import calibrate
from wsi_idc.train.data import LabelledTiles
from wsi_idc.train.history import draw_history, merge_logs
from wsi_idc.train.judge import expected_logit, judge_tiles
from wsi_idc.train.outputs import put_json, put_table
from wsi_idc.train.result import Figure, tell
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import Split
from wsi_idc.train.study import read_study

FLOAT32_TOLERANCE = 1e-4
INT8_AUC_LOSS = 0.002
CALIBRATION_TILES = 512
LIMITS = (
    USE,
    "Trained on tiles of the size and um/px stated; slides must be tiled the same way.",
    "The figures of the validation patients flatter: they chose the epoch, the temperatures and the thresholds. Judge "
    "the model on patients that are in no list of it.",
)
TITLES = {"resnet50": "ResNet-50", "idc-2016": "IDC network of 2016, three convolutions"}


@dataclass(frozen=True)
class Finished:
    """What `finish` tells: figures as (value, low, high), and lines for the user."""

    figures: dict[str, Figure]
    notes: list[str]


def finish(
    network: TileNetwork,
    tiles: LabelledTiles,
    split: Split,
    settings: TrainSettings,
    pixels: Mapping[str, NDArray[np.uint8]],
    work: Path,
    out: Path,
    epochs: int,
) -> Finished:
    """Write the bundle beside its place, then rename it.

    Args:
        network: trained; its weights are rounded to half precision and its temperature is set.
        tiles: the store's labelled tiles.
        split: who trained and who validates.
        settings: what the user said.
        pixels: `train` and `val`, uint8 (n, size, size, 3) RGB.
        work: the training's folder, with its logs.
        out: the bundle's place.
        epochs: epochs that were trained.

    Raises:
        WsiIdcError: the disk is full, or the graph and the network disagree.
    """
    partial = work / "bundle"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        finished = _write(network, tiles, split, settings, pixels, work, partial, out.name, epochs)
        partial.replace(out)
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "the training is kept: make room, then --resume"
        raise WsiIdcError(out, f"the bundle cannot be written ({reason})", advice) from error
    return finished


def _write(
    network: TileNetwork,
    tiles: LabelledTiles,
    split: Split,
    settings: TrainSettings,
    pixels: Mapping[str, NDArray[np.uint8]],
    work: Path,
    folder: Path,
    name: str,
    epochs: int,
) -> Finished:
    network.eval().to("cpu")
    network.temperature.fill_(1.0)
    # Rounds the weights to half precision, in the network too: all that follows is by the rounded ones.
    save_weights(network, folder / "model.safetensors")
    val = judge_tiles(network, tiles, split.val, pixels["val"], settings)
    study = read_study(settings.cross_validation, tiles, settings) if settings.cross_validation else None
    judges = [val, *study.judges] if study else [val]
    calibration = calibrate(judges, tiles.spec, mean=expected_logit(tiles, split, settings))
    network.temperature.fill_(calibration.temperature)
    save_weights(network, folder / "model.safetensors")
    export_onnx(network, folder / "model.onnx")
    probability, context = calibration.alone(val.logits), calibration.context

    def judge(values: NDArray[np.float64], at: float) -> Evaluation:
        data = predictions(name, values, val.truth, val.slide, tiles.patient[split.val], threshold=at)
        return evaluate_one(data, seed=settings.seed)

    alone = judge(probability, calibration.threshold)
    evaluation = judge(calibration.together(val, tiles.spec), context.threshold) if context else alone
    card = _card(network, tiles, split, settings, name, calibration.threshold, evaluation, epochs)
    if context:
        card["context"] = context.model_dump()
        card["training"]["figures_alone"] = plain(alone.intervals)
    if study:
        card["training"]["cross_validation"] = plain(study.recorded)
    put_json(folder / "bundle.json", card)
    _check_graph(folder, probability, pixels["val"], settings.threads)
    by_weights = TorchRuntime(read_bundle(folder), settings.threads)
    card["known"] = answers(by_weights.predict, tiles.spec.size_px).model_dump(mode="json")
    notes = list(evaluation.notes)
    quantize(folder / "model.onnx", folder / "model.int8.onnx", _calibration(pixels["train"], settings.seed))
    card["graph"]["int8"] = "model.int8.onnx"
    put_json(folder / "bundle.json", card)
    loss = alone.figures["roc_auc"].value - _int8_auc(folder, pixels["val"], val.truth, settings.threads)
    card["training"]["int8_auc_loss"] = round(loss, 5)
    if loss > INT8_AUC_LOSS:
        (folder / "model.int8.onnx").unlink()
        del card["graph"]["int8"]
        notes.append(f"int8 loses {loss:.4f} AUC on validation, more than {INT8_AUC_LOSS}: it is not written")
    put_json(folder / "bundle.json", card)
    rows = merge_logs(work / "logs")
    if rows:
        put_table(folder / "history.csv", rows)
        write_whole(folder / "history.png", draw_history(rows))
    write_whole(folder / "CARD.md", card_text(card).encode())
    return Finished(evaluation.intervals, notes)


def _check_graph(folder: Path, expected: NDArray[np.float64], pixels: NDArray[np.uint8], threads: int) -> None:
    """Raise an error where the graph and the network disagree."""
    some = slice(0, 512)
    found = load_runtime(read_bundle(folder), "float32", threads).predict(pixels[some])
    gap = float(np.abs(found - expected[some]).max())
    if gap > FLOAT32_TOLERANCE:
        problem = f"the graph and the network differ by {gap:.2g}, more than {FLOAT32_TOLERANCE:g}"
        raise WsiIdcError(folder, problem, "report this as a bug; the training is kept")


def _int8_auc(folder: Path, pixels: NDArray[np.uint8], truth: NDArray[np.bool_], threads: int) -> float:
    from sklearn.metrics import roc_auc_score

    runtime = load_runtime(read_bundle(folder), "int8", threads)
    return float(roc_auc_score(truth, runtime.predict(pixels)))


def _calibration(pixels: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng((seed, 8))
    chosen = generator.choice(len(pixels), size=min(CALIBRATION_TILES, len(pixels)), replace=False)
    return pixels[np.sort(chosen)]


def _card(
    network: TileNetwork,
    tiles: LabelledTiles,
    split: Split,
    settings: TrainSettings,
    name: str,
    threshold: float,
    evaluation: Evaluation,
    epochs: int,
) -> dict[str, Any]:
    spec, positive = tiles.spec, tiles.positive(settings.positive_from)
    sides = {"train": split.train, "val": split.val, "held_out": split.held_out}
    counts = {
        side: {
            "patients": len(np.unique(tiles.patient[places])),
            "tiles": len(places),
            "positive": int(positive[places].sum()),
        }
        for side, places in sides.items()
        if len(places)
    }
    patients = {f"{side}_patients": np.unique(tiles.patient[places]).tolist() for side, places in sides.items()}
    card = {
        "format": "wsi-idc-model/1",
        "name": name,
        "title": f"{TITLES[settings.network]}, {spec}",
        "classes": ["non-IDC", "IDC"],
        "tile": {"size_px": spec.size_px, "mpp": spec.mpp},
        "graph": {"file": "model.onnx", "input": "tiles", "output": "probability"},
        "threshold": threshold,
        "network": network.config.model_dump(mode="json"),
        "training": {
            "data": counts,
            "data_identity": tiles.identity,
            "unlabelled_tiles": tiles.unknown,
            "split": split.source,
            "recipe": settings.recipe,
            "seed": settings.seed,
            "settings": settings.recorded(),
            "epochs": epochs,
            "temperature": float(network.temperature),
            "figures_on": f"validation {settings.split_by}s",
            "figures": evaluation.intervals,
            "interval": f"95 %, bootstrap over {counts['val']['patients']} patients",
            **patients,
            "versions": {
                "python": platform.python_version(),
                **{
                    package: version(package)
                    for package in ("wsi-idc", "torch", "lightning", "onnxruntime", "openvino")
                },
            },
            "limits": list(LIMITS),
        },
    }
    fields: dict[str, Any] = plain(Bundle.model_validate(card).model_dump(mode="json", exclude_none=True))
    return fields


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    training = card["training"]
    lines = [
        f"# {card['name']}: {card['title']}",
        "",
        *(f"- {limit}" for limit in training["limits"]),
        "",
        f"Split: {training['split']}. Recipe {training['recipe']}, seed {training['seed']}, "
        f"{training['epochs']} epochs. Temperature {training['temperature']:.3f}, threshold {card['threshold']:.3f}. "
        f"Patients are listed in bundle.json.",
        "",
        "| side | patients | tiles | IDC |",
        "|---|---|---|---|",
        *(f"| {side} | {c['patients']} | {c['tiles']:,} | {c['positive']:,} |" for side, c in training["data"].items()),
        "",
        f"| {training['figures_on']} | value | {training['interval']} |",
        "|---|---|---|",
    ]
    lines += _figure_lines(training["figures"])
    if context := card.get("context"):
        lines += [
            "",
            f"Neighbours count in these: reach {context['reach_um']:g} um, spread {context['spread']:g}, mean logit "
            f"{context['mean']:.3f}, temperature {context['temperature']:.3f}, shift {context['shift']:.3f}, threshold "
            f"{context['threshold']:.3f}. Each tile alone, as the graph gives it:",
            "",
            f"| {training['figures_on']} | value | {training['interval']} |",
            "|---|---|---|",
            *_figure_lines(training["figures_alone"]),
        ]
    if study := training.get("cross_validation"):
        lines += [
            "",
            f"On new patients: {study['folds']} networks trained in the same way, each judged on patients whom it "
            f"never saw ({study['name']}, {study['patients']} patients, {study['tiles']:,} tiles). The model's "
            "temperatures and thresholds are from these and the validation patients together; those of each fold are "
            "from the validation patients and the other folds.",
        ]
        whole = "neighbours counted" if "figures_alone" in study else "each tile alone"
        for key, title in (("figures", whole), ("figures_alone", "each tile alone")):
            if key in study:
                lines += ["", f"| new patients, {title} | value | {study['interval']} |", "|---|---|---|"]
                lines += _figure_lines(study[key])
    return "\n".join(lines) + "\n"


def _figure_lines(figures: Mapping[str, Sequence[float | None]]) -> list[str]:
    return [f"| {FIGURES[key]} | {' | '.join(tell(figure))} |" for key, figure in figures.items()]
