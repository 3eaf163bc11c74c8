"""Stage 1: from slides to tiles in the store."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wsi_idc.errors import ObjectsError, SlideError, UsageError
from wsi_idc.manifest import Row
from wsi_idc.plan import Plan, plan
from wsi_idc.settings import CutSettings, ExtractSettings
from wsi_idc.staging import stage_of
from wsi_idc.store import Record, Store, at_once, hold_store
from wsi_idc.work.cut import CutJob, Seen, describe, made_from
from wsi_idc.work.jobs import Listener, Summary, carry_out
from wsi_idc.work.telling import Telling


@dataclass(frozen=True)
class PlannedSlide:
    """A slide of the manifest, and what to do with it.

    Attributes:
        row: its line of the manifest.
        plan: what to do.
        made_from: what its tiles would be made from; None where its source cannot be read.
        settings: how it is cut.
        trouble: why it cannot.
        seen: what is known of its objects.
        described: whether the store has the manifest's words about it.
        tiles: how many tiles it has, where they stay as they are.
    """

    row: Row
    plan: Plan
    made_from: dict[str, Any] | None
    settings: CutSettings
    trouble: SlideError | None = None
    seen: Seen = field(default_factory=dict, hash=False)
    described: bool = False
    tiles: int | None = None


_EARLIER = {"icc": False}
"""What slides were made from before it had a name in their record."""


def plan_slide(
    row: Row, store: Store | None, settings: CutSettings, *, force: bool, keep_pixels: bool = False
) -> PlannedSlide:
    """What to do with one slide of the manifest; see `cutting` for `keep_pixels`."""
    record = Record() if store is None else store.slide_node(row.slide_id).record()
    if keep_pixels and (record.made_from or {}).get("pixels"):
        settings = settings.model_copy(update={"pixels": True})
    known = record.attributes.get("seen")
    seen: Seen = dict(known) if isinstance(known, dict) else {}
    try:
        need = made_from(row, settings, seen)
    except SlideError as error:
        return _unreadable(row, error, settings)
    described = all(record.attributes.get(name) == value for name, value in describe(row, seen).items())
    made = None if record.made_from is None else {**_EARLIER, **record.made_from}
    decided = plan(need, made, record.trouble, force=force)
    tiles = (record.complete or {}).get("tiles") if decided.action == "skip" else None
    return PlannedSlide(row, decided, need, settings, seen=seen, described=described, tiles=tiles)


def _unreadable(row: Row, error: SlideError, settings: CutSettings) -> PlannedSlide:
    return PlannedSlide(row, Plan("run", "its source cannot be read"), None, settings, error)


def plan_slides(
    rows: Sequence[Row],
    store: Store | None,
    settings: CutSettings,
    *,
    force: bool,
    strict: bool = False,
    keep_pixels: bool = False,
) -> list[PlannedSlide]:
    """What to do with every slide, in the manifest's order; sources are looked at eight at a time.

    Raises:
        UsageError: slides lie in object stores, and none of the manifest can be had; or `strict` is said, and one
            cannot. What lies on a disk was looked for when the manifest was read.
    """
    from concurrent.futures import ThreadPoolExecutor

    dead: dict[str, SlideError] = {}

    def plan_one(row: Row) -> PlannedSlide:
        if error := next((dead[url.bucket] for url in row.urls if url.bucket in dead), None):
            return _unreadable(row, SlideError(row.path, error.problem, error.advice), settings)
        planned = plan_slide(row, store, settings, force=force, keep_pixels=keep_pixels)
        cause = planned.trouble and planned.trouble.__cause__
        if isinstance(cause, ObjectsError) and cause.errno in _DEAD:
            dead.update((url.bucket, planned.trouble) for url in row.urls if planned.trouble)
        return planned

    with ThreadPoolExecutor(8) as executor:
        planned = list(executor.map(plan_one, rows))
    _check_had(planned, strict=strict)
    return planned


_DEAD = (errno.ENODEV, errno.ETIMEDOUT)
"""No such bucket, no answer: nothing else in it is asked for, as each question may take a minute."""


def _check_had(planned: Sequence[PlannedSlide], *, strict: bool) -> None:
    """Refuse a manifest of URLs as one of paths is: where nothing is there, or where `strict` is said."""
    lost = [(slide.row.urls[0], slide.trouble) for slide in planned if slide.trouble and slide.row.urls]
    if not lost or not (strict or all(slide.trouble for slide in planned)):
        return
    url, trouble = lost[0]
    others = f" (and {len(lost) - 1:,} more slides cannot be had)" if len(lost) > 1 else ""
    raise UsageError(url, f"{trouble.problem}{others}", trouble.advice)


def check_stage(rows: Sequence[Row], settings: ExtractSettings) -> None:
    """Refuse slides that cannot be read where they lie.

    Raises:
        UsageError: they lie in object stores, and there is no stage to copy them to.
    """
    url = next((url for row in rows for url in row.urls), None)
    if url is not None and not settings.stage:
        raise UsageError(url, "lies in an object store", "give --stage DIR, a local folder that slides are copied to")


ROOM_LEFT = 200_000_000
"""Bytes that a store's disk must have free before a slide is begun."""
_STORED_PART = 0.7
"""Of a tile's bytes, what it takes in the store: 0.66 to 0.76 on CMU-1-Small-Region, at 0.5 and 4 um/px."""


def check_room(planned: Sequence[PlannedSlide], store: Store, settings: CutSettings) -> None:
    """Refuse slides that cannot all find room, before the first is begun.

    What new slides will take is not known before their tissue is found. It is taken from those of the manifest that are
    done: their mean number of tiles. As slides differ, only who has not half of that free is refused; a first run, of
    which nothing is known, needs `ROOM_LEFT` alone. Slides that are done again take the place of what they had.

    Raises:
        UsageError: the store's disk has no room.
    """
    new = sum(slide.plan.action == "run" and slide.trouble is None for slide in planned)
    free = store.backing.free()
    if not new or free is None:
        return
    known = [slide.tiles for slide in planned if slide.tiles is not None]
    tile_bytes = settings.tile.size_px**2 * 3 * _STORED_PART if settings.pixels else 0
    need = int(new * tile_bytes * sum(known) / len(known)) if known else 0
    if free < max(ROOM_LEFT, need / 2):
        what = f"{new:,} new slide{'s' if new != 1 else ''}"
        problem = f"{free / 1e9:,.1f} GB free for {what}, which take about {max(ROOM_LEFT, need) / 1e9:,.1f} GB"
        raise UsageError(store.address, problem, "make room, name another --store, or run a part of the manifest")


def refresh(slides: Sequence[PlannedSlide], store: Store) -> None:
    """Bring the attributes of slides that stay as they are up to the manifest."""
    stale = [slide for slide in slides if slide.plan.action == "skip" and not slide.described]
    at_once(lambda slide: store.slide_node(slide.row.slide_id).update(describe(slide.row, slide.seen)), stale)


@dataclass(frozen=True)
class Cutting:
    """What is to be cut in a store that is held.

    Attributes:
        plans: slide id -> what was decided, in the manifest's order.
        jobs: those that are to be done.
    """

    plans: dict[str, Plan]
    jobs: list[CutJob]

    @property
    def names(self) -> list[str]:
        """The slides to be done."""
        return [job.job_id for job in self.jobs]


@contextmanager
def cutting(
    held: Store,
    rows: Sequence[Row],
    settings: ExtractSettings,
    *,
    force: bool = False,
    strict: bool = False,
    keep_pixels: bool = False,
) -> Iterator[Cutting]:
    """Plan what is to be cut, and bring the manifest's words about the rest up to date; copies are deleted at the end.

    Args:
        held: the store.
        rows, settings, force, strict: see `extract`.
        keep_pixels: whether slides whose pixels the store has keep them, where the settings want none.

    Raises:
        UsageError, StoreError: see `extract`.
    """
    check_stage(rows, settings)
    cut, stage = settings.cut(), stage_of(settings, here=not settings.elsewhere)
    planned = plan_slides(rows, held, cut, force=force, strict=strict, keep_pixels=keep_pixels)
    check_room(planned, held, cut)
    refresh(planned, held)
    jobs = [
        CutJob(slide.row, held.ticket, slide.settings, slide.made_from, stage, slide.seen)
        for slide in planned
        if slide.plan.action != "skip"
    ]
    try:
        yield Cutting({slide.row.slide_id: slide.plan for slide in planned}, jobs)
    finally:
        for job in jobs if stage is not None else []:
            job.drop()


OVERLAP = 2
"""Slides under way in each process: while one is decoded, another fills the gaps of opening and masking."""


def extract(
    rows: Sequence[Row],
    store: str | Path,
    settings: ExtractSettings,
    *,
    force: bool = False,
    strict: bool = False,
    listener: Callable[[Sequence[str]], Listener],
) -> Summary:
    """Bring the tiles of every slide up to the manifest and the settings.

    Args:
        rows: the slides.
        store: the store's address; made if there is none.
        settings: what and how.
        force: do again what is up to date.
        strict: do nothing if a slide cannot be had.
        listener: is given the slides that will be run, and gives back what is told of their progress.

    Raises:
        StoreError: the store cannot be used.
        StoreBusyError: another run holds it.
        StoreWriteError: its disk is full.
        ClusterError: the cluster where it runs is lost.
        UsageError: slides lie in object stores, and there is no stage, or none of them can be had; or the store's disk
            has no room.
    """
    from wsi_idc.work import places

    # Local processes are as many as the cores, so one slide each; with a stage another is copied meanwhile.
    place = places.place(settings, overlap=1 if settings.workers and not settings.stage else OVERLAP)
    check_stage(rows, settings)
    with hold_store(store, create=True) as held, cutting(held, rows, settings, force=force, strict=strict) as work:
        told = Telling(held, "extract", work.names, listener(work.names))
        summary = carry_out(place, work.plans, work.jobs, told)
        return replace(summary, notes=(*held.notes, *summary.notes))
