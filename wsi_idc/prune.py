"""Taking out of the store what the manifest no longer has."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wsi_idc.errors import UsageError
from wsi_idc.manifest import Row
from wsi_idc.store import Store, hold_store, open_store


@dataclass(frozen=True)
class Pruned:
    """What is removed, or would be.

    Attributes:
        slides: ids of slides of the store that are not in the manifest, and of maps without a slide.
        maps: model -> the ids of those of them that have a map by it.
        kept: number of slides that stay.
    """

    slides: Sequence[str]
    maps: dict[str, list[str]] = field(default_factory=dict)
    kept: int = 0

    def models_of(self, slide_id: str) -> list[str]:
        """The models with a map of a slide that is removed."""
        return [model for model, names in self.maps.items() if slide_id in names]


def plan_prune(store: Store, rows: Sequence[Row], *, force: bool = False) -> Pruned:
    """What of the store is not in the manifest.

    Raises:
        UsageError: nothing of the store is in the manifest, which then is likely another's; unless `force` is said.
    """
    listed = {name for row in rows for name in _ids(row)}
    stored = store.all_slide_ids()
    kept = [name for name in stored if name in listed]
    if stored and not kept and not force:
        problem = f"none of the {len(stored):,} slides in {store.address} is in the manifest"
        raise UsageError("prune", problem, "is it the right one? --force removes them all")
    maps = {model: _unlisted(store.mapped_slide_ids(model), listed) for model in store.models()}
    gone = sorted({*_unlisted(stored, listed), *(name for names in maps.values() for name in names)})
    return Pruned(gone, {model: names for model, names in maps.items() if names}, len(kept))


def _unlisted(names: Sequence[str], listed: set[str]) -> list[str]:
    return [name for name in names if name not in listed]


def _ids(row: Row) -> set[str]:
    """The ids that a row can have given its slide: of what is away, nothing says whether it was a file or a folder."""
    path = row.path
    return {row.slide_id, path.stem, path.name} if row.missing and isinstance(path, Path) else {row.slide_id}


def prune(address: str | Path, rows: Sequence[Row], *, force: bool = False) -> Pruned:
    """Remove slides and their maps that are not in the manifest: maps first, each record before its arrays.

    Args:
        address: the store's.
        rows: the manifest's.
        force: also where nothing would be left.

    Raises:
        UsageError: see `plan_prune`.
        StoreError: there is no such store.
        StoreBusyError: another run holds it.
    """
    # Asked before the lease is: what is refused then has touched nothing.
    plan_prune(open_store(address), rows, force=force)
    with hold_store(address) as store:
        found = plan_prune(store, rows, force=force)
        stored = set(store.all_slide_ids())
        for name in found.slides:
            for model in found.models_of(name):
                store.map_node(model, name).remove()
            if name in stored:
                store.slide_node(name).remove()
        return found
