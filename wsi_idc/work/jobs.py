"""Jobs at any place: one outcome a slide, whatever becomes of the others.

A job is a slide: `prepare` says which blocks of tiles it has, `run` does one block, `finish` commits them all. Jobs
carry ids, addresses and what changes a result, never pixels, and nothing of where they run: that comes with each call,
as `Work`. A place takes tasks and gives futures (`places.py`); nothing here knows which.
"""

import contextlib
import errno
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Literal, Protocol, TypeAlias

from wsi_idc.errors import (
    ClusterError,
    ObjectsError,
    OvertakenError,
    StoreBusyError,
    StoreWriteError,
    WsiIdcError,
    system_reason,
)
from wsi_idc.plan import Plan

Progress: TypeAlias = Literal["prepared", "advanced"]
Tell: TypeAlias = Callable[[str, Progress, int], None]
"""Is told that a job has so many tiles, or that so many more of them are done; what a task is given of it, it may have
to carry to a worker."""
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


class Place(ABC):
    """Where work runs, and what it offers.

    Attributes:
        capacity: what is offered, from when work is admitted.
        workers: names of those that may be given work; None: all there are.
    """

    workers: list[str] | None = None

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity

    @abstractmethod
    def submit(self, urgency: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have a function called, the more urgent ones first; gives a future, of Dask or of the standard library."""

    @abstractmethod
    def telling(self, told: Tell) -> AbstractContextManager[Tell]:
        """While this lasts, what it gives can be an argument of tasks, and passes on what they tell it to `told`."""

    def loss(self, error: Exception) -> "Lost":
        """What a future's error means: its function's errors never are one.

        Raises:
            ClusterError: the place is lost.
        """
        return Lost(f"its answer cannot be read ({type(error).__name__}: {' '.join(str(error).split())})")

    @property
    def notes(self) -> list[str]:
        """Lines that a user should see, of what became of the place."""
        return []

    def lost(self) -> ClusterError:
        """The error that says that it is."""
        return ClusterError("the scheduler", "it is lost", "what was complete is kept, the same command goes on")

    def admit(self, jobs: Sequence["Job"]) -> None:  # noqa: B027
        """Find out, before any of these jobs begins, whether they can be done here.

        Raises:
            UsageError: they cannot.
        """

    def watch(self) -> None:  # noqa: B027
        """Look after the place; called about every second while work is under way.

        Raises:
            ClusterError: it is lost.
        """


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
        notes: lines that are told once a run, with the number of slides that they are true of.
        seconds: how long its tasks ran, all of them together; None where that was not measured.
        detail: the traceback where it failed, for those who look for a defect.
    """

    status: Literal["done", "failed"]
    tiles: int = 0
    reason: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float | None = field(default=None, compare=False)
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

    def hindrances(self) -> list[str]:
        """Why it could not be done by the process that asks: what of the store, slide and model is not seen there."""

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

    def left_out(self, job_id: str) -> None:
        """A slide that was to come will not: there is nothing to do, or it failed before."""


class Supply:
    """Jobs of which some come while others are under way; it may be filled and emptied by several threads.

    Args:
        jobs: those that are there from the beginning.
        closed: whether these are all.
        may_begin: whether another job may be begun now; asked again whenever `wake` is called.
    """

    def __init__(
        self, jobs: Iterable[Job] = (), *, closed: bool = True, may_begin: Callable[[], bool] = lambda: True
    ) -> None:
        self._jobs, self._closed, self._may_begin = deque(jobs), closed, may_begin
        self._lock = Lock()
        self._woken: Callable[[], None] = lambda: None
        self._taken: Callable[[], None] = lambda: None

    def put(self, job: Job) -> None:
        """Add a job; one that comes after the end is dropped."""
        with self._lock:
            if not self._closed:
                self._jobs.append(job)
        self.wake()

    def close(self) -> None:
        """No more come."""
        with self._lock:
            self._closed = True
        self.wake()

    def shut(self) -> None:
        """No more come, and what was not begun is not wanted any more."""
        with self._lock:
            self._closed = True
            self._jobs.clear()
        self.wake()

    def take(self) -> Job | None:
        """The next job; None where none is there, or none may be begun."""
        with self._lock:
            job = self._jobs.popleft() if self._jobs and self._may_begin() else None
        if job is not None:
            self._taken()
        return job

    @property
    def waiting(self) -> int:
        """Jobs that are there and were not taken."""
        with self._lock:
            return len(self._jobs)

    @property
    def ended(self) -> bool:
        """Whether all have been taken, and no more come."""
        with self._lock:
            return self._closed and not self._jobs

    def wake(self) -> None:
        """Let whoever takes jobs look again."""
        self._woken()

    def when_woken(self, call: Callable[[], None]) -> None:
        """What is called to wake whoever takes jobs."""
        self._woken = call

    def when_taken(self, call: Callable[[], None]) -> None:
        """What is called after a job was taken."""
        self._taken = call


def carry_out(
    place: AbstractContextManager[Place], plans: Mapping[str, Plan], jobs: Sequence[Job], listener: Listener
) -> Summary:
    """Run the jobs of a plan, and say what became of every slide in it; no place is opened where nothing is to do.

    Raises:
        UsageError: the place cannot do them.
        StoreWriteError, StoreBusyError, ClusterError: the run cannot go on; what was complete is kept.
    """
    start = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    notes: tuple[str, ...] = ()
    if jobs:
        with place as opened:
            opened.admit(jobs)
            outcomes = run_jobs(opened, Supply(jobs), listener)
            notes = (*opened.notes, *counted_notes(outcomes.values()))
    return Summary(plans, outcomes, time.monotonic() - start, notes)


def counted_notes(outcomes: Iterable[Outcome]) -> list[str]:
    """The notes of all slides, each once."""
    counts = Counter(note for outcome in outcomes for note in outcome.notes)
    return [f"{count:,} slide{'s' if count != 1 else ''}: {note}" for note, count in counts.items()]


def run_jobs(
    place: Place, jobs: Supply, listener: Listener, *, slots: int | None = None, urgency: int = 0
) -> dict[str, Outcome]:
    """Run every job to its outcome; one that fails leaves the others alone.

    A job of which a task was lost is run again by itself, since Dask blames every task that was waiting where a worker
    died.

    Args:
        place: where; others may run jobs there at the same time.
        jobs: what is run.
        listener: is told how they go on.
        slots: tasks under way at once; None: as many as the place has.
        urgency: of two who run jobs at one place, the more urgent one's tasks go first.

    Returns:
        job id -> outcome.

    Raises:
        StoreWriteError: the store takes no more; nothing more is begun.
        StoreBusyError: another run has taken the store over.
        ClusterError: the scheduler, or every worker, is lost.
    """

    def heard(job_id: str, what: Progress, tiles: int) -> None:
        (listener.prepared if what == "prepared" else listener.advanced)(job_id, tiles)

    with place.telling(heard) as tell:
        drive = _Drive(place, tell, listener, slots, urgency)
        for job in drive.run(jobs):
            # Where it is only that its workers left, twice more; but that may be its own doing.
            for forgiving in (True, True, False):
                if not drive.run(Supply([job]), alone=True, forgiving=forgiving):
                    break
        return drive.outcomes


LESS = "try fewer workers, or give each more memory"
_FETCH_S = 10
"""To fetch the answer of a task that is done; answers are small."""


@dataclass(frozen=True)
class _Failure:
    """Why a call failed, in plain text: an error of a library may not survive the way between processes."""

    problem: str
    advice: str = ""
    detail: str = ""
    ends: WsiIdcError | None = None
    """What ends the run: the others would meet the same."""

    @property
    def reason(self) -> str:
        return f"{self.problem}; {self.advice}" if self.advice else self.problem


@dataclass(frozen=True)
class Lost:
    """A task whose answer does not count, and why: its job is run again by itself before it is called failed.

    Attributes:
        why: in one line.
        blame: whether the job may be the reason.
    """

    why: str
    blame: bool = True


@dataclass(frozen=True)
class _Timed:
    """What a call gave, and the seconds that it took."""

    value: Any
    seconds: float


@dataclass(eq=False)
class _Active:
    """A job under way: its blocks that were not handed out yet, what came back, and what went wrong."""

    job: Job
    prepared: Prepared | None = None
    waiting: deque[int] = field(default_factory=deque)
    results: dict[int, Any] = field(default_factory=dict)
    failure: _Failure | None = None
    lost: Lost | None = None
    tasks: int = 0
    """Handed out and not back."""
    seconds: float = 0.0
    """That its tasks ran."""

    @property
    def broken(self) -> bool:
        return self.lost is not None or self.failure is not None


@dataclass(frozen=True)
class _Stage:
    """A task that was handed out: of which job, which block (None: of none), and to which workers (None: any)."""

    active: _Active
    index: int | None
    workers: frozenset[str] | None


class _Drive:
    """The loop: a bounded number of tasks is handed out, blocks of slides that were begun before new slides.

    Few are handed out ahead of need, so that what is left of a job that failed is never begun, and a large cohort does
    not lie in the scheduler.
    """

    def __init__(self, place: Place, tell: Tell, listener: Listener, slots: int | None, urgency: int) -> None:
        self._place, self._tell, self._listener = place, tell, listener
        self._slots, self._urgency = slots, urgency
        self.outcomes: dict[str, Outcome] = {}
        self._ends: WsiIdcError | None = None
        """Why nothing more is begun."""

    def _end(self, active: _Active, outcome: Outcome) -> None:
        """Note what became of a job, and tell it."""
        outcome = replace(outcome, seconds=active.seconds)
        self.outcomes[active.job.job_id] = outcome
        self._listener.ended(active.job.job_id, outcome)

    def run(self, jobs: Supply, *, alone: bool = False, forgiving: bool = True) -> list[Job]:
        """Run jobs; gives back those that are to be tried again.

        Args:
            jobs: the jobs.
            alone: whether each is by itself: then one of which a task was lost is failed, and else tried again.
            forgiving: whether one that may not be to blame is tried again all the same.

        Raises:
            StoreWriteError, StoreBusyError, ClusterError: see `run_jobs`.
        """
        self._stages: dict[Any, _Stage] = {}
        self._supply, self._begun = jobs, list[_Active]()
        suspects: list[Job] = []
        self._ends = None
        for active, index, value in self._answers():
            self._take(active, index, value)
            if active.failure and active.failure.ends:
                self._ends = self._ends or active.failure.ends
                self._supply.shut()
                for other in self._begun:
                    other.waiting.clear()
            # A broken job is settled when none of its tasks is left that could still write.
            if active.broken and not active.tasks:
                self._begun.remove(active)
                if active.failure is None and active.lost and not (alone and (active.lost.blame or not forgiving)):
                    suspects.append(active.job)
                else:
                    why = active.lost.why if active.lost else ""
                    self._end(active, _fail(active.job, active.failure or _Failure(f"{why}, each time")))
        if self._ends:
            raise self._ends
        return suspects

    def _answers(self) -> Iterator[tuple[_Active, int | None, Any]]:
        """What tasks give, as it comes, until there are none left."""
        self._back: SimpleQueue[Any] = SimpleQueue()
        back = self._back
        self._supply.when_woken(lambda: back.put(None))
        self._hand_out()
        while self._stages or not self._supply.ended:
            self._place.watch()
            self._withdraw()
            try:
                future = self._back.get(timeout=1)
            except Empty:
                future = None
            if future is None:
                self._hand_out()
                continue
            try:
                value = self._unwrap(future)
            except TimeoutError:
                # Who had the answer died before it was fetched: it comes again, if anybody is left to make it.
                future.add_done_callback(self._back.put)
                continue
            stage = self._stages.pop(future)
            stage.active.tasks -= 1
            if isinstance(value, _Timed):
                stage.active.seconds += value.seconds
                value = value.value
            yield stage.active, stage.index, value
            self._hand_out()

    def _withdraw(self) -> None:
        """Take back tasks that none but workers who are gone may do: Dask would let them wait for ever."""
        if (workers := self._place.workers) is not None:
            for future, stage in self._stages.items():
                if stage.workers is not None and stage.workers.isdisjoint(workers):
                    future.cancel()

    def _unwrap(self, future: Any) -> Any:
        """What a task gave; an answer that cannot be had is a loss to that job alone.

        Raises:
            ClusterError: the place is lost.
            TimeoutError: it did not come.
        """
        try:
            return future.result(timeout=_FETCH_S)
        except TimeoutError:
            raise
        except Exception as error:
            return self._place.loss(error)

    def _take(self, active: _Active, index: int | None, value: Any) -> None:
        """Note what one task gave."""
        if isinstance(value, Lost):
            active.lost = active.lost or value
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
            self._end(active, value)
            return
        if active.broken or self._ends:
            active.waiting.clear()
        elif active.prepared and len(active.results) == len(active.prepared.blocks):
            results = [active.results[number] for number in range(len(active.results))]
            self._submit(active, None, "finish", active.prepared, results, urgency=2)

    def _hand_out(self) -> None:
        """Hand out tasks: half as many again as there are slots."""
        slots = self._slots or self._place.capacity.slots
        limit = slots + max(1, slots // 2)
        while len(self._stages) < limit:
            active = next((one for one in self._begun if one.waiting), None)
            if active is not None and active.prepared is not None:
                number = active.waiting.popleft()
                block, info = active.prepared.blocks[number], active.prepared.info
                self._submit(active, number, "run", block, info, urgency=1)
            elif (job := self._supply.take()) is not None:
                active = _Active(job)
                self._begun.append(active)
                self._submit(active, None, "prepare", urgency=0)
            else:
                return

    def _submit(self, active: _Active, index: int | None, call: str, *arguments: Any, urgency: int) -> None:
        place = self._place
        future = place.submit(self._urgency + urgency, _call, active.job, call, arguments, place.capacity, self._tell)
        active.tasks += 1
        workers = None if place.workers is None else frozenset(place.workers)
        self._stages[future] = _Stage(active, index, workers)
        future.add_done_callback(self._back.put)


def _fail(job: Job, failure: _Failure) -> Outcome:
    """Keep why a job failed; where even that cannot be written (a full disk), it is told all the same."""
    with contextlib.suppress(OSError, StoreBusyError):
        job.fail(failure.reason)
    return Outcome("failed", reason=failure.reason, detail=failure.detail)


class _Report:
    """Tells of a job's tiles, at most twice a second: Dask's scheduler keeps what it is told."""

    def __init__(self, job_id: str, tell: Tell) -> None:
        self._job_id, self._tell = job_id, tell
        self._tiles, self._told = 0, time.monotonic()

    def __call__(self, tiles: int) -> None:
        self._tiles += tiles
        if time.monotonic() - self._told >= 0.5:
            self.flush()

    def prepared(self, tiles: int) -> None:
        self._tell(self._job_id, "prepared", tiles)

    def flush(self) -> None:
        if self._tiles:
            self._tell(self._job_id, "advanced", self._tiles)
        self._tiles, self._told = 0, time.monotonic()


def _call(job: Job, call: str, arguments: tuple[Any, ...], capacity: Capacity, tell: Tell) -> Any:
    """Run one call on a worker; errors come back as plain text: Dask neither retries, nor logs, nor unpickles them."""
    report, start = _Report(job.job_id, tell), time.monotonic()
    work = Work(capacity, report)
    try:
        value = getattr(job, call)(*arguments, work)
        if isinstance(value, Prepared) and len(value.blocks) <= 1:
            # Nobody to share it with: on to its end, as each further task would cost its scheduling.
            report.prepared(value.tiles)
            value = job.finish(value, [job.run(block, value.info, work) for block in value.blocks], work)
        report.flush()
    except OvertakenError as error:
        return Lost(error.problem)
    except Exception as error:
        value = _failure(job, error)
    return _Timed(value, time.monotonic() - start)


def _failure(job: Job, error: Exception) -> _Failure:
    """An error of a call in plain text."""
    detail = "".join(traceback.format_exception(error))[-16_384:]
    if isinstance(error, WsiIdcError):
        known = not error.subject or error.subject in job.names
        ends = error if isinstance(error, StoreBusyError) else None
        return _Failure(error.problem if known else f"{error.subject}: {error.problem}", error.advice, detail, ends)
    if isinstance(error, MemoryError):
        return _Failure("out of memory", f"{LESS}, or a smaller --batch-size", detail)
    if isinstance(error, OSError):
        reason = system_reason(error)
        full: StoreWriteError | None = None
        if error.errno in _NO_ROOM:
            full = StoreWriteError("the store", reason, "make room: what was complete is kept, run it again")
        elif isinstance(error, ObjectsError):
            full = StoreWriteError("the store", reason, "what was complete is kept, the same command goes on")
        return _Failure(reason, "", detail, full)
    return _Failure(
        f"{type(error).__name__}: {' '.join(str(error).split())}", "this looks like a defect, please report it", detail
    )
