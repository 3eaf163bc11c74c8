"""Jobs over any Dask client: one outcome a slide, whatever becomes of the others.

A job is a slide: `prepare` says which blocks of tiles it has, `run` does one block, `finish` commits them all. Jobs
carry ids, addresses and what changes a result, never pixels, and nothing of where they run: that comes with each call,
as `Work`. A place gives the client (`places.py`); nothing here knows which.
"""

import contextlib
import errno
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from wsi_idc.errors import StoreWriteError, WsiIdcError, system_reason
from wsi_idc.plan import Plan

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""What the system says of a disk that takes no more, whichever slide was first to meet it."""


@dataclass(frozen=True)
class Capacity:
    """What a place offers. It may change how fast work goes, never a byte of a result.

    Attributes:
        workers: processes that work.
        slots: tasks under way at once, of all workers together.
        threads: CPU threads that one task may use.
        gpu: whether each task has a GPU.
    """

    workers: int = 1
    slots: int = 1
    threads: int = 1
    gpu: bool = False


@dataclass(frozen=True)
class Place:
    """Where work runs: a Dask client, and what it offers."""

    client: Any
    capacity: Capacity


@dataclass(frozen=True)
class Work:
    """What a job's call is given by the worker that runs it.

    Attributes:
        capacity: of the place.
        report: tells the client that so many more tiles are done.
    """

    capacity: Capacity = field(default_factory=Capacity)
    report: Callable[[int], None] = lambda tiles: None


@dataclass(frozen=True)
class Block:
    """A range of a slide's tiles, in their stored order: `start` to `stop`, `stop` left out."""

    start: int
    stop: int


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found: the blocks to run, and what `finish` will need."""

    blocks: Sequence[Block]
    tiles: int
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        status: "done" or "failed".
        tiles: tiles written or scored.
        reason: why it failed; empty when done.
        warnings: lines that a user should see.
        detail: the traceback where it failed, for those who look for a defect.
    """

    status: Literal["done", "failed"]
    tiles: int = 0
    reason: str = ""
    warnings: tuple[str, ...] = ()
    detail: str = field(default="", compare=False)


@dataclass(frozen=True)
class Summary:
    """What a command did with each slide.

    Attributes:
        plans: slide id -> what was decided, in order.
        outcomes: slide id -> what became of those that were run.
        seconds: of wall time.
        notes: lines that a user should see, of no slide.
    """

    plans: Mapping[str, Plan]
    outcomes: Mapping[str, Outcome]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """Slides that were run to their end."""
        return sum(outcome.status == "done" for outcome in self.outcomes.values())

    @property
    def skipped(self) -> int:
        """Slides that were up to date."""
        return sum(plan.action == "skip" for plan in self.plans.values())

    @property
    def failures(self) -> dict[str, str]:
        """Slide id -> reason of each that failed."""
        return {name: outcome.reason for name, outcome in self.outcomes.items() if outcome.status == "failed"}

    @property
    def tiles(self) -> int:
        """Tiles written or scored."""
        return sum(outcome.tiles for outcome in self.outcomes.values())


class Job(Protocol):
    """One slide's work, in three calls that may run in different processes. Picklable."""

    @property
    def job_id(self) -> str:
        """The slide's id."""

    @property
    def names(self) -> Sequence[str]:
        """What the slide is called: a message about it need not say these again."""

    def prepare(self, work: Work) -> Prepared:
        """Open, check, and make room in the store."""

    def run(self, block: Block, info: dict[str, Any], work: Work) -> Any:
        """Do one block; what it returns is small."""

    def finish(self, prepared: Prepared, results: list[Any], work: Work) -> Outcome:
        """Commit the blocks, given in order."""

    def fail(self, reason: str) -> None:
        """Keep why the job failed; called where the client is."""


class Listener(Protocol):
    """Is told how the jobs go on."""

    def prepared(self, job_id: str, tiles: int) -> None:
        """A slide turned out to have so many tiles."""

    def advanced(self, job_id: str, tiles: int) -> None:
        """So many more tiles of a slide are done."""

    def ended(self, job_id: str, outcome: Outcome) -> None:
        """A slide is done or has failed."""


def carry_out(
    place: AbstractContextManager[Place], plans: Mapping[str, Plan], jobs: Sequence[Job], listener: Listener
) -> Summary:
    """Run the jobs of a plan, and say what became of every slide in it; no place is opened where nothing is to do.

    Raises:
        StoreWriteError: the store's disk is full; what was complete is kept.
    """
    start = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    if jobs:
        with place as opened:
            outcomes = run_jobs(opened, jobs, listener)
    return Summary(plans, outcomes, time.monotonic() - start)


def run_jobs(place: Place, jobs: Sequence[Job], listener: Listener) -> dict[str, Outcome]:
    """Run every job to its outcome; one that fails leaves the others alone.

    A job whose worker died is run again by itself, since Dask blames every task that was waiting there.

    Returns:
        job id -> outcome.

    Raises:
        StoreWriteError: the store's disk is full; nothing more is begun.
    """
    topic = f"wsi-idc-{uuid.uuid4().hex}"
    place.client.subscribe_topic(topic, lambda event: listener.advanced(event[1]["job"], event[1]["tiles"]))
    try:
        drive = _Drive(place, topic, listener)
        for job in drive.run(jobs):
            if drive.run([job]):
                drive.end(job, _fail(job, _Failure("its worker process died twice (killed, or out of memory)", _FEWER)))
        return drive.outcomes
    finally:
        with contextlib.suppress(Exception):
            place.client.unsubscribe_topic(topic)


_FEWER = "try fewer --workers"


@dataclass(frozen=True)
class _Failure:
    """Why a call failed, in plain text: an error of a library may not survive the way between processes."""

    problem: str
    advice: str = ""
    detail: str = ""
    no_room: bool = False

    @property
    def reason(self) -> str:
        return f"{self.problem}; {self.advice}" if self.advice else self.problem


@dataclass(eq=False)
class _Active:
    """A job under way: its blocks that were not handed out yet, what came back, and what went wrong."""

    job: Job
    prepared: Prepared | None = None
    waiting: deque[int] = field(default_factory=deque)
    results: dict[int, Any] = field(default_factory=dict)
    failure: _Failure | None = None
    died: bool = False
    tasks: int = 0
    """Handed out and not back."""

    @property
    def broken(self) -> bool:
        return self.died or self.failure is not None


class _Drive:
    """The loop: a bounded number of tasks is handed out, blocks of slides that were begun before new slides.

    Few are handed out ahead of need, so that what is left of a job that failed is never begun, and a large cohort does
    not lie in the scheduler.
    """

    def __init__(self, place: Place, topic: str, listener: Listener) -> None:
        self._client, self._capacity, self._topic, self._listener = place.client, place.capacity, topic, listener
        self.outcomes: dict[str, Outcome] = {}

    def end(self, job: Job, outcome: Outcome) -> None:
        """Note what became of a job, and tell it."""
        self.outcomes[job.job_id] = outcome
        self._listener.ended(job.job_id, outcome)

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Run jobs; gives back those whose worker died.

        Raises:
            StoreWriteError: see `run_jobs`.
        """
        from distributed import as_completed

        self._completed = as_completed([])
        self._stages: dict[str, tuple[_Active, int | None]] = {}
        self._waiting, self._begun = deque(jobs), list[_Active]()
        suspects: list[Job] = []
        no_room: _Failure | None = None
        limit = self._capacity.slots + max(1, self._capacity.slots // 2)
        self._hand_out(limit)
        for future in self._completed:
            active, index = self._stages.pop(future.key)
            active.tasks -= 1
            self._take(active, index, _unwrap(future))
            future.release()
            if active.failure and active.failure.no_room:
                no_room = active.failure
                self._waiting.clear()
                for other in self._begun:
                    other.waiting.clear()
            # A broken job is settled when none of its tasks is left that could still write.
            if active.broken and not active.tasks:
                self._begun.remove(active)
                if active.died:
                    suspects.append(active.job)
                elif active.failure:
                    self.end(active.job, _fail(active.job, active.failure))
            self._hand_out(limit)
        if no_room:
            raise StoreWriteError("the store", no_room.problem, "make room: what was complete is kept, run it again")
        return suspects

    def _take(self, active: _Active, index: int | None, value: Any) -> None:
        """Note what one task gave."""
        if isinstance(value, _Died):
            active.died = True
        elif isinstance(value, _Failure):
            active.failure = active.failure or value
        elif isinstance(value, Prepared):
            active.prepared = value
            active.waiting.extend(range(len(value.blocks)))
            self._listener.prepared(active.job.job_id, value.tiles)
        elif index is not None:
            active.results[index] = value
        else:
            self._begun.remove(active)
            self.end(active.job, value)
            return
        if active.broken:
            active.waiting.clear()
        elif active.prepared and len(active.results) == len(active.prepared.blocks):
            results = [active.results[number] for number in range(len(active.results))]
            self._submit(active, None, "finish", active.prepared, results, urgency=2)

    def _hand_out(self, limit: int) -> None:
        """Hand out tasks up to the limit."""
        while len(self._stages) < limit:
            active = next((one for one in self._begun if one.waiting), None)
            if active is not None and active.prepared is not None:
                number = active.waiting.popleft()
                block, info = active.prepared.blocks[number], active.prepared.info
                self._submit(active, number, "run", block, info, urgency=1)
            elif self._waiting:
                active = _Active(self._waiting.popleft())
                self._begun.append(active)
                self._submit(active, None, "prepare", urgency=0)
            else:
                return

    def _submit(self, active: _Active, index: int | None, call: str, *arguments: Any, urgency: int) -> None:
        future = self._client.submit(
            _call, active.job, call, arguments, self._capacity, self._topic, pure=False, priority=urgency
        )
        active.tasks += 1
        self._stages[future.key] = (active, index)
        self._completed.add(future)


class _Died:
    """What a task gave whose worker process died."""


def _fail(job: Job, failure: _Failure) -> Outcome:
    """Keep why a job failed; where even that cannot be written (a full disk), it is told all the same."""
    with contextlib.suppress(OSError):
        job.fail(failure.reason)
    return Outcome("failed", reason=failure.reason, detail=failure.detail)


def _call(job: Job, call: str, arguments: tuple[Any, ...], capacity: Capacity, topic: str) -> Any:
    """Run one call on a worker; errors come back as plain text: Dask neither retries, nor logs, nor unpickles them."""
    from distributed import get_worker

    worker = get_worker()

    def report(tiles: int) -> None:
        worker.log_event(topic, {"job": job.job_id, "tiles": tiles})

    try:
        return getattr(job, call)(*arguments, Work(capacity, report))
    except Exception as error:
        detail = "".join(traceback.format_exception(error))[-16_384:]
        if isinstance(error, WsiIdcError):
            known = not error.subject or error.subject in job.names
            return _Failure(error.problem if known else f"{error.subject}: {error.problem}", error.advice, detail)
        if isinstance(error, MemoryError):
            return _Failure("out of memory", f"{_FEWER} or a smaller --batch-size", detail)
        if isinstance(error, OSError):
            return _Failure(system_reason(error), "", detail, error.errno in _NO_ROOM)
        return _Failure(f"{type(error).__name__}: {error}", "this looks like a defect, please report it", detail)


def _unwrap(future: Any) -> Any:
    """What a task gave; an answer that cannot be had is a failure, or a death, of that job alone."""
    from distributed import CancelledError
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except (KilledWorker, CancelledError):
        return _Died()
    except Exception as error:
        return _Failure(f"the worker's answer cannot be read ({type(error).__name__}: {error})", "please report it")
