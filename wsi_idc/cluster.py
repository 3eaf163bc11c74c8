"""Dask: where work runs, and what becomes of each slide.

A job is a slide: `prepare` says which blocks of tiles it has, `run` does one block, `finish` commits them all. Jobs
carry ids and paths, never pixels; workers open slides and models themselves. The same three calls run in this process,
in N local processes or in one process a GPU.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from wsi_idc.errors import UsageError, WsiIdcError, system_reason
from wsi_idc.plan import Plan

TOPIC = "wsi-idc"
"""Dask event topic on which workers report finished tiles."""


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
    """

    status: Literal["done", "failed"]
    tiles: int = 0
    reason: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What a command did with each slide.

    Attributes:
        plans: slide id -> what was decided, in order.
        outcomes: slide id -> what became of those that were run.
        seconds: of wall time.
    """

    plans: Mapping[str, Plan]
    outcomes: Mapping[str, Outcome]
    seconds: float

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

    def prepare(self) -> Prepared:
        """Open, check, and make room in the store."""

    def run(self, block: Block, info: dict[str, Any]) -> Any:
        """Do one block; what it returns is small."""

    def finish(self, prepared: Prepared, results: list[Any]) -> Outcome:
        """Commit the blocks, given in order."""

    def fail(self, reason: str) -> None:
        """Keep why the job failed."""


class Listener(Protocol):
    """Is told how the jobs go on."""

    def prepared(self, job_id: str, tiles: int) -> None:
        """A slide turned out to have so many tiles."""

    def advanced(self, job_id: str, tiles: int) -> None:
        """So many more tiles of a slide are done."""

    def ended(self, job_id: str, outcome: Outcome) -> None:
        """A slide is done or has failed."""


@dataclass(frozen=True)
class Workers:
    """Where jobs run.

    Attributes:
        processes: local worker processes; 0 runs everything in this process.
        gpus: one worker process for each of so many GPUs; instead of `processes`.
        threads: tasks that one worker does at a time.
    """

    processes: int = 0
    gpus: int = 0
    threads: int = 1

    @property
    def slots(self) -> int:
        """Tasks under way at once."""
        return max(1, self.gpus or self.processes) * self.threads


def threads_per_task(workers: Workers, asked: int = 0) -> int:
    """CPU threads that one task may use, when the cores are shared evenly."""
    return asked or max(1, len(os.sched_getaffinity(0)) // max(1, workers.gpus or workers.processes))


def visible_gpus(count: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of `count` GPU workers; a mask that is set already is respected.

    Raises:
        UsageError: there are fewer.
    """
    import torch

    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [name for name in mask.split(",") if name] if mask is not None else None
    available = torch.cuda.device_count()
    names = found[:available] if found is not None else [str(index) for index in range(available)]
    if len(names) < count:
        raise UsageError("--gpus", f"{count} asked for, {len(names)} found", "leave --gpus out to run on the CPU")
    return names[:count]


@contextlib.contextmanager
def connect(workers: Workers) -> Iterator[Any]:
    """A Dask client of the workers, which end with it. All that listens does so on the loopback address."""
    import logging

    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster, Worker

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    # Python's resource tracker warns of semaphores when a run is interrupted; they are the system's to reclaim.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    settings = {
        # One death makes every task of that worker a suspect; suspects are then run one at a time (run_jobs).
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.daemon": True,
        "distributed.admin.log-length": 0,
    }
    no_dashboard = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    options: dict[str, Any] = {"nthreads": workers.threads, "memory_limit": 0, **no_dashboard}
    place: dict[str, Any] = {"protocol": "inproc"}
    environments: list[dict[str, str]] = [{}]
    kind = Worker
    if workers.gpus or workers.processes:
        kind, place = Nanny, {"protocol": "tcp", "host": "127.0.0.1"}
        options["silence_logs"] = logging.CRITICAL
        environments = [{} for _ in range(workers.processes)]
    if workers.gpus:
        environments = [{"CUDA_VISIBLE_DEVICES": name} for name in visible_gpus(workers.gpus)]
    spec = {
        index: {"cls": kind, "options": {**options, **place, **({"env": environment} if environment else {})}}
        for index, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {**place, **no_dashboard}}
    with (
        dask.config.set(settings),
        SpecCluster(workers=spec, scheduler=scheduler) as cluster,
        Client(cluster) as client,
    ):
        yield client


def report_tiles(job_id: str, tiles: int) -> None:
    """Tell the client, from within a task, that so many tiles are done."""
    from distributed import get_worker

    get_worker().log_event(TOPIC, {"job": job_id, "tiles": tiles})


class _WorkerDiedError(Exception):
    """A worker process died while it had this job."""


def execute(workers: Workers, plans: Mapping[str, Plan], jobs: Sequence[Job], listener: Listener) -> Summary:
    """Run the jobs of a plan, and say what became of every slide in it; nothing is started where nothing is to do."""
    start = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    if jobs:
        with connect(workers) as client:
            outcomes = run_jobs(client, workers, jobs, listener)
    return Summary(plans, outcomes, time.monotonic() - start)


def run_jobs(client: Any, workers: Workers, jobs: Sequence[Job], listener: Listener) -> dict[str, Outcome]:
    """Run every job to its outcome; one that fails leaves the others alone.

    A job whose worker died is run again by itself, since Dask blames every task that was waiting there.

    Returns:
        job id -> outcome.
    """
    client.subscribe_topic(TOPIC, lambda event: listener.advanced(event[1]["job"], event[1]["tiles"]))
    outcomes: dict[str, Outcome] = {}

    def end(job: Job, outcome: Outcome) -> None:
        outcomes[job.job_id] = outcome
        listener.ended(job.job_id, outcome)

    suspects = _drive(client, jobs, workers.slots + 1, listener, end)
    for job in suspects:
        if _drive(client, [job], 1, listener, end):
            reason = "its worker process died twice (killed, or out of memory); try fewer --workers"
            end(job, _fail(job, reason))
    client.unsubscribe_topic(TOPIC)
    return outcomes


@dataclass
class _Active:
    job: Job
    prepared: Prepared | None = None
    results: dict[int, Any] = field(default_factory=dict)
    error: WsiIdcError | None = None
    died: bool = False


def _drive(
    client: Any, jobs: Sequence[Job], limit: int, listener: Listener, end: Callable[[Job, Outcome], None]
) -> list[Job]:
    """Run jobs, at most `limit` of them begun at a time; gives back those whose worker died."""
    from distributed import as_completed

    waiting = deque(jobs)
    stages: dict[str, tuple[_Active, int | None]] = {}
    suspects: list[Job] = []
    completed = as_completed([])

    def submit(active: _Active, index: int | None, call: Callable[..., Any], *arguments: Any, urgency: int) -> None:
        future = client.submit(_guarded, call, *arguments, pure=False, priority=urgency)
        stages[future.key] = (active, index)
        completed.add(future)

    def begin() -> None:
        while waiting and len({id(active) for active, _ in stages.values()}) < limit:
            job = waiting.popleft()
            submit(_Active(job), None, job.prepare, urgency=0)

    def commit(active: _Active) -> None:
        assert active.prepared is not None
        results = [active.results[number] for number in range(len(active.prepared.blocks))]
        submit(active, None, active.job.finish, active.prepared, results, urgency=2)

    begin()
    for future in completed:
        active, index = stages.pop(future.key)
        job = active.job
        try:
            value = _unwrap(future)
        except _WorkerDiedError:
            active.died = True
        except WsiIdcError as error:
            active.error = active.error or error
        else:
            if isinstance(value, Prepared):
                active.prepared = value
                listener.prepared(job.job_id, value.tiles)
                for number, block in enumerate(value.blocks):
                    submit(active, number, job.run, block, value.info, urgency=1)
            elif index is not None:
                active.results[index] = value
            if isinstance(value, Outcome):
                end(job, value)
            elif active.prepared is not None and len(active.results) == len(active.prepared.blocks):
                commit(active)
        # A broken job is settled when none of its tasks is left that could still write.
        if not any(other is active for other, _ in stages.values()):
            if active.died:
                suspects.append(job)
            elif active.error:
                end(job, _fail(job, active.error.reason))
        future.release()
        begin()
    return suspects


def _fail(job: Job, reason: str) -> Outcome:
    """Keep why a job failed; where even that cannot be written (a full disk), it is told all the same."""
    with contextlib.suppress(OSError):
        job.fail(reason)
    return Outcome("failed", reason=reason)


def _guarded(call: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """Run one call on a worker; errors come back as values, so that Dask neither retries nor logs them."""
    try:
        return "ok", call(*arguments)
    except WsiIdcError as error:
        return "error", error
    except MemoryError:
        return "error", WsiIdcError("", "out of memory", "try fewer --workers or a smaller --batch-size")
    except OSError as error:
        return "error", WsiIdcError("", system_reason(error))
    except Exception as error:
        return "error", WsiIdcError(
            "", f"{type(error).__name__}: {error}", "this looks like a defect, please report it"
        )


def _unwrap(future: Any) -> Any:
    from distributed.scheduler import KilledWorker

    try:
        status, value = future.result()
    except KilledWorker as error:
        raise _WorkerDiedError from error
    if status == "error":
        raise value
    return value
