"""A Dask cluster of real processes, started as a user starts one, on loopback; killed at the end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

DASK = Path(sys.executable).with_name("dask")
REPOSITORY = Path(__file__).parents[2]


class Cluster:
    """A scheduler and workers; `folder` takes their files, and is where workers work."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.folder.mkdir(exist_ok=True)
        self.file = folder / "scheduler.json"
        self.workers: list[subprocess.Popen] = []
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", self.file, **environment)
        _until(self.file.exists, self.scheduler)

    def add(self, count: int = 1, *options: object, core: int | None = None, **environment: str) -> None:
        """Start workers of one thread each; on one core, where it is named, as a batch system would have it."""
        for _ in range(count):
            where = ("--scheduler-file", self.file, "--nthreads", "1", "--local-directory", self.folder / "scratch")
            self.workers.append(self._start("worker", *where, *options, core=core, **environment))

    def _start(self, part: str, *options: object, core: int | None = None, **environment: str) -> subprocess.Popen:
        pinned = [] if core is None else ["taskset", "--cpu-list", core]
        command = [*pinned, DASK, part, "--host", "127.0.0.1", "--no-dashboard", *options]
        # Test jobs are pickled by name: workers must be able to import them.
        environment = {"PYTHONPATH": str(REPOSITORY), **environment}
        with (self.folder / f"{part}.log").open("a") as log:
            return subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=os.environ | environment,
                start_new_session=True,
            )

    def kill_worker(self, index: int) -> None:
        """SIGKILL a worker process; where it has a nanny, that starts another."""
        for child in children(self.workers[index].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def close(self) -> None:
        """End all of it."""
        for process in [*self.workers, self.scheduler]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def children(pid: int) -> list[int]:
    """Processes that a process started with Python's multiprocessing, but for its resource tracker."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _until(condition, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{process.args} did not start")
        time.sleep(0.1)


def shadow(folder: Path, package: str, version: str) -> str:
    """A folder to put on PYTHONPATH, that makes a package say that it is of another version."""
    from importlib.metadata import distribution

    about = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(distribution(package).read_text("entry_points.txt") or "")
    return str(folder)
