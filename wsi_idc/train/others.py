"""Other bundles, from which a training starts or learns: they must not have seen whom it is judged by."""

from pathlib import Path

import numpy as np

from wsi_idc.errors import UsageError
from wsi_idc.model.bundle import LoadedBundle, read_bundle
from wsi_idc.settings import TileSpec
from wsi_idc.train.data import LabelledTiles
from wsi_idc.train.settings import TrainSettings
from wsi_idc.train.splits import Split

TEACHER = "the recipe's teacher"


def other_bundle(folder: Path, tiles: LabelledTiles, split: Split, option: str) -> LoadedBundle:
    """A bundle to start or learn from: of the same tiles, and trained on none who validate or are held out.

    Of a cross-validation it is the fold that held out the patients who are held out now.

    Args:
        folder: a bundle, or a cross-validation.
        tiles: the store's labelled tiles.
        split: who trains, validates and is held out.
        option: where the folder was named, for errors.

    Raises:
        ModelError: it is damaged, or of other tiles.
        UsageError: it was trained on patients who judge.
    """
    bundles = _bundles(folder)
    held_out = set(tiles.patient[split.held_out].tolist())
    if len(bundles) > 1:
        bundles = [one for one in bundles if held_out and held_out <= one.fields.patients("held_out_patients")]
        if not bundles:
            problem = "is a cross-validation without a fold that held out the patients who are held out now"
            raise UsageError(f"{option} {folder}", problem, "give the same store, or one of its folds")
    bundle = bundles[0]
    bundle.check_fits(TileSpec(size_px=tiles.spec.size_px, mpp=tiles.spec.mpp))
    judges = set(tiles.patient[np.concatenate([split.val, split.held_out])].tolist())
    if shared := sorted(bundle.fields.patients("train_patients") & judges):
        problem = f"was trained on {len(shared)} of the patients that validate ({', '.join(shared[:3])}...)"
        raise UsageError(f"{option} {folder}", problem, "its knowledge of them would flatter every figure")
    return bundle


def seen_and_held_out(settings: TrainSettings) -> tuple[set[str], list[set[str]]]:
    """What the other bundles of a cross-validation's settings were trained on, and the parts that it must keep to.

    Returns:
        Patients whom every fold of a bundle to start or learn from was trained on; and where it is a cross-validation,
        the patients whom each of its folds held out.

    Raises:
        ModelError: one of them is damaged.
    """
    seen: set[str] = set()
    within: list[set[str]] = []
    for folder in filter(None, (settings.init, settings.resolve().teacher)):
        bundles = _bundles(folder)
        seen |= set.intersection(*(one.fields.patients("train_patients") for one in bundles))
        if len(bundles) > 1:
            within = [one.fields.patients("held_out_patients") for one in bundles]
    return seen, within


def _bundles(folder: Path) -> list[LoadedBundle]:
    """The bundle of a folder; of a cross-validation, those of its folds."""
    folds = sorted(path.parent for path in folder.glob("fold-*/bundle.json"))
    return [read_bundle(path) for path in folds or [folder]]
