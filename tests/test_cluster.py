"""Jobs run to their outcome, whatever becomes of the others."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from wsi_idc.cluster import Block, Outcome, Prepared, Workers, execute, threads_per_task, visible_gpus
from wsi_idc.errors import SlideError, UsageError


@dataclass(frozen=True)
class Sum:
    """Adds up the numbers of its blocks; can be told to misbehave."""

    job_id: str
    blocks: int = 3
    misbehave: str = ""
    notes: str = ""

    def prepare(self):
        if self.misbehave == "prepare":
            raise SlideError(self.job_id, "cannot be opened")
        return Prepared([Block(n, n + 1) for n in range(self.blocks)], self.blocks, {"times": 10})

    def run(self, block, info):
        if self.misbehave == "block" and block.start == 1:
            raise SlideError(self.job_id, "block 1 is broken")
        if self.misbehave == "defect":
            raise ZeroDivisionError("oops")
        if self.misbehave == "disk":
            raise OSError(28, "No space left on device", "/store")
        if self.misbehave == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return block.start * info["times"]

    def finish(self, prepared, results):
        if self.misbehave == "finish":
            raise SlideError(self.job_id, "cannot be committed")
        return Outcome("done", tiles=sum(results))

    def fail(self, reason):
        if self.misbehave == "disk":
            raise OSError(28, "No space left on device")
        if self.notes:
            Path(self.notes, self.job_id).write_text(reason)


@pytest.mark.parametrize("workers", [Workers(), Workers(threads=2), Workers(processes=2)])
def test_every_job_ends_in_its_own_way(workers, recorder, tmp_path):
    jobs = [
        Sum("a"),
        Sum("b", blocks=0),
        Sum("c", 4, "block", str(tmp_path)),
        Sum("d", 1, "prepare"),
        Sum("e", 2, "finish"),
        Sum("f", 1, "defect"),
        Sum("g", 1, "disk"),
        Sum("h", blocks=5),
    ]
    summary = execute(workers, {}, jobs, recorder(["x"]))
    assert {name: outcome.tiles for name, outcome in summary.outcomes.items() if outcome.status == "done"} == {
        "a": 30,
        "b": 0,
        "h": 100,
    }
    assert summary.failures == {
        "c": "block 1 is broken",
        "d": "cannot be opened",
        "e": "cannot be committed",
        "f": "ZeroDivisionError: oops; this looks like a defect, please report it",
        "g": "No space left on device (/store)",
    }
    assert (tmp_path / "c").read_text() == "block 1 is broken"
    assert recorder.outcomes == summary.outcomes
    assert (summary.done, summary.tiles) == (3, 130)


def test_a_job_that_kills_its_worker_is_named_and_the_innocent_are_done(recorder, tmp_path):
    jobs = [Sum(f"good-{n}") for n in range(6)] + [Sum("bad", 2, "die", str(tmp_path))] + [Sum("last")]
    summary = execute(Workers(processes=2), {}, jobs, recorder(["x"]))
    assert list(summary.failures) == ["bad"]
    assert "worker process died" in summary.failures["bad"]
    assert (tmp_path / "bad").exists()
    assert summary.done == 7


def test_nothing_is_started_for_nothing(recorder, monkeypatch):
    monkeypatch.setattr("wsi_idc.cluster.connect", lambda workers: pytest.fail("started"))
    assert execute(Workers(), {}, [], recorder([])).outcomes == {}


@pytest.mark.parametrize("workers", [Workers(), Workers(processes=2)])
def test_what_listens_does_so_on_the_loopback_address_alone(workers):
    from wsi_idc.cluster import connect

    with connect(workers) as client:
        own = {str(os.getpid()), *map(str, client.run(os.getpid).values())}
        links = [link for process in own for link in Path("/proc", process, "fd").iterdir() if link.is_symlink()]
        sockets = {str(link.readlink()) for link in links if link.is_symlink()}
        tables = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
        listening = [row[1].split(":")[0] for row in tables if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert listening
    assert set(listening) <= {"0100007F"}


def test_asking_for_gpus_that_are_not_there_is_one_line(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(1) == ["0"]
    with pytest.raises(UsageError, match="2 asked for, 1 found"):
        visible_gpus(2)


def test_an_existing_mask_of_gpus_is_respected(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert visible_gpus(2) == ["3", "GPU-abc"]


def test_gpu_workers_get_one_device_each_before_they_start(recorder, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    summary = execute(Workers(gpus=2), {}, [Device(f"d{n}") for n in range(8)], recorder(["x"]))
    assert {outcome.warnings[0] for outcome in summary.outcomes.values()} <= {"5", "7"}
    assert summary.done == 8


@dataclass(frozen=True)
class Device:
    """Says which device its worker sees."""

    job_id: str

    def prepare(self):
        return Prepared([], 0)

    def run(self, block, info):
        raise AssertionError

    def finish(self, prepared, results):
        return Outcome("done", warnings=(os.environ["CUDA_VISIBLE_DEVICES"],))

    def fail(self, reason):
        pass


def test_cores_are_shared_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads_per_task(Workers()) == 8
    assert threads_per_task(Workers(processes=3)) == 2
    assert threads_per_task(Workers(processes=99)) == 1
    assert threads_per_task(Workers(), asked=5) == 5
