"""One split to one bundle: what is prepared, what is trained and written, and how a broken run goes on.

While a run lasts, `OUT.training/` beside the bundle holds its checkpoints and logs; the bundle appears when whole.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_idc.digests import digest
from wsi_idc.errors import UsageError
from wsi_idc.model.bundle import LoadedBundle
from wsi_idc.model.network import TileNetwork, build_network, load_weights
from wsi_idc.model.runtime import load_runtime
from wsi_idc.names import check_slide_id
from wsi_idc.train.data import LabelledTiles, Say, read_pixels
from wsi_idc.train.finish import finish
from wsi_idc.train.others import TEACHER, other_bundle
from wsi_idc.train.outputs import put_json
from wsi_idc.train.ranks import rank
from wsi_idc.train.result import TrainResult
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import Split

TEACHER_SHARE = 0.7
"""Part of a training tile's target that is the teacher's probability; the rest is its label."""


def run_split(
    tiles: LabelledTiles, split: Split, out: Path, settings: TrainSettings, say: Say, *, resume: bool, progress: bool
) -> TrainResult | None:
    """Train one model on one split; arguments, result and errors as in `entry.run`."""
    work = out.with_name(out.name + ".training")
    if fault := check_slide_id(out.name):
        raise UsageError(f"--out {out}", f"the bundle's name {fault}", "choose another name")
    if out.exists() and rank() == 0:
        raise UsageError(out, "is there already", "choose another --out, or remove it")
    _prepare(work, {"settings": settings.content(), "data": tiles.identity}, resume=resume)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    recipe, positive = settings.resolve(), tiles.positive(settings.positive_from)
    limit = settings.memory_gb * 2**30
    pixels = {
        name: read_pixels(tiles, places, work / f"{name}-{rank()}.npy", limit)
        for name, places in (("train", split.train), ("val", split.val))
    }
    say(_who(tiles, split, positive))
    targets = positive[split.train].astype(np.float32)
    if recipe.teacher is not None:
        teacher = other_bundle(recipe.teacher, tiles, split, TEACHER)
        targets = _taught(teacher, pixels["train"], targets, settings.threads, say)
    network = _network(settings, tiles, split)
    # Lightning takes seconds to import: a training that is refused is refused before.
    from wsi_idc.train.fit import fit

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
    if rank() != 0:
        return None
    result = finish(network, tiles, split, settings, pixels, work, out, epochs)
    for path in [*work.glob("*.ckpt"), *work.glob("*.npy"), *work.glob(".*.part"), work / "trained.json"]:
        path.unlink(missing_ok=True)
    return TrainResult(out, epochs, result.figures, result.notes)


def _prepare(work: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Make the folder of a new run, or check that of a broken one."""
    if rank() != 0:
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
    put_json(state, {"identity": digest(identity), **identity})


def _network(settings: TrainSettings, tiles: LabelledTiles, split: Split) -> TileNetwork:
    """The network with fresh weights by the seed, or with those of `init`."""
    torch.manual_seed(settings.seed)
    network = build_network(settings.network_config(tiles.spec.size_px))
    if settings.init is not None:
        bundle = other_bundle(settings.init, tiles, split, "--init")
        if not bundle.weights.is_file():
            raise UsageError(f"--init {settings.init}", "has no model.safetensors", "give a bundle with weights")
        load_weights(network, bundle.weights)
        network.temperature.fill_(1.0)
    return network


def _taught(
    teacher: LoadedBundle, pixels: NDArray[np.uint8], labels: NDArray[np.float32], threads: int, say: Say
) -> NDArray[np.float32]:
    """Labels blended with a teacher's probabilities (Hinton et al., 2015, arXiv:1503.02531): float32 (n,)."""
    runtime = load_runtime(teacher, "float32", threads)
    say(f"asking the teacher {teacher.fields.name} about {len(pixels):,} training tiles")
    blended: NDArray[np.float32] = (1.0 - TEACHER_SHARE) * labels + TEACHER_SHARE * runtime.predict(pixels)
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
