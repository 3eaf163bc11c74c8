"""Who trains, who validates: split by patient, from the manifest or by stratified group folds."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import UsageError
from wsi_idc.train.data import LabelledTiles, Say, check_classes
from wsi_idc.train.settings import TrainSettings

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Places in the labelled tiles, each ascending.

    Attributes:
        train: int64, trained on.
        val: int64, for the best epoch, the temperature and the threshold.
        held_out: int64, predicted by nobody but the model that never saw them; empty but in cross-validation.
        source: how it was made, in words.
    """

    train: Places
    val: Places
    held_out: Places
    source: str


def make_split(tiles: LabelledTiles, settings: TrainSettings, say: Say) -> Split:
    """One split: the manifest's where it names val patients, or else folds; slides of split test are never used.

    Slides without a split train. With `split_by` tile, patients are ignored, and a warning says what that means.

    Raises:
        UsageError: a patient on two sides, too few patients, or one class only.
    """
    positive = tiles.positive(settings.positive_from)
    usable = np.flatnonzero(tiles.split != "test")
    if not len(usable):
        raise UsageError("--store", "every labelled slide is of split test", "nothing is left to train on")
    if settings.split_by == "tile":
        say(
            "warning: --split-by tile puts tiles of one patient on both sides; "
            "its figures are far too good and say nothing about new patients"
        )
        train, val = _fold(usable, positive, usable, settings)
        split = Split(train, val, np.empty(0, np.int64), "random tiles: patients are on both sides")
    elif (tiles.split == "val").any():
        train, val = usable[tiles.split[usable] != "val"], usable[tiles.split[usable] == "val"]
        split = Split(train, val, np.empty(0, np.int64), "by patient, from the manifest")
    else:
        train, val = _by_patient(tiles, usable, positive, settings)
        split = Split(train, val, np.empty(0, np.int64), f"by patient, stratified, seed {settings.seed}")
    _check(tiles, split, positive, settings)
    return split


def make_folds(
    tiles: LabelledTiles, settings: TrainSettings, seen: Collection[str] = (), within: Sequence[Collection[str]] = ()
) -> Iterator[Split]:
    """Cross-validation: each patient who is not of split val or test is held out once.

    The manifest's val patients validate in every fold; without any, a part of each fold's training patients does.

    Args:
        tiles: the store's labelled tiles.
        settings: the number of folds, the seed and the size of a validation part.
        seen: patients that another bundle, from which these start or learn, was trained on: they train in every fold.
        within: the held-out patients of each fold of an earlier cross-validation, whose folds are parted further.

    Raises:
        UsageError: fewer patients than folds, a number of folds that is no multiple of the earlier one, patients whom
            the earlier one did not know, a patient on two sides, or one class only.
    """
    if settings.folds % max(1, len(within)):
        problem = f"is no multiple of the {len(within)} folds to go on from"
        raise UsageError(f"--folds {settings.folds}", problem, "give a multiple, so that each is parted further")

    positive = tiles.positive(settings.positive_from)
    usable = (tiles.split != "test") & (tiles.split != "val")
    known = np.isin(tiles.patient, list(seen))
    pool, always = np.flatnonzero(usable & ~known), np.flatnonzero(usable & known)
    val = np.flatnonzero(tiles.split == "val")
    if within and (
        strange := np.setdiff1d(tiles.patient[pool], np.concatenate([list(names) for names in within])).size
    ):
        problem = f"{strange} patients were neither trained on nor held out by the folds to go on from"
        raise UsageError("--store", problem, "give the store that those were trained on")
    parts = [pool[np.isin(tiles.patient[pool], list(patients))] for patients in within] or [pool]
    outs = [out for part in parts for out in _parted(tiles, part, positive, settings, settings.folds // len(parts))]
    for number, out in enumerate(outs, start=1):
        own = np.union1d(np.setdiff1d(pool, out), always)
        train, chosen = (own, val) if len(val) else _by_patient(tiles, own, positive, settings)
        split = Split(train, chosen, out, f"by patient, fold {number} of {settings.folds}, seed {settings.seed}")
        _check(tiles, split, positive, settings)
        yield split


def _parted(
    tiles: LabelledTiles, places: Places, positive: NDArray[np.bool_], settings: TrainSettings, count: int
) -> list[Places]:
    """Places in `count` parts, each patient in one, the share of positive tiles alike."""
    from sklearn.model_selection import StratifiedGroupKFold

    _check_count(tiles.patient[places], count, f"--folds {settings.folds}")
    if count == 1:
        return [places]
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=settings.seed)
    return [places[out] for _, out in folds.split(places, positive[places], tiles.patient[places])]


def _by_patient(
    tiles: LabelledTiles, usable: Places, positive: NDArray[np.bool_], settings: TrainSettings
) -> tuple[Places, Places]:
    _check_count(tiles.patient[usable], 2, "--store")
    return _fold(usable, positive, tiles.patient[usable], settings)


def _fold(
    usable: Places, positive: NDArray[np.bool_], group: NDArray[np.generic], settings: TrainSettings
) -> tuple[Places, Places]:
    """(rest, one fold of about `val_split`) of the usable places; `group` (of each of them) is kept together."""
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(max(2, round(1 / settings.val_split)), len(np.unique(group)))
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=settings.seed)
    rest, chosen = next(folds.split(usable, positive[usable], group))
    return usable[rest], usable[chosen]


def _check_count(patients: NDArray[np.str_], needed: int, subject: str) -> None:
    found = len(np.unique(patients))
    if found < needed:
        people = f"{found} patient{'s' if found != 1 else ''}"
        raise UsageError(subject, f"labelled tiles of {people}, at least {needed} are needed", "add patients")


def _check(tiles: LabelledTiles, split: Split, positive: NDArray[np.bool_], settings: TrainSettings) -> None:
    sides = {"train": split.train, "val": split.val, "held out": split.held_out}
    if settings.split_by == "patient":
        owner: dict[str, str] = {}
        for name, places in sides.items():
            for patient in np.unique(tiles.patient[places]).tolist():
                if owner.setdefault(patient, name) != name:
                    problem = f"is in {owner[patient]!r} and in {name!r}"
                    raise UsageError(f"patient {patient}", problem, "give all slides of a patient one split")
    for name in ("train", "val"):
        if not len(sides[name]):
            raise UsageError("--store", f"no labelled tiles of split {name}", "mend the manifest's split column")
        check_classes(positive[sides[name]], f"split {name}")
