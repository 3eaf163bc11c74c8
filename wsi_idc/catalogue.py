"""Which models there are: the one that ships, those of a folder, and those with maps in a store."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsi_idc.errors import ModelError, StoreDamageError, UsageError, system_reason
from wsi_idc.model.bundle import SHIPPED, LoadedBundle, read_bundle
from wsi_idc.store import Store, at_once


@dataclass(frozen=True)
class ListedModel:
    """A bundle at hand.

    Attributes:
        name: as maps are named; of a bundle that cannot be read its folder's.
        where: the folder, or that it ships.
        title: for people.
        tile: size and um/px.
        classes: in the order of the model's output.
        threshold: of the maps that `infer` writes; None where no class is positive.
        context: whether a tile's neighbours take part.
        forms: precision and engine of each.
        fault: why it cannot be used; "" where it can.
    """

    name: str
    where: str
    title: str = ""
    tile: str = ""
    classes: tuple[str, ...] = ()
    threshold: float | None = None
    context: bool = False
    forms: tuple[str, ...] = ()
    fault: str = ""

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class StoredModel:
    """A model with maps in a store.

    Attributes:
        name: the model's.
        bundle: the bundle at hand that the maps were held against; "" where none of that name is: then only the tiles
            count.
        current: slides with a map that is current.
        stale: slides with one that is not.
        failed: slides that it failed on.
        slides: slides whose tiles are complete.
    """

    name: str
    bundle: str
    current: int
    stale: int
    failed: int
    slides: int

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def bundles_at_hand(folder: Path | None) -> list[tuple[ListedModel, LoadedBundle | None]]:
    """The bundle that ships, and those of a folder: the folders in it that have a `bundle.json`.

    Raises:
        UsageError: the folder cannot be listed.
    """
    found = [_listed(SHIPPED, "ships with wsi-idc")]
    if folder is not None:
        try:
            places = [place for place in sorted(folder.iterdir()) if (place / "bundle.json").exists()]
        except OSError as error:
            raise UsageError(folder, f"cannot be listed: {system_reason(error)}", "name a folder of bundles") from error
        found += [_listed(place, str(place)) for place in places if not place.name.startswith(".")]
    return found


def form_names(bundle: LoadedBundle) -> tuple[str, ...]:
    """Every form of a bundle on disk, in words."""
    forms = bundle.forms()
    weights = bundle.weights_form()
    if weights is not None and weights not in forms:
        forms.append(weights)
    return tuple(dict.fromkeys(f"{form.precision} by {form.engine} on {form.device}" for form in forms))


def _listed(folder: Path, where: str) -> tuple[ListedModel, LoadedBundle | None]:
    try:
        bundle = read_bundle(folder)
        forms = form_names(bundle)
    except ModelError as error:
        return ListedModel(folder.name, where, fault=error.reason), None
    fields = bundle.fields
    fault = "" if forms else "no graph and no weights: the bundle is not whole"
    listed = ListedModel(
        fields.name,
        where,
        fields.title,
        f"{fields.tile.size_px} px at {fields.tile.mpp:g} um/px",
        fields.classes,
        fields.operating_point,
        fields.context is not None,
        forms,
        fault,
    )
    return listed, bundle


def stored_models(store: Store, at_hand: Sequence[tuple[ListedModel, LoadedBundle | None]]) -> list[StoredModel]:
    """Every model with maps in a store, and how its maps stand.

    Args:
        store: it is only read.
        at_hand: bundles; a map is held against those of its model's name.
    """
    names = store.all_slide_ids()

    def look(name: str) -> Any:
        try:
            return store.look(name)[1]
        except StoreDamageError:
            return None

    slides = dict(zip(names, at_once(look, names), strict=True))
    found = []
    for model in store.models():
        own = [(listed, bundle) for listed, bundle in at_hand if bundle is not None and listed.name == model]
        needs = [need for _, bundle in own if bundle is not None for need in bundle.needs()]
        states = at_once(lambda name: store.map(model, name).state(slides[name], needs).kind, names)  # noqa: B023
        current, stale, failed = (states.count(kind) for kind in ("current", "stale", "failed"))
        where = ", ".join(listed.where for listed, _ in own)
        whole = sum(slide is not None for slide in slides.values())
        found.append(StoredModel(model, where, current, stale, failed, whole))
    return found
