"""What a training is: its store and labels, and then one split to a bundle, or a fold after the other."""

from pathlib import Path

from wsi_idc.errors import UsageError
from wsi_idc.store import open_store
from wsi_idc.train.cross_validation import cross_validate
from wsi_idc.train.data import Say, labelled_tiles
from wsi_idc.train.one import run_split
from wsi_idc.train.others import seen_and_held_out
from wsi_idc.train.ranks import rank
from wsi_idc.train.result import TrainResult
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import make_folds, make_split
from wsi_idc.train.study import read_study


def run(
    store: str | Path,
    out: Path,
    settings: TrainSettings,
    *,
    say: Say,
    resume: bool = False,
    progress: bool = False,
) -> TrainResult | None:
    """Train on a store's labelled tiles, and write a bundle (with `folds`, one a fold).

    Args:
        store: the tile store's address.
        out: the bundle's folder, which must not exist yet.
        settings: what the user said.
        say: takes lines for the user.
        resume: go on where a run with the same settings and store was broken off.
        progress: draw a progress bar on the terminal.

    Returns:
        What came out; None in a helper process (`ranks`), which has nothing to tell.

    Raises:
        StoreError: no store, no labels, no pixels.
        UsageError: settings that cannot be carried out, too few patients, a damaged checkpoint, a place that is taken.
        ModelError: a bundle to start or learn from that does not fit.
        WsiIdcError: the disk is full.
        KeyboardInterrupt: interrupted; the last checkpoint is whole.
    """
    say = say if rank() == 0 else _silent
    tiles = labelled_tiles(open_store(store))
    if tiles.unknown:
        say(f"{tiles.unknown:,} tiles have no label and are left out")
    if settings.cross_validation is not None:
        if settings.folds or settings.split_by == "tile":
            raise UsageError("--cross-validation", "calibrates one model, split by patient", "leave one of them out")
        read_study(settings.cross_validation, tiles, settings)  # refused now rather than after hours
    if not settings.folds:
        split = make_split(tiles, settings, say)
        return run_split(tiles, split, out, settings, say, resume=resume, progress=progress)
    if settings.folds < 2 or settings.split_by == "tile":
        raise UsageError("--folds", "needs at least 2, split by patient", "leave out --folds or --split-by tile")
    seen, within = seen_and_held_out(settings)
    splits = make_folds(tiles, settings, seen, within)
    return cross_validate(tiles, splits, out, settings, say, resume=resume, progress=progress)


def _silent(line: str) -> None:
    """Say nothing: the first process speaks for all."""
