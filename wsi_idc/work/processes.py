"""Work in processes of this machine, over Dask: N of them, or one a GPU.

What listens does so on the loopback address, takes nobody's work but ours, and serves no pages. Dask's own
`LocalCluster` does not fit: it opens an HTTP port for each of its parts even without a dashboard, and gives all workers
one environment, where each GPU needs its own.
"""

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import dask
from distributed import CancelledError, Client, Nanny, Scheduler, Security, SpecCluster, Worker, get_worker
from distributed.scheduler import KilledWorker

from wsi_idc.work.jobs import LESS, Capacity, Lost, Place, Progress, Tell

_SETTINGS = {
    # One death makes every task of that worker a suspect; suspects are then run one at a time (`jobs.run_jobs`).
    "distributed.scheduler.allowed-failures": 0,
    "distributed.worker.daemon": True,
    "distributed.admin.log-length": 0,
}


class QuietScheduler(Scheduler):  # type: ignore[misc]
    """A scheduler without an HTTP server."""

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Serve nothing."""


class QuietWorker(Worker):  # type: ignore[misc]
    """A worker without an HTTP server."""

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Serve nothing."""


@dataclass(frozen=True)
class _Topic:
    """Tells by an event of Dask's, from the worker that runs the task."""

    name: str

    def __call__(self, job_id: str, what: Progress, tiles: int) -> None:
        get_worker().log_event(self.name, (job_id, what, tiles))


class DaskPlace(Place):
    """The workers of a Dask client.

    Attributes:
        client: Dask's.
    """

    def __init__(self, client: Any, capacity: Capacity) -> None:
        super().__init__(capacity)
        self.client = client

    def submit(self, urgency: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """See `Place.submit`."""
        options = {} if self.workers is None else {"workers": self.workers, "allow_other_workers": False}
        return self.client.submit(function, *arguments, pure=False, priority=urgency, **options)

    @contextmanager
    def telling(self, told: Tell) -> Iterator[Tell]:
        """See `Place.telling`."""
        topic = _Topic(f"wsi-idc-{uuid.uuid4().hex}")
        self.client.subscribe_topic(topic.name, lambda event: told(*event[1]))
        try:
            yield topic
        finally:
            with suppress(Exception):
                self.client.unsubscribe_topic(topic.name)

    def loss(self, error: Exception) -> Lost:
        """See `Place.loss`."""
        if isinstance(error, KilledWorker):
            return Lost(f"its worker process died (killed, or out of memory; {LESS})")
        if isinstance(error, CancelledError):
            if getattr(error, "reason", "") == "scheduler-connection-lost":
                raise self.lost() from error
            return Lost("its task was cancelled", blame=False)
        return super().loss(error)


@contextmanager
def in_processes(capacity: Capacity, environments: list[dict[str, str]]) -> Iterator[Place]:
    """Processes on this machine, one for each of the environments, which they have from before they start."""
    # Python's resource tracker warns of semaphores when a run is interrupted; they are the system's to reclaim.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    # Another user of this machine could hand work to a scheduler that asks nobody who he is.
    security = Security.temporary()
    options = {"protocol": "tls", "host": "127.0.0.1", "security": security, "dashboard": False}
    worker = {
        "worker_class": QuietWorker,
        "nthreads": capacity.slots // capacity.workers,
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
    }
    workers = {
        index: {"cls": Nanny, "options": {**options, **worker, "env": environment}}
        for index, environment in enumerate(environments)
    }
    hush()
    scheduler = {"cls": QuietScheduler, "options": options}
    with (
        dask.config.set(_SETTINGS),
        SpecCluster(workers=workers, scheduler=scheduler, security=security) as cluster,
        Client(cluster, security=security) as client,
    ):
        yield DaskPlace(client, capacity)


def hush() -> None:
    """Silence Dask and what it stands on: they tell at length what is told here in one line, and of slow farewells."""
    for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
