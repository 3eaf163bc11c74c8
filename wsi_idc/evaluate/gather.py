"""From the maps of a store to what is evaluated: which slides and labels, and whether a model may be judged on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import UsageError
from wsi_idc.evaluate.held_out import HeldOut
from wsi_idc.evaluate.predictions import Predictions, predictions
from wsi_idc.model.bundle import LoadedBundle
from wsi_idc.store import Store, StoredSlide

ALONE = ", tiles alone"
SplitName = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Gathered:
    """What is evaluated, and what every output must say about it."""

    models: list[Predictions]
    notes: list[str]
    slides: list[StoredSlide]
    """Those of the tiles, in their order."""


def gather(
    store: Store,
    models: Sequence[LoadedBundle | HeldOut],
    split: SplitName,
    *,
    positive_from: float,
    trained_on: bool,
    alone: bool = False,
) -> Gathered:
    """The probabilities of every model over the labelled tiles of one split.

    Args:
        store: with the maps of every bundle.
        models: bundles and cross-validations; they are compared on the same tiles, with a cross-validation on those
            that it held out.
        split: whose slides; "all" takes every slide that has labels, whatever its split.
        positive_from: IDC part from which a tile is positive.
        trained_on: judge a model also on patients that it was trained on; the notes say so.
        alone: judge each model that lets neighbours take part also by its tiles alone, as a model of its own.

    Raises:
        UsageError: no slide of the split, slides that were cut on different grids, one without a map, a map by another
            version of the model, two models of one name, or patients that a bundle was trained on.
    """
    names = _names(models)
    slides = [store.slide(slide_id) for slide_id in store.slide_ids()]
    slides = [slide for slide in slides if split in ("all", slide.split)]
    labelled = [slide for slide in slides if slide.count and not np.isnan(slide.idc).all()]
    if not labelled:
        what = "no slide has a label" if slides else f"no slide of the split {split} is extracted"
        advice = "annotations make labels" if slides else "see the manifest's column split, or use --split all"
        raise UsageError(store.address, what, advice)
    notes = []
    for name, model in zip(names, models, strict=True):
        if isinstance(model, HeldOut):
            held_out = [slide for slide in labelled if slide.slide_id in model.slides]
            if not held_out:
                advice = "see the manifest's column split, or use --split all"
                raise UsageError(model.folder, f"held out no slide of the split {split}", advice)
            notes.append(
                f"{name}: each of {len(held_out):,} slides is judged by the fold that never saw its patient; "
                f"{len(labelled) - len(held_out):,} slides that it did not hold out are left out"
            )
            labelled = held_out
    _check_one_grid(labelled)
    for model in models:
        if isinstance(model, LoadedBundle):
            notes += _check_patients(model, labelled, trained_on=trained_on)
    truth = np.concatenate([slide.idc for slide in labelled])
    slide_ids = np.concatenate([np.full(slide.count, slide.slide_id) for slide in labelled])
    patients = np.concatenate([np.full(slide.count, slide.patient_id) for slide in labelled])
    found = []
    for name, model in zip(names, models, strict=True):
        if isinstance(model, HeldOut):
            results = _held_out(name, model, labelled, positive_from, alone=alone)
        else:
            results = _of_bundle(store, model, labelled, alone=alone)
        for words, title, probability, threshold in results:
            found.append(
                predictions(
                    name + words,
                    probability,
                    truth,
                    slide_ids,
                    patients,
                    threshold=threshold,
                    title=title + words,
                    positive_from=positive_from,
                )
            )
    return Gathered(found, notes, labelled)


Result = tuple[str, str, NDArray[np.floating], float | NDArray[np.float64]]
"""Words added to the name, title, probabilities (n,), threshold or thresholds (n,)."""


def _names(models: Sequence[LoadedBundle | HeldOut]) -> list[str]:
    """A name for each model, all different: cross-validations of one name are told apart by the folders they lie in.

    Raises:
        UsageError: two bundles have one name, under which the store has one map a slide; or a model is given twice.
    """
    names = [model.name if isinstance(model, HeldOut) else model.fields.name for model in models]
    told = [
        f"{model.folder.resolve().parent.name}/{name}" if isinstance(model, HeldOut) and names.count(name) > 1 else name
        for name, model in zip(names, models, strict=True)
    ]
    for name in told:
        folders = [model.folder for own, model in zip(told, models, strict=True) if own == name]
        if len(folders) > 1 and len({folder.resolve() for folder in folders}) == 1:
            raise UsageError(f"--model {folders[0]}", "is given twice", "name each model once")
        if len(folders) > 1:
            problem = f"two models are named {name}: {' and '.join(map(str, folders))}"
            raise UsageError("--model", problem, "rename one in its bundle.json and infer again")
    return told


def _of_bundle(store: Store, bundle: LoadedBundle, slides: Sequence[StoredSlide], *, alone: bool) -> list[Result]:
    fields = bundle.fields
    if fields.operating_point is None:
        problem = f"positive: says not which of its {len(fields.classes)} classes is evaluated"
        raise UsageError(fields.name, problem, "add positive and threshold to its bundle.json")
    kinds = [("probability", "", fields.operating_point)]
    if alone and fields.context:
        kinds.append(("alone", ALONE, fields.threshold))
    return [
        (words, fields.title or fields.name, _probabilities(store, bundle, slides, array), threshold)
        for array, words, threshold in kinds
    ]


def _held_out(
    name: str, model: HeldOut, slides: Sequence[StoredSlide], positive_from: float, *, alone: bool
) -> list[Result]:
    parts = [model.of_slide(slide.slide_id, slide.count, slide.idc >= positive_from) for slide in slides]
    joined = {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}
    kinds = [("probability", "threshold", "")]
    if alone and (joined["alone"] != joined["probability"]).any():
        kinds.append(("alone", "alone_threshold", ALONE))
    title = f"Cross-validation {name}"
    return [
        (words, title, joined[kind].astype(np.float32), np.nan_to_num(joined[at], nan=0.5)) for kind, at, words in kinds
    ]


def _check_one_grid(slides: Sequence[StoredSlide]) -> None:
    """Refuse to pool tiles of different sizes or um/px: none of the figures would be of either."""
    first = slides[0]
    for slide in slides[1:]:
        # As they are told: the rule for the tiles at the edge adds some and changes none.
        if str(slide.spec) != str(first.spec):
            problem = f"was cut at {slide.spec}, and {first.slide_id} at {first.spec}"
            raise UsageError(slide.slide_id, problem, "extract all of them with the same --tile-size and --mpp")


def _check_patients(bundle: LoadedBundle, slides: Sequence[StoredSlide], *, trained_on: bool) -> list[str]:
    """Notes on patients that the bundle's card names; refuses those that it was trained on unless told otherwise."""
    own = {slide.patient_id for slide in slides}
    training, name = bundle.fields.training, bundle.fields.name
    trained = sorted(own & bundle.fields.patients("train_patients"))
    tuned = sorted(own & bundle.fields.patients("val_patients"))
    notes = []
    if trained:
        problem = f"{name} was trained on {len(trained)} of these {len(own)} patients ({', '.join(trained[:3])}, ...)"
        if not trained_on:
            raise UsageError("--model", problem, "choose another --split, or add --trained-on to judge it all the same")
        notes.append(f"{problem}: its figures flatter it")
    if tuned:
        notes.append(f"{name} was chosen and calibrated on {len(tuned)} of these {len(own)} patients")
    if "train_patients" not in training:
        notes.append(f"{name} does not say which patients it was trained on")
    return notes


def _probabilities(
    store: Store, bundle: LoadedBundle, slides: Sequence[StoredSlide], array: str
) -> NDArray[np.float32]:
    """float32 (n,): the slides' probabilities by the bundle as it is now, one slide after the other."""
    name, parts = bundle.fields.name, []
    needs = bundle.needs()
    for slide in slides:
        found = store.map(name, slide.slide_id)
        state = found.state(slide, needs)
        if state.kind == "none":
            raise UsageError(slide.slide_id, f"has no map by {name}", "run wsi-idc infer with that model first")
        if state.kind != "current":
            raise UsageError(slide.slide_id, f"its map by {name} is {state}", "run wsi-idc infer with that model")
        parts.append(bundle.fields.positive_of(found.read(array)))
    return np.concatenate(parts)
