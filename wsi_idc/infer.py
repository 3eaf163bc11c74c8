"""Stage 2: from tiles to one probability map a slide."""

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from wsi_idc.errors import ModelError, StoreDamageError, UsageError
from wsi_idc.model.bundle import SHIPPED, Form, LoadedBundle
from wsi_idc.plan import Plan
from wsi_idc.settings import InferSettings
from wsi_idc.sources import Url
from wsi_idc.staging import Wanted, drop, stage_of
from wsi_idc.store import Store, at_once, hold_store
from wsi_idc.work.jobs import Listener, Outcome, Summary, carry_out
from wsi_idc.work.score import ScoreJob, loaded, wanted
from wsi_idc.work.telling import Telling


@dataclass(frozen=True)
class PlannedMaps:
    """What to do with every slide.

    Attributes:
        plans: slide id -> what was decided.
        refused: slide id -> why the model cannot score it.
        left_out: slides whose tiles are not complete.
        unlisted: slides of the store that are not in the manifest.
        read: slide id -> what will have to be read of it, since the store does not hold its pixels.
    """

    plans: dict[str, Plan] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    read: dict[str, Sequence[Wanted]] = field(default_factory=dict)


class Planner:
    """Decides what to do with the maps of slides, also of such as are cut later.

    Attributes:
        planned: what was decided so far.
        refusal: why the model cannot score the first of those that it cannot; None where there are none.

    Args:
        store: where they are.
        bundle: the model.
        form: in which it runs.
        force: do again what is up to date.
    """

    def __init__(self, store: Store, bundle: LoadedBundle, form: Form, *, force: bool) -> None:
        self.planned = PlannedMaps()
        self.refusal: ModelError | None = None
        self.store, self.bundle = store, bundle
        self.need, self._force = bundle.made_from(form), force

    def decide(self, name: str, *, only: bool = False) -> "_Decision":
        """What to do with a slide.

        Raises:
            StoreError: it is not extracted, where it is one of `only`.
        """
        try:
            slide = self.store.slide(name) if only else self.store.look(name)[1]
            if slide is None:
                return _Decision()
            self.bundle.check_fits(slide.spec)
        except ModelError as error:
            return _Decision(Plan("run", "the model does not fit its tiles"), error)
        except StoreDamageError as error:
            # Its job finds the same, names it, and hides the slide until it is cut again: the others go on.
            return _Decision(Plan("run", error.problem))
        plan = self.store.map(self.bundle.fields.name, name).plan(slide, self.need, force=self._force)
        return _Decision(plan, read=() if plan.action == "skip" or slide.has_pixels else wanted(slide))

    def decide_all(self, names: Sequence[str], *, only: bool = False) -> list[str]:
        """Decide on slides, and keep what was decided; gives those that are to be scored.

        Raises:
            StoreError: see `decide`.
        """
        todo = []
        for name, decision in zip(names, at_once(lambda name: self.decide(name, only=only), names), strict=True):
            if decision.plan is None:
                self.planned.left_out.append(name)
                continue
            self.planned.plans[name] = decision.plan
            if decision.refusal is not None:
                self.planned.refused[name] = str(decision.refusal)
                self.refusal = self.refusal or decision.refusal
            elif decision.plan.action != "skip":
                todo.append(name)
            if decision.read:
                self.planned.read[name] = decision.read
        return todo


@dataclass(frozen=True)
class _Decision:
    """What to do with a map (None: nothing can be), why the model cannot, and what will be read of the slide."""

    plan: Plan | None = None
    refusal: ModelError | None = None
    read: Sequence[Wanted] = ()


def plan_maps(
    store: Store,
    bundle: LoadedBundle,
    form: Form,
    *,
    only: Sequence[str] = (),
    listed: Collection[str] | None = None,
    force: bool = False,
) -> PlannedMaps:
    """What to do with every slide whose tiles are complete, or with those of `only`, or with those of a manifest.

    Args:
        store: where they are.
        bundle: the model.
        form: in which it runs.
        only: slide ids to which it is limited; all where empty.
        listed: the slide ids of the manifest, where one is given: other slides of the store are left out.
        force: do again what is up to date.

    Raises:
        ModelError: the model fits no slide, or the store has maps by another model of that name.
        StoreError: one of `only` is not extracted.
        UsageError: one of `only` is not in the manifest.
    """
    if listed is not None and (strange := sorted(set(only) - set(listed))):
        raise UsageError(f"--only {strange[0]}", "no such slide_id in the manifest", "correct it, or leave one out")
    check_name(store, bundle, force=force)
    planner = Planner(store, bundle, form, force=force)
    planned, names = planner.planned, sorted(set(only))
    if not only:
        names = store.all_slide_ids()
        if listed is not None:
            names, unlisted = sorted(set(listed)), sorted(set(names) - set(listed))
            planned.unlisted.extend(unlisted)
    planner.decide_all(names, only=bool(only))
    if planner.refusal is not None and len(planned.refused) == len(planned.plans):
        raise planner.refusal
    return planned


def check_name(store: Store, bundle: LoadedBundle, *, force: bool) -> None:
    """Refuse to replace the maps of another model that has the same name.

    Raises:
        ModelError: the store has such.
    """
    name = bundle.fields.name
    known = store.model_attributes(name).get("files")
    if isinstance(known, list) and known and not force and not bundle.digests() & set(map(str, known)):
        problem = f"the store has maps by another model of the name {name!r}"
        raise ModelError(
            bundle.folder, problem, "give this one another name in its bundle.json, or replace with --force"
        )


def infer(
    store: str | Path,
    bundle: LoadedBundle,
    settings: InferSettings,
    *,
    only: Sequence[str] = (),
    listed: Collection[str] | None = None,
    force: bool = False,
    listener: Callable[[Sequence[str]], Listener],
) -> Summary:
    """Bring the map of every slide in the store up to its tiles and the model.

    Args:
        store: the store's address.
        bundle: the model.
        settings: how.
        only: slide ids to which it is limited; all where empty.
        listed: the slide ids of the manifest, where one is given: other slides of the store are left out.
        force: do again what is up to date, and replace maps by another model of that name.
        listener: is given the slides that will be run, and gives back what is told of their progress.

    Raises:
        ModelError: the model cannot run, or does not fit the store.
        StoreError: the store cannot be used, or one of `only` is not in it.
        StoreBusyError: another run holds it.
        StoreWriteError: its disk is full.
        ClusterError: the cluster where it runs is lost.
        UsageError: one of `only` is not in the manifest; or a slide lies in an object store, its pixels are not in the
            store, and there is no stage.
    """
    from wsi_idc.work import places

    place = places.place(settings, overlap=OVERLAP)
    form = bundle.form(settings.precision, cuda=settings.gpus > 0)
    with hold_store(store) as held:
        planned = plan_maps(held, bundle, form, only=only, listed=listed, force=force)
        with closing(Scoring(held, bundle, form, settings, planned)) as work:
            jobs = work.jobs()
            todo = [*planned.refused, *(job.job_id for job in jobs)]
            told = Telling(held, "infer", todo, listener(todo))
            for slide, outcome in work.refused.items():
                told.ended(slide, outcome)
            if jobs:
                load_here(bundle, form, settings)
            summary = carry_out(place, planned.plans, jobs, told)
        notes = (*left_out(planned), *summary.notes)
        return replace(summary, outcomes={**work.refused, **summary.outcomes}, notes=notes)


OVERLAP = 2
"""Slides under way in each process: while one is scored, the next is read, and the last one's map written."""


def load_here(bundle: LoadedBundle, form: Form, settings: InferSettings) -> None:
    """Load the model with the threads that a task will have, unless no task can run in this process.

    In this process it is then there already when the first one runs; one that cannot be loaded ends the run before
    anything is done.

    Raises:
        ModelError: it cannot be loaded.
    """
    from wsi_idc.work import places

    if not settings.gpus and not settings.elsewhere:
        loaded(bundle.folder, form, places.threads_of(settings.workers, settings.threads))


class Scoring:
    """Makes the jobs of a plan in a store that is held; `close` deletes what they copied.

    Raises:
        UsageError: the stage is no folder that can be written to.
    """

    def __init__(
        self, held: Store, bundle: LoadedBundle, form: Form, settings: InferSettings, planned: PlannedMaps
    ) -> None:
        self._held, self._bundle, self._form, self._settings = held, bundle, form, settings
        self.planned, self.stage = planned, stage_of(settings, here=not settings.elsewhere)
        self._noted = False

    @property
    def refused(self) -> dict[str, Outcome]:
        """The slides that the model cannot score."""
        return {slide: Outcome("failed", reason=reason) for slide, reason in self.planned.refused.items()}

    def jobs(self) -> list[ScoreJob]:
        """One for each slide that is to be scored by the plan.

        Raises:
            UsageError: a slide lies in an object store, its pixels are not in the store, and there is no stage.
        """
        plans, refused = self.planned.plans, self.planned.refused
        far = next((read[0][0] for read in self.planned.read.values() if isinstance(read[0][0], Url)), None)
        if self.stage is None and far is not None:
            advice = "give --stage DIR, a local folder that slides are copied to"
            raise UsageError(far, "lies in an object store, and the store has no pixels of it", advice)
        return [self.job(slide) for slide, plan in plans.items() if plan.action != "skip" and slide not in refused]

    def job(self, slide: str) -> ScoreJob:
        """The job of a slide."""
        bundle, form = self._bundle, self._form
        if not self._noted:
            # Which model's maps these are is told before the first of them.
            self._noted = True
            self._held.put_model(bundle.fields.name, {"model": bundle.fields.name, "files": sorted(bundle.digests())})
        folder = None if bundle.folder == SHIPPED else bundle.folder.absolute()
        need, batch = bundle.made_from(form), self._settings.batch_size
        return ScoreJob(slide, self._held.ticket, folder, bundle.fields, form, need, batch, self.stage)

    def close(self) -> None:
        """Delete what was copied."""
        for read in self.planned.read.values():
            drop(self.stage, read)


def left_out(planned: PlannedMaps) -> list[str]:
    """Lines on slides of the store that get no map."""
    notes = []
    for names, what, see in (
        (planned.left_out, "without complete tiles", "wsi-idc status"),
        (planned.unlisted, "no longer in the manifest", "wsi-idc prune"),
    ):
        if names:
            notes.append(f"{len(names):,} slide{'s' if len(names) != 1 else ''} {what} left out: see {see}")
    return notes
