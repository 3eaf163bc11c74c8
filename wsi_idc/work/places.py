"""Where work runs: in this process, in N local processes, in one process a GPU, or on a cluster (`cluster.py`).

A place is a context manager that yields a Dask client and a plain `Capacity`. What listens does so on the loopback
address, takes nobody's work but ours, and serves no pages. Dask's own `LocalCluster` does not fit: it opens an HTTP
port for each of its parts even without a dashboard, and gives all workers one environment, where each GPU's needs its
own.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Scheduler, Security, SpecCluster, Worker

from wsi_idc.errors import UsageError
from wsi_idc.settings import PlaceSettings
from wsi_idc.work.jobs import Capacity, Place

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


def place(settings: PlaceSettings, *, overlap: int = 1) -> Any:
    """The place that a user asked for: a context manager that yields a `Place`.

    Args:
        settings: where, with how many workers.
        overlap: see `local`.

    Raises:
        UsageError: there are fewer GPUs than asked for.
    """
    if settings.elsewhere:
        from wsi_idc.work import cluster

        return cluster.at(
            settings.scheduler,
            settings.scheduler_file,
            wait=settings.wait,
            gpus=settings.gpus,
            threads=settings.threads,
        )
    return local(workers=settings.workers, gpus=settings.gpus, threads=settings.threads, overlap=overlap)


def local(*, workers: int = 0, gpus: int = 0, threads: int = 0, overlap: int = 1) -> Any:
    """A place on this machine: a context manager that yields a `Place`.

    Args:
        workers: worker processes; 0 runs everything in this process.
        gpus: one worker process for each of so many GPUs; instead of `workers`.
        threads: CPU threads of each task; 0 shares the cores evenly.
        overlap: tasks under way at once in each process: one fills the gaps of another.

    Raises:
        UsageError: there are fewer GPUs.
    """
    count = gpus or workers
    capacity = Capacity(
        workers=max(1, count),
        slots=max(1, count) * overlap,
        threads=threads_of(count, threads),
        gpu=bool(gpus),
    )
    if not count:
        return _in_this_process(capacity)
    environments = [{"CUDA_VISIBLE_DEVICES": name} for name in visible_gpus(gpus)] if gpus else [{}] * workers
    return _in_processes(capacity, environments)


def threads_of(count: int, asked: int = 0) -> int:
    """CPU threads that one task may use, when the cores are shared evenly by `count` workers."""
    return asked or max(1, CPU_COUNT // max(1, count))


@contextmanager
def _in_this_process(capacity: Capacity) -> Iterator[Place]:
    options = {"protocol": "inproc", "dashboard": False}
    workers = {0: {"cls": QuietWorker, "options": {**options, "nthreads": capacity.slots, "memory_limit": 0}}}
    with _cluster(workers, options, None) as client:
        yield Place(client, capacity)


@contextmanager
def _in_processes(capacity: Capacity, environments: list[dict[str, str]]) -> Iterator[Place]:
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
    with _cluster(workers, options, security) as client:
        yield Place(client, capacity)


@contextmanager
def _cluster(workers: dict[int, Any], options: dict[str, Any], security: Security | None) -> Iterator[Client]:
    hush()
    scheduler = {"cls": QuietScheduler, "options": options}
    with (
        dask.config.set(_SETTINGS),
        SpecCluster(workers=workers, scheduler=scheduler, security=security) as cluster,
        Client(cluster, security=security) as client,
    ):
        yield client


def hush() -> None:
    """Silence Dask and what it stands on: they tell at length what is told here in one line, and of slow farewells."""
    for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


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
