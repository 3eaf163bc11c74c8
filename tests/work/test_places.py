"""Where work runs: who may use it, what it opens, what it offers."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from wsi_idc.errors import UsageError
from wsi_idc.work import places
from wsi_idc.work.jobs import Outcome, Prepared, carry_out


def listening(processes):
    """Addresses (hexadecimal) on which these processes listen."""
    links = [link for process in processes for link in Path("/proc", str(process), "fd").iterdir() if link.is_symlink()]
    sockets = {str(link.readlink()) for link in links if link.is_symlink()}
    tables = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
    return [row[1].split(":")[0] for row in tables if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def test_work_in_this_process_opens_no_port():
    before = listening([os.getpid()])
    with places.local():
        assert listening([os.getpid()]) == before


def test_processes_listen_on_the_loopback_address_alone_and_serve_no_pages():
    before = len(listening([os.getpid()]))
    with places.local(workers=2) as place:
        workers = list(place.client.run(os.getpid).values())
        found = listening([os.getpid(), *workers])
        assert set(found) == {"0100007F"}
        # The scheduler, two nannies and two workers have a port each, and no HTTP port beside it.
        assert len(found) - before == 5
        assert place.client.scheduler_info()["services"] == {}


def test_a_scheduler_takes_work_from_nobody_else():
    from distributed import Client, Security

    with places.local(workers=1) as place:
        address = place.client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        with pytest.raises(OSError):
            Client(address.replace("tls://", "tcp://"), timeout=2)
        with pytest.raises((OSError, TypeError, ValueError)):
            Client(address, security=Security.temporary(), timeout=2)


@dataclass(frozen=True)
class Device:
    """Says which device its worker sees."""

    job_id: str

    @property
    def names(self):
        return (self.job_id,)

    def prepare(self, work):
        assert work.capacity.gpu
        return Prepared([], 0)

    def run(self, block, info, work):
        raise AssertionError

    def finish(self, prepared, results, work):
        return Outcome("done", warnings=(os.environ["CUDA_VISIBLE_DEVICES"],))

    def hindrances(self):
        return []

    def fail(self, reason):
        pass


def test_asking_for_gpus_that_are_not_there_is_one_line(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places.visible_gpus(1) == ["0"]
    with pytest.raises(UsageError, match="2 asked for, 1 found"):
        places.local(gpus=2)


def test_an_existing_mask_of_gpus_is_respected(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert places.visible_gpus(2) == ["3", "GPU-abc"]


def test_gpu_workers_get_one_device_each_before_they_start(recorder, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    summary = carry_out(places.local(gpus=2), {}, [Device(f"d{n}") for n in range(8)], recorder(["x"]))
    assert {outcome.warnings[0] for outcome in summary.outcomes.values()} <= {"5", "7"}
    assert summary.done == 8


def test_cores_are_shared_evenly(monkeypatch):
    monkeypatch.setattr(places, "cores", lambda: 8)
    assert places.threads_of(0) == 8
    assert places.threads_of(3) == 2
    assert places.threads_of(99) == 1
    assert places.threads_of(0, asked=5) == 5
