"""Where work runs: in this process, in N local ones or one a GPU (`processes.py`), or on a cluster (`cluster.py`).

A place is a context manager that yields a `Place`. The one in this process is threads and no more: Dask there would
cost a slide 15 ms, and each run the second that its import takes.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from wsi_idc.cores import cores
from wsi_idc.errors import UsageError
from wsi_idc.settings import PlaceSettings
from wsi_idc.work.jobs import Capacity, Place, Tell


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
    from wsi_idc.work.processes import in_processes

    environments = [{"CUDA_VISIBLE_DEVICES": name} for name in visible_gpus(gpus)] if gpus else [{}] * workers
    return in_processes(capacity, environments)


def threads_of(count: int, asked: int = 0) -> int:
    """CPU threads that one task may use, when the cores are shared evenly by `count` workers."""
    return asked or max(1, cores() // max(1, count))


class _Here(Place):
    """Threads of this process, a slot each; what waits is few, and begins in the order in which it was handed out."""

    def __init__(self, executor: ThreadPoolExecutor, capacity: Capacity) -> None:
        super().__init__(capacity)
        self._executor = executor

    def submit(self, urgency: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """See `Place.submit`."""
        return self._executor.submit(function, *arguments)

    @contextmanager
    def telling(self, told: Tell) -> Iterator[Tell]:
        """See `Place.telling`: by a call, from the thread of the task."""
        yield told


@contextmanager
def _in_this_process(capacity: Capacity) -> Iterator[Place]:
    executor = ThreadPoolExecutor(capacity.slots, thread_name_prefix="task")
    try:
        yield _Here(executor, capacity)
    finally:
        # What still runs may write: the store is not given back before it has ended.
        executor.shutdown(cancel_futures=True)


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
