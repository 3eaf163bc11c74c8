"""Stage 1: from slides to tiles in the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsi_idc.errors import SlideError
from wsi_idc.manifest import Row
from wsi_idc.plan import Plan, plan
from wsi_idc.settings import CutSettings, ExtractSettings
from wsi_idc.store import Store, hold_store
from wsi_idc.work.cut import CutJob, describe, made_from
from wsi_idc.work.jobs import Listener, Summary, carry_out


@dataclass(frozen=True)
class PlannedSlide:
    """A slide of the manifest, what to do with it, and what its tiles would be made from (None: unreadable)."""

    row: Row
    plan: Plan
    made_from: dict[str, Any] | None


def plan_slide(row: Row, store: Store | None, settings: CutSettings, *, force: bool) -> PlannedSlide:
    """What to do with one slide of the manifest."""
    try:
        need = made_from(row, settings)
    except SlideError:
        return PlannedSlide(row, Plan("run", "its source cannot be read"), None)
    if store is None:
        return PlannedSlide(row, plan(need, None), need)
    record = store.slide_node(row.slide_id).record()
    return PlannedSlide(row, plan(need, record.made_from, record.trouble, force=force), need)


def plan_slides(rows: Sequence[Row], store: Store | None, settings: CutSettings, *, force: bool) -> list[PlannedSlide]:
    """What to do with every slide, in the manifest's order; sources are looked at eight at a time."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as executor:
        return list(executor.map(lambda row: plan_slide(row, store, settings, force=force), rows))


def refresh(rows: Sequence[Row], store: Store) -> None:
    """Bring the attributes of slides that stay as they are up to the manifest."""
    for row in rows:
        node = store.slide_node(row.slide_id)
        attributes = node.record().attributes
        if any(attributes.get(name) != value for name, value in describe(row).items()):
            node.update(describe(row))


def extract(
    rows: Sequence[Row],
    store: str | Path,
    settings: ExtractSettings,
    *,
    force: bool = False,
    listener: Callable[[Sequence[str]], Listener],
) -> Summary:
    """Bring the tiles of every slide up to the manifest and the settings.

    Args:
        rows: the slides.
        store: the store's address; made if there is none.
        settings: what and how.
        force: do again what is up to date.
        listener: is given the slides that will be run, and gives back what is told of their progress.

    Raises:
        StoreError: the store cannot be used.
        StoreBusyError: another run holds it.
        StoreWriteError: its disk is full.
        ClusterError: the cluster where it runs is lost.
    """
    from wsi_idc.work import places

    # A slide's own decoding is spread over threads; a second slide under way fills the gaps of opening and masking.
    place = places.place(settings, overlap=2)
    cut = settings.cut()
    with hold_store(store, create=True) as held:
        planned = plan_slides(rows, held, cut, force=force)
        refresh([slide.row for slide in planned if slide.plan.action == "skip"], held)
        todo = [slide for slide in planned if slide.plan.action != "skip"]
        jobs = [CutJob(slide.row, held.ticket, cut, slide.made_from) for slide in todo]
        plans = {slide.row.slide_id: slide.plan for slide in planned}
        summary = carry_out(place, plans, jobs, listener([job.job_id for job in jobs]))
        return replace(summary, notes=(*held.notes, *summary.notes))
