"""Work on a Dask cluster that somebody else started: who is there, whether each worker could do it, and who is lost.

Nothing of the cluster is changed, and nothing is left in it: no plugin, no setting, no file.
"""

import asyncio
import json
import os
import platform
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from wsi_idc.cores import cores
from wsi_idc.errors import ClusterError, UsageError, WorkersError
from wsi_idc.work.jobs import Capacity, Job, Place
from wsi_idc.work.processes import DaskPlace, hush

PACKAGES = ("wsi-idc", "dask", "distributed", "zarr", "numpy", "openvino", "torch")
"""What must be the same everywhere: a map made by several workers is one result."""
_LOOKED_AT = 3
"""Of the jobs: the first are what a worker is asked about."""
_ANSWER_S = 60.0
"""For a worker to answer before work begins, after those that were waited for have come."""
_EVERY = 2.0
"""Seconds from one look at the cluster to the next."""


@dataclass(frozen=True)
class Seen:
    """What a worker says of itself.

    Attributes:
        host: its machine's name.
        cores: numbers of the CPU cores that it may run on.
        versions: of Python and `PACKAGES`; "none" where it has none.
        gpu: the name of its first GPU; "" where it has none, or was not asked.
        hindrances: why it could not do the jobs that it was asked about.
    """

    host: str
    cores: frozenset[int]
    versions: Mapping[str, str]
    gpu: str
    hindrances: tuple[str, ...]


def versions() -> dict[str, str]:
    """Of Python and `PACKAGES` in this process."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def look(jobs: Sequence[Job], *, gpu: bool) -> Seen:
    """Run on a worker: what it is, and what it sees of the work."""
    name = ""
    if gpu:
        import torch

        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    hindrances = dict.fromkeys(line for job in jobs for line in job.hindrances())
    return Seen(socket.gethostname(), _cores(), versions(), name, tuple(hindrances))


def _cores() -> frozenset[int]:
    """Cores that this process may run on, as the system pins it and a container's quota limits it."""
    count = cores()
    pinned = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(count)
    return frozenset(sorted(pinned)[:count])


@contextmanager
def at(address: str, file: Path | None, *, wait: float, gpus: int, threads: int) -> Iterator[Place]:
    """The cluster of a scheduler; its TLS comes from Dask's own configuration.

    Args:
        address: the scheduler's; "" where there is a file.
        file: what `dask scheduler --scheduler-file` wrote, or will have written.
        wait: seconds to wait for the scheduler, and for the first workers; and for any, once all are lost.
        gpus: workers with a GPU that there must be; 0: work on CPUs.
        threads: CPU threads of each task; 0 shares a machine's cores among its workers' slots.

    Raises:
        UsageError: no scheduler answers, or it is of another Dask.
    """
    from distributed import Client, Security

    hush()
    until = time.monotonic() + wait
    found = address or _read_address(file or Path(), until)
    name = found if address else f"{found} ({file})"
    if address and Path(address).is_file():
        raise UsageError("--scheduler", f"{address} is a file", "give it as --scheduler-file")
    security, patience = Security(), max(1.0, until - time.monotonic())
    try:
        # A client that could not be made says so again, at length, when the process ends: first see whether it could.
        asyncio.run(_reach(found, security, patience))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatched versions")
            client = Client(found, security=security, timeout=patience, set_as_default=False)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "check the address, that it runs, and Dask's TLS settings (DASK_DISTRIBUTED__COMM__TLS__*)"
        raise UsageError("--scheduler", f"no scheduler answers at {name} ({reason})", advice) from error
    try:
        yield ClusterPlace(client, name, until=until, wait=wait, gpus=gpus, threads=threads)
    finally:
        client.close(timeout=2)


async def _reach(address: str, security: Any, patience: float) -> None:
    """Connect to an address, and leave.

    Raises:
        OSError, ValueError, TypeError, RuntimeError: nobody answers there, or not in the way that is asked for.
    """
    from distributed.comm import connect

    connection = await connect(address, timeout=patience, **security.get_connection_args("client"))
    await connection.close()


def _read_address(file: Path, until: float) -> str:
    """The address in a scheduler's file, which may still have to be written."""
    while True:
        try:
            return str(json.loads(file.read_text())["address"])
        except FileNotFoundError as error:
            reason = str(error.strerror)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if time.monotonic() >= until:
            advice = "give what dask scheduler --scheduler-file writes, or wait longer (--wait)"
            raise UsageError("--scheduler-file", f"{file}: no address in it ({reason})", advice)
        time.sleep(0.2)


class ClusterPlace(DaskPlace):
    """A cluster, of which each worker is asked before it is given work, also one that comes later.

    Args:
        client: Dask's.
        name: the scheduler, as a user is told.
        until: time (monotonic) until which the first workers may come.
        wait: see `at`.
        gpus: see `at`.
        threads: see `at`.
    """

    def __init__(self, client: Any, name: str, *, until: float, wait: float, gpus: int, threads: int) -> None:
        super().__init__(client, Capacity(gpu=gpus > 0))
        self._name, self._until, self._wait, self._gpus, self._threads = name, until, wait, gpus, threads
        self._jobs: Sequence[Job] = ()
        self._seen: dict[str, Seen] = {}
        self._unfit: dict[str, list[str]] = {}
        self._asked: set[str] = set()
        self._watched = self._peopled = time.monotonic()
        # Two stages of a run share a place: one of them looks after it, and the other goes on.
        self._watching = threading.Lock()

    @property
    def notes(self) -> list[str]:
        """See `Place.notes`: who came while work was under way, and was given none."""
        return [f"worker {name} was given no work: {'; '.join(why)}" for name, why in self._unfit.items()]

    def admit(self, jobs: Sequence[Job]) -> None:
        """See `Place.admit`.

        Raises:
            UsageError: no worker came, or the scheduler is of another Dask.
            WorkersError: names each worker that does not fit, and why.
        """
        self._jobs = jobs[:_LOOKED_AT]
        self._check_scheduler()
        need = max(1, self._gpus)
        while True:
            fit = self._fit(self._slots())
            late = time.monotonic() - self._until
            if not self._asked and self._unfit:
                self._refuse(self._unfit)
            if not self._asked and len(fit) >= need:
                break
            if self._asked and late >= _ANSWER_S:
                self._refuse({name: [f"no answer within {_ANSWER_S:g} s"] for name in sorted(self._asked)})
            if not self._asked and late >= 0:
                what = f"{len(fit)} of {need} workers" if fit else "no worker"
                advice = "start workers, or wait longer (--wait)"
                raise UsageError("--scheduler", f"{what} at {self._name} within {self._wait:g} s", advice)
            time.sleep(0.1)
        self._measure(fit)

    def _refuse(self, workers: Mapping[str, Sequence[str]]) -> NoReturn:
        faults = [f"worker {name}: {why}" for name, whys in workers.items() for why in whys]
        raise WorkersError(f"--scheduler {self._name}", faults)

    def watch(self) -> None:
        """See `Place.watch`: asks those who came, and counts who is there.

        Raises:
            ClusterError: the scheduler is lost, or there was no worker for too long.
        """
        with self._watching:
            now = time.monotonic()
            if now < self._watched + _EVERY:
                return
            self._watched = now
        try:
            fit = self._fit(self._slots())
        except Exception as error:
            raise self.lost() from error
        if fit:
            self._peopled = now
            self._measure(fit)
        elif now > self._peopled + self._wait:
            problem = f"no worker is left, and none came within {self._wait:g} s"
            raise ClusterError(self._name, problem, "what was complete is kept: start workers, run the same command")

    def _slots(self) -> dict[str, int]:
        """Worker -> tasks that it runs at once."""
        return {str(worker): int(count) for worker, count in self.client.nthreads().items()}

    def _check_scheduler(self) -> None:
        """A scheduler unpickles what it is sent, so it needs the same Dask, and wsi-idc."""
        advice = "give scheduler, workers and client the same environment"
        theirs = self.client.get_versions()["scheduler"]["packages"]["distributed"]
        ours = version("distributed")
        if theirs != ours:
            raise UsageError("--scheduler", f"{self._name} runs Dask {theirs}, this is {ours}", advice)
        try:
            found = self.client.run_on_scheduler(versions)["wsi-idc"]
        except Exception as error:
            raise UsageError("--scheduler", f"{self._name} has no wsi-idc ({_line(error)})", advice) from error
        if found != versions()["wsi-idc"]:
            raise UsageError("--scheduler", f"{self._name} has wsi-idc {found}, this is another", advice)

    def _fit(self, slots: Mapping[str, int]) -> dict[str, int]:
        """Of the workers that are there, those that fit; those who came are asked."""
        self._asked &= set(slots)
        known = self._seen.keys() | self._unfit.keys() | self._asked
        if new := [worker for worker in slots if worker not in known]:
            self._asked |= set(new)
            for worker in new:
                # Each by itself: one that does not answer, for a mount that hangs, must not hold up the others.
                threading.Thread(target=self._ask, args=(worker,), name="ask", daemon=True).start()
        return {worker: count for worker, count in slots.items() if worker in self._seen}

    def _ask(self, worker: str) -> None:
        """Ask a worker what it is."""
        try:
            answers = self.client.run(look, self._jobs, gpu=self.capacity.gpu, workers=[worker], on_error="return")
        except Exception as error:
            answers = {worker: error}
        self._judge(worker, answers.get(worker))
        self._asked.discard(worker)

    def _judge(self, worker: str, answer: object) -> None:
        """Note whether a worker fits, by its answer."""
        from distributed.core import RPCClosed

        ours = versions()
        if isinstance(answer, Seen):
            found = answer.versions.items()
            why = [f"{name} {theirs}, here it is {ours[name]}" for name, theirs in found if theirs != ours[name]]
            why += answer.hindrances
            if self.capacity.gpu and not answer.gpu:
                why.append("it sees no GPU; start it with one, or leave --gpus out")
            if not why:
                self._seen[worker] = answer
        elif answer is None or isinstance(answer, OSError | RPCClosed):
            return  # It went while it was asked.
        elif "ModuleNotFoundError" in repr(answer):
            why = [f"wsi-idc cannot be imported there ({_line(answer)}); install the same environment"]
        else:
            why = [f"it cannot answer ({type(answer).__name__}: {_line(answer)})"]
        if why:
            self._unfit[worker] = why

    def _measure(self, slots: Mapping[str, int]) -> None:
        """What is offered: tasks at once, and threads for each, such that no machine is asked for more than it has."""
        cores: dict[str, frozenset[int]] = {}
        tasks: dict[str, int] = {}
        for worker, count in slots.items():
            seen = self._seen[worker]
            cores[seen.host] = cores.get(seen.host, frozenset()) | seen.cores
            tasks[seen.host] = tasks.get(seen.host, 0) + count
        threads = self._threads or max(1, min(len(cores[host]) // tasks[host] for host in cores))
        self.capacity = Capacity(len(slots), sum(slots.values()), threads, self._gpus > 0)
        # None but those who were asked: one that has just come would be given work before it has answered.
        self.workers = list(slots)

    def lost(self) -> ClusterError:
        """See `Place.lost`."""
        return ClusterError(self._name, "the scheduler is lost", "what was complete is kept: start it, run it again")


def _line(error: object) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())
