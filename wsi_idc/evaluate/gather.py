"""From the maps of a store to what is evaluated: which slides and labels, and whether a model may be judged on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import UsageError
from wsi_idc.evaluate.predictions import Predictions, predictions
from wsi_idc.model.bundle import LoadedBundle, file_digest
from wsi_idc.store import Store, StoredSlide

SplitName = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Gathered:
    """What is evaluated, and what every output must say about it."""

    models: list[Predictions]
    notes: list[str]


def gather(
    store: Store,
    bundles: Sequence[LoadedBundle],
    split: SplitName,
    *,
    positive_from: float,
    trained_on: bool,
    alone: bool = False,
) -> Gathered:
    """The probabilities of every bundle over the labelled tiles of one split.

    Args:
        store: with the maps of every bundle.
        bundles: the models; they are compared on the same tiles.
        split: whose slides; "all" takes every slide that has labels, whatever its split.
        positive_from: IDC part from which a tile is positive.
        trained_on: judge a model also on patients that it was trained on; the notes say so.
        alone: judge each model that lets neighbours take part also by its tiles alone, as a model of its own.

    Raises:
        UsageError: no slide of the split, one without a map, a map by another version of the model, two bundles of one
            name, or patients that a bundle was trained on.
    """
    names = [bundle.fields.name for bundle in bundles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            "--model", f"two bundles are named {twice[0]}", "rename one in its bundle.json and infer again"
        )
    slides = [store.slide(name) for name in store.slide_ids()]
    slides = [slide for slide in slides if split in ("all", slide.split)]
    labelled = [slide for slide in slides if slide.count and not np.isnan(slide.idc).all()]
    if not labelled:
        what = "no slide has a label" if slides else f"no slide of the split {split} is extracted"
        advice = "annotations make labels" if slides else "see the manifest's column split, or use --split all"
        raise UsageError(store.path, what, advice)
    notes = []
    for bundle in bundles:
        notes += _check_patients(bundle, labelled, trained_on=trained_on)
    truth = np.concatenate([slide.idc for slide in labelled])
    slide_ids = np.concatenate([np.full(slide.count, slide.slide_id) for slide in labelled])
    patients = np.concatenate([np.full(slide.count, slide.patient_id) for slide in labelled])
    models = []
    for bundle in bundles:
        fields = bundle.fields
        kinds = [("probability", "", fields.operating_point)]
        if alone and fields.context:
            kinds.append(("alone", ", tiles alone", fields.threshold))
        for array, words, threshold in kinds:
            models.append(
                predictions(
                    fields.name + words,
                    _probabilities(store, bundle, labelled, array),
                    truth,
                    slide_ids,
                    patients,
                    threshold=threshold,
                    title=(fields.title or fields.name) + words,
                    positive_from=positive_from,
                )
            )
    return Gathered(models, notes)


def _check_patients(bundle: LoadedBundle, slides: Sequence[StoredSlide], *, trained_on: bool) -> list[str]:
    """Notes on patients that the bundle's card names; refuses those that it was trained on unless told otherwise."""
    own = {slide.patient_id for slide in slides}
    training, name = bundle.fields.training, bundle.fields.name
    trained = sorted(own & set(training.get("train_patients", [])))
    tuned = sorted(own & set(training.get("val_patients", [])))
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
    name = bundle.fields.name
    context = bundle.fields.context.model_dump() if bundle.fields.context else None
    own = {file_digest(path) for path in bundle.folder.glob("model*") if path.is_file()}
    parts = []
    for slide in slides:
        node = store.map_node(name, slide.slide_id)
        record = node.record()
        if not record.usable or record.made_from is None:
            raise UsageError(slide.slide_id, f"has no map by {name}", "run wsi-idc infer with that model first")
        made_from = record.made_from
        same = made_from["model"] in own and made_from.get("context") == context
        if made_from["tiles"] != slide.identity or not same:
            problem = f"its map by {name} is of older tiles or another version"
            raise UsageError(slide.slide_id, problem, "run wsi-idc infer")
        parts.append(np.asarray(node.array(array)[...], np.float32))
    return np.concatenate(parts)
