"""Extract and infer of a manifest side by side: while one slide is scored, the next ones are opened, masked and read.

Each stage is what its command is: the same plans, the same jobs, the same records. Here is only that a slide is handed
on to be scored as soon as it is cut, and that both stages share a place where they are to run at the same one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from wsi_idc import extract as cut_stage
from wsi_idc import infer as score_stage
from wsi_idc.manifest import Row
from wsi_idc.model.bundle import LoadedBundle
from wsi_idc.settings import ExtractSettings, InferSettings, PlaceSettings
from wsi_idc.store import Store, hold_store
from wsi_idc.work.jobs import Job, Listener, Outcome, Place, Summary, Supply, counted_notes, run_jobs
from wsi_idc.work.telling import Telling

Listening = Callable[[Sequence[str]], Listener]
"""Is given the slides that a stage will run, and gives back what is told of their progress."""
_AHEAD = 2
"""Slides cut and not scored yet, for each that is under way: more would lie about, or fill a stage's disk."""
_URGENT = 10
"""Of scoring before cutting, where both wait for one worker: what was begun is ended first."""


@dataclass(frozen=True)
class _Places:
    """Where both stages run.

    Attributes:
        cut, score: the places; one, where they are the same.
        slots: of each: tasks under way at once; None: as many as the place has.
    """

    cut: Place
    score: Place
    slots: tuple[int | None, int | None]

    @property
    def notes(self) -> list[str]:
        """Lines that a user should see, of what became of them."""
        return list(dict.fromkeys([*self.cut.notes, *self.score.notes]))


def extract_and_infer(
    rows: Sequence[Row],
    store: str | Path,
    bundle: LoadedBundle,
    cut: ExtractSettings,
    score: InferSettings,
    *,
    strict: bool = False,
    cut_told: Listening,
    score_told: Listening,
) -> tuple[Summary, Summary]:
    """Bring tiles and maps of every slide up to the manifest, the settings and the model.

    Slides whose pixels the store has keep them, also where the settings want none.

    Args:
        rows: the slides; others of the store are left alone.
        store: its address; made if there is none.
        bundle: the model.
        cut, score: how.
        strict: do nothing if a slide cannot be had.
        cut_told, score_told: who is told of each stage.

    Returns:
        what became of the slides in each stage.

    Raises:
        WsiIdcError: what `extract` and `infer` raise. Of one stage that cannot go on, the other ends what it has begun.
    """
    form = bundle.form(score.precision, cuda=score.gpus > 0)
    cut_stage.check_stage(rows, cut)
    with (
        hold_store(store, create=True) as held,
        cut_stage.cutting(held, rows, cut, strict=strict, keep_pixels=True) as cutting,
    ):
        score_stage.check_name(held, bundle, force=False)
        planner = score_stage.Planner(held, bundle, form, force=False)
        with closing(score_stage.Scoring(held, bundle, form, score, planner.planned)) as scoring:
            planner.decide_all([name for name, plan in cutting.plans.items() if plan.action == "skip"])
            jobs = scoring.jobs()
            pair = _Pair(held, cutting, planner, scoring, jobs, lambda: score_stage.load_here(bundle, form, score))
            return pair.run(_places(cut, score), cut_told, score_told)


class _Pair:
    """Both stages under way."""

    def __init__(
        self,
        held: Store,
        cutting: cut_stage.Cutting,
        planner: score_stage.Planner,
        scoring: score_stage.Scoring,
        jobs: Sequence[Job],
        load: Callable[[], None],
    ) -> None:
        self._held, self._cutting, self._planner, self._scoring, self._jobs = held, cutting, planner, scoring, jobs
        self._load = load
        self._to_score = Supply(jobs, closed=not cutting.jobs)
        self._to_cut = Supply(cutting.jobs, may_begin=lambda: self._to_score.waiting < self._limit)
        self._to_score.when_taken(self._to_cut.wake)
        self._limit = 1

    def run(
        self, places: AbstractContextManager[_Places], cut_told: Listening, score_told: Listening
    ) -> tuple[Summary, Summary]:
        """Run both to their end; see `extract_and_infer`."""
        start, names, planned = time.monotonic(), self._cutting.names, self._planner.planned
        refused = self._scoring.refused
        waiting = [*refused, *(job.job_id for job in self._jobs)]
        cut = cut_told(names)
        score = Telling(self._held, "run", [*waiting, *names], score_told([*waiting, *names]))
        for slide, outcome in refused.items():
            score.ended(slide, outcome)
        cut_outcomes, score_outcomes, notes = dict[str, Outcome](), dict[str, Outcome](), list[str]()
        cut_seconds = 0.0
        if names or self._jobs:
            with places as where, ThreadPoolExecutor(1, thread_name_prefix="cut") as executor:
                self._admit(where)
                self._limit = _AHEAD * (where.slots[1] or where.score.capacity.slots)

                def cut_all() -> float:
                    try:
                        told = _CutTold(cut, score, self)
                        cut_outcomes.update(run_jobs(where.cut, self._to_cut, told, slots=where.slots[0]))
                    except BaseException:
                        self._to_score.shut()
                        raise
                    self._to_score.close()
                    return time.monotonic() - start

                cut_end = executor.submit(cut_all)
                try:
                    self._load()  # while the first slides are cut
                    score_outcomes = run_jobs(where.score, self._to_score, score, slots=where.slots[1], urgency=_URGENT)
                finally:
                    self._to_cut.shut()
                cut_seconds = cut_end.result()
                notes = where.notes
        return (
            Summary(
                self._cutting.plans,
                cut_outcomes,
                cut_seconds,
                (*self._held.notes, *notes, *counted_notes(cut_outcomes.values())),
            ),
            Summary(
                planned.plans,
                {**self._scoring.refused, **score_outcomes},
                time.monotonic() - start,
                (*score_stage.left_out(planned), *counted_notes(score_outcomes.values())),
            ),
        )

    def cut(self, slide: str, outcome: Outcome, score: Telling) -> None:
        """A slide has been cut, or failed: hand it on, or let it be known that it does not come."""
        if outcome.status == "failed":
            self._planner.planned.left_out.append(slide)
        elif self._planner.decide_all([slide]):
            self._to_score.put(self._scoring.job(slide))
            return
        elif (why := self._planner.planned.refused.get(slide)) is not None:
            score.ended(slide, Outcome("failed", reason=why))
            return
        score.left_out(slide)
        score.count(outcome)

    def _admit(self, where: _Places) -> None:
        """Find out whether both can be done; of slides that have yet to be cut, too, workers must see the model.

        Raises:
            UsageError: they cannot.
        """
        to_cut, names = self._cutting.jobs, self._cutting.names
        to_score = [*self._jobs[:1], *(self._scoring.job(name) for name in names[:1])]
        if where.cut is where.score:
            where.cut.admit([*to_cut[:1], *to_score])
        else:
            where.cut.admit(to_cut)
            where.score.admit(to_score)


class _CutTold:
    """Passes on what is told of cutting, and hands slides on."""

    def __init__(self, listener: Listener, score: Telling, pair: _Pair) -> None:
        self._listener, self._score, self._pair = listener, score, pair
        self.prepared, self.advanced, self.left_out = listener.prepared, listener.advanced, listener.left_out

    def ended(self, job_id: str, outcome: Outcome) -> None:
        """See `Listener.ended`."""
        self._listener.ended(job_id, outcome)
        self._pair.cut(job_id, outcome, self._score)


@contextmanager
def _places(cut: ExtractSettings, score: InferSettings) -> Iterator[_Places]:
    """One place for both where they are to run at the same one, else one for each.

    Raises:
        UsageError: there are fewer GPUs than asked for, or no scheduler answers.
    """
    from wsi_idc.work import places

    if all(getattr(cut, name) == getattr(score, name) for name in PlaceSettings.model_fields):
        # Local processes are as many as the cores: one slide each is cut beside those that are scored.
        each = (1 if cut.workers else cut_stage.OVERLAP, score_stage.OVERLAP)
        with places.place(cut, overlap=sum(each)) as place:
            slots = [None if cut.elsewhere else part * place.capacity.workers for part in each]
            yield _Places(place, place, (slots[0], slots[1]))
        return
    with (
        places.place(cut, overlap=cut_stage.OVERLAP) as one,
        places.place(score, overlap=score_stage.OVERLAP) as other,
    ):
        yield _Places(one, other, (None, None))
