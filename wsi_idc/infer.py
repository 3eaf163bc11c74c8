"""Stage 2: from tiles to one probability map a slide."""

from collections.abc import Callable, Collection, Mapping, Sequence
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

    plans: Mapping[str, Plan]
    refused: Mapping[str, str]
    left_out: Sequence[str] = ()
    unlisted: Sequence[str] = ()
    read: Mapping[str, Sequence[Wanted]] = field(default_factory=dict)


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
    _check_name(store, bundle, force=force)
    need = bundle.made_from(form)

    def plan_one(name: str) -> tuple[Plan | None, ModelError | None, list[Wanted]]:
        """What to do (None: nothing can be), why the model cannot, and what will have to be read of the slide."""
        try:
            slide = store.slide(name) if only else store.look(name)[1]
            if slide is None:
                return None, None, []
            bundle.check_fits(slide.spec)
        except ModelError as error:
            return Plan("run", "the model does not fit its tiles"), error, []
        except StoreDamageError as error:
            # Its job finds the same, names it, and hides the slide until it is cut again: the others go on.
            return Plan("run", error.problem), None, []
        plan = store.map(bundle.fields.name, name).plan(slide, need, force=force)
        return plan, None, [] if plan.action == "skip" or slide.has_pixels else wanted(slide)

    names, unlisted = sorted(set(only)), list[str]()
    if not only:
        names = store.all_slide_ids()
        if listed is not None:
            names, unlisted = sorted(set(listed)), sorted(set(names) - set(listed))
    found = dict(zip(names, at_once(plan_one, names), strict=True))
    plans = {name: plan for name, (plan, _, _) in found.items() if plan is not None}
    refused = {name: error for name, (_, error, _) in found.items() if error is not None}
    if refused and len(refused) == len(plans):
        raise next(iter(refused.values()))
    return PlannedMaps(
        plans,
        {name: str(error) for name, error in refused.items()},
        [name for name, (plan, _, _) in found.items() if plan is None],
        unlisted,
        {name: read for name, (_, _, read) in found.items() if read},
    )


def _check_name(store: Store, bundle: LoadedBundle, *, force: bool) -> None:
    """Refuse to replace the maps of another model that has the same name."""
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

    stage = stage_of(settings, here=not settings.elsewhere)
    # With a stage, a second slide is copied while the first one is scored.
    place = places.place(settings, overlap=1 if stage is None else 2)
    form = bundle.form(settings.precision, cuda=settings.gpus > 0)
    if not settings.gpus and not settings.elsewhere:
        # With the threads that a task will have: in this process it is then loaded already when the first one runs.
        loaded(bundle.folder, form, places.threads_of(settings.workers, settings.threads))
    with hold_store(store) as held:
        planned = plan_maps(held, bundle, form, only=only, listed=listed, force=force)
        name, need = bundle.fields.name, bundle.made_from(form)
        todo = [slide for slide, plan in planned.plans.items() if plan.action != "skip"]
        far = next((read[0][0] for read in planned.read.values() if isinstance(read[0][0], Url)), None)
        if stage is None and far is not None:
            advice = "give --stage DIR, a local folder that slides are copied to"
            raise UsageError(far, "lies in an object store, and the store has no pixels of it", advice)
        if todo:
            held.put_model(name, {"model": name, "files": sorted(bundle.digests())})
        folder = None if bundle.folder == SHIPPED else bundle.folder.absolute()
        jobs = [
            ScoreJob(slide, held.ticket, folder, bundle.fields, form, need, settings.batch_size, stage)
            for slide in todo
            if slide not in planned.refused
        ]
        told = Telling(held, "infer", todo, listener(todo))
        refused = {}
        for slide, reason in planned.refused.items():
            refused[slide] = Outcome("failed", reason=reason)
            told.ended(slide, refused[slide])
        try:
            summary = carry_out(place, planned.plans, jobs, told)
        finally:
            for read in planned.read.values():
                drop(stage, read)
        notes = (*_left_out(planned), *summary.notes)
        return replace(summary, outcomes={**refused, **summary.outcomes}, notes=notes)


def _left_out(planned: PlannedMaps) -> list[str]:
    """Lines on slides of the store that get no map."""
    notes = []
    for names, what, see in (
        (planned.left_out, "without complete tiles", "wsi-idc status"),
        (planned.unlisted, "no longer in the manifest", "wsi-idc prune"),
    ):
        if names:
            notes.append(f"{len(names):,} slide{'s' if len(names) != 1 else ''} {what} left out: see {see}")
    return notes
