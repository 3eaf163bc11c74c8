"""One training run from a store to a bundle: what is prepared, Lightning's trainer, and how a broken run goes on.

While a run lasts, `OUT.training/` beside the bundle holds its checkpoints and logs; the bundle appears when whole.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_idc.digests import digest
from wsi_idc.errors import UsageError
from wsi_idc.model.bundle import LoadedBundle, read_bundle
from wsi_idc.model.network import TileNetwork, build_network, load_weights
from wsi_idc.names import check_slide_id
from wsi_idc.settings import TileSpec
from wsi_idc.store import open_store
from wsi_idc.train.data import LabelledTiles, Say, labelled_tiles, read_pixels
from wsi_idc.train.fit import fit
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import Split, make_folds, make_split

TEACHER_SHARE = 0.7
"""Part of a training tile's target that is the teacher's probability; the rest is its label."""


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Attributes:
        bundle: the folder that was written; in cross-validation, the folder of the folds.
        epochs: epochs that were trained, of all folds together.
        figures: name to (value, low, high) with 95 % intervals over patients: on the validation patients, or in
            cross-validation on all held-out patients together.
        notes: a line each, for the user.
    """

    bundle: Path
    epochs: int
    figures: dict[str, tuple[float, float, float]]
    notes: list[str]


def run(
    store_path: Path,
    out: Path,
    settings: TrainSettings,
    *,
    say: Say,
    resume: bool = False,
    progress: bool = False,
) -> TrainResult:
    """Train on a store's labelled tiles, and write a bundle (with `folds`, one a fold).

    Args:
        store_path: the tile store.
        out: the bundle's folder, which must not exist yet.
        settings: what the user said.
        say: takes lines for the user.
        resume: go on where a run with the same settings and store was broken off.
        progress: draw a progress bar on the terminal.

    Raises:
        StoreError: no store, no labels, no pixels.
        UsageError: settings that cannot be carried out, too few patients, a damaged checkpoint, a place that is taken.
        ModelError: a bundle to start or learn from that does not fit.
        WsiIdcError: the disk is full.
        KeyboardInterrupt: interrupted; the last checkpoint is whole.
    """
    from wsi_idc.train.cross_validation import cross_validate, read_study

    say = say if _rank() == 0 else _silent
    store = open_store(store_path)
    tiles = labelled_tiles(store)
    if tiles.unknown:
        say(f"{tiles.unknown:,} tiles have no label and are left out")
    if settings.cross_validation is not None:
        if settings.folds or settings.split_by == "tile":
            raise UsageError("--cross-validation", "calibrates one model, split by patient", "leave one of them out")
        read_study(settings.cross_validation, tiles, settings)  # refused now rather than after hours
    if settings.folds:
        if settings.folds < 2 or settings.split_by == "tile":
            raise UsageError("--folds", "needs at least 2, split by patient", "leave out --folds or --split-by tile")

        def train(folder: Path, fold: Split) -> TrainResult:
            return run_split(tiles, fold, folder, settings, say, resume=resume, progress=progress)

        seen: set[str] = set()
        within: list[list[str]] = []
        for folder in filter(None, (settings.init, settings.teacher)):
            others = [bundle.fields.training for bundle in _bundles(folder)]
            seen.update(set.intersection(*(set(other.get("train_patients", [])) for other in others)))
            if len(others) > 1:
                within = [other.get("held_out_patients", []) for other in others]
        return cross_validate(tiles, make_folds(tiles, settings, seen, within), out, settings, train, say)
    return run_split(tiles, make_split(tiles, settings, say), out, settings, say, resume=resume, progress=progress)


def run_split(
    tiles: LabelledTiles, split: Split, out: Path, settings: TrainSettings, say: Say, *, resume: bool, progress: bool
) -> TrainResult:
    """Train one model on one split; arguments and errors as in `run`."""
    from wsi_idc.train.finish import finish

    work = out.with_name(out.name + ".training")
    if fault := check_slide_id(out.name):
        raise UsageError(f"--out {out}", f"the bundle's name {fault}", "choose another name")
    if out.exists() and _rank() == 0:
        raise UsageError(out, "is there already", "choose another --out, or remove it")
    _prepare(work, {"settings": settings.content(), "data": tiles.identity}, resume=resume)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    recipe, positive = settings.resolve(), tiles.positive(settings.positive_from)
    limit = settings.memory_gb * 2**30
    pixels = {
        name: read_pixels(tiles, places, work / f"{name}-{_rank()}.npy", limit)
        for name, places in (("train", split.train), ("val", split.val))
    }
    say(_who(tiles, split, positive))
    targets = positive[split.train].astype(np.float32)
    if settings.teacher is not None:
        teacher = _other_bundle(settings.teacher, tiles, split, "--teacher")
        targets = _taught(teacher, pixels["train"], targets, settings.threads, say)
    network = _network(settings, tiles, split)
    epochs = fit(
        network,
        settings,
        recipe,
        pixels,
        {"train": targets, "val": positive[split.val].astype(np.float32)},
        work,
        say,
        progress=progress,
    )
    if _rank() != 0:
        sys.exit(0)
    result = finish(network, tiles, split, settings, pixels, work, out, epochs, say)
    for path in [*work.glob("*.ckpt"), *work.glob("*.npy"), work / "trained.json"]:
        path.unlink(missing_ok=True)
    return TrainResult(out, epochs, result.figures, result.notes)


def _prepare(work: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Make the folder of a new run, or check that of a broken one."""
    if _rank() != 0:
        return
    state = work / "run.json"
    unfinished = (work / "last.ckpt").exists() or (work / "trained.json").exists()
    if not resume:
        if unfinished:
            raise UsageError(work, "holds a training that was broken off", "add --resume to go on, or remove it")
        if work.exists():
            shutil.rmtree(work)
    elif state.exists():
        try:
            known = json.loads(state.read_text(encoding="utf-8"))["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(state, "damaged", f"remove {work} and train anew") from error
        if known != digest(identity):
            problem = "was begun with other settings, or another store"
            raise UsageError(work, problem, "give the same ones, or train anew without --resume")
        return
    work.mkdir(parents=True, exist_ok=True)
    partial = state.with_suffix(".partial")
    partial.write_text(json.dumps({"identity": digest(identity), **identity}, indent=2) + "\n", encoding="utf-8")
    partial.replace(state)


def _network(settings: TrainSettings, tiles: LabelledTiles, split: Split) -> TileNetwork:
    """The network with fresh weights by the seed, or with those of `init`."""
    torch.manual_seed(settings.seed)
    network = build_network(settings.network_config(tiles.spec.size_px))
    if settings.init is not None:
        bundle = _other_bundle(settings.init, tiles, split, "--init")
        if not bundle.weights.is_file():
            raise UsageError(f"--init {settings.init}", "has no model.safetensors", "give a bundle with weights")
        load_weights(network, bundle.weights)
        network.temperature.fill_(1.0)
    return network


def _bundles(folder: Path) -> list[LoadedBundle]:
    """The bundle of a folder; of a cross-validation, those of its folds."""
    folds = sorted(path.parent for path in folder.glob("fold-*/bundle.json"))
    return [read_bundle(path) for path in folds or [folder]]


def _other_bundle(folder: Path, tiles: LabelledTiles, split: Split, option: str) -> LoadedBundle:
    """A bundle to start or learn from: of the same tiles, and trained on none who validate or are held out.

    Of a cross-validation it is the fold that held out the patients who are held out now.
    """
    bundles = _bundles(folder)
    held_out = set(tiles.patient[split.held_out].tolist())
    if len(bundles) > 1:
        bundles = [one for one in bundles if held_out and held_out <= _held_out(one)]
        if not bundles:
            problem = "is a cross-validation without a fold that held out the patients who are held out now"
            raise UsageError(f"{option} {folder}", problem, "give the same store, or one of its folds")
    bundle = bundles[0]
    bundle.check_fits(TileSpec(size_px=tiles.spec.size_px, mpp=tiles.spec.mpp))
    seen = set(bundle.fields.training.get("train_patients", []))
    judges = set(tiles.patient[np.concatenate([split.val, split.held_out])].tolist())
    if shared := sorted(seen & judges):
        problem = f"was trained on {len(shared)} of the patients that validate ({', '.join(shared[:3])}...)"
        raise UsageError(f"{option} {folder}", problem, "its knowledge of them would flatter every figure")
    return bundle


def _held_out(bundle: LoadedBundle) -> set[str]:
    return set(bundle.fields.training.get("held_out_patients", []))


def _taught(
    teacher: LoadedBundle, pixels: NDArray[np.uint8], labels: NDArray[np.float32], threads: int, say: Say
) -> NDArray[np.float32]:
    """Labels blended with a teacher's probabilities (Hinton et al., 2015, arXiv:1503.02531): float32 (n,)."""
    from wsi_idc.model.runtime import load_runtime, predict_all

    runtime = load_runtime(teacher, "float32", threads)
    say(f"asking the teacher {teacher.fields.name} about {len(pixels):,} training tiles")
    blended: NDArray[np.float32] = (1.0 - TEACHER_SHARE) * labels + TEACHER_SHARE * predict_all(runtime, pixels)
    return blended.astype(np.float32)


def _who(tiles: LabelledTiles, split: Split, positive: NDArray[np.bool_]) -> str:
    sides = {"training": split.train, "validation": split.val, "held out": split.held_out}
    parts = [
        f"{name} {len(places):,} tiles of {len(np.unique(tiles.patient[places])):,} patients, "
        f"{positive[places].mean():.1%} IDC"
        for name, places in sides.items()
        if len(places)
    ]
    return f"split {split.source}: {'; '.join(parts)}"


def _rank() -> int:
    """Which of several processes this is; Lightning starts the others with LOCAL_RANK set."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _silent(line: str) -> None:
    """Say nothing: the first process speaks for all."""
