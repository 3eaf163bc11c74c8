"""Jobs run to their outcome, whatever becomes of the others, wherever they run."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from wsi_idc.errors import SlideError, StoreWriteError
from wsi_idc.plan import Plan
from wsi_idc.work import places
from wsi_idc.work.jobs import Block, Outcome, Prepared, Supply, carry_out, run_jobs


class StubbornError(Exception):
    """Cannot be unpickled: its constructor wants what pickle does not give."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


@dataclass(frozen=True)
class Sum:
    """Adds up the numbers of its blocks; can be told to misbehave."""

    job_id: str
    blocks: int = 3
    misbehave: str = ""
    notes: str = ""

    @property
    def names(self):
        return (self.job_id,)

    def prepare(self, work):
        if self.misbehave == "prepare":
            raise SlideError(self.job_id, "cannot be opened")
        return Prepared([Block(n, n + 1) for n in range(self.blocks)], self.blocks, {"times": 10})

    def run(self, block, info, work):
        work.report(1)
        if self.notes:
            Path(self.notes, f"{self.job_id}-{block.start}").touch()
        if self.misbehave == "block" and block.start == 1:
            raise SlideError(self.job_id, "block 1 is broken")
        if self.misbehave == "defect":
            raise ZeroDivisionError("oops")
        if self.misbehave == "stubborn":
            raise SlideError(self.job_id, "no codec") from StubbornError(1, "deflate")
        if self.misbehave == "stubborn itself":
            raise StubbornError(1, "deflate")
        if self.misbehave == "memory":
            raise MemoryError
        if self.misbehave == "stale":
            raise OSError(116, "Stale file handle", "/slides/a.svs")
        if self.misbehave == "disk":
            raise OSError(28, "No space left on device", "/store")
        if self.misbehave == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return block.start * info["times"]

    def finish(self, prepared, results, work):
        if self.misbehave == "finish":
            raise SlideError(self.job_id, "cannot be committed")
        return Outcome("done", tiles=sum(results))

    def hindrances(self):
        return []

    def fail(self, reason):
        if self.misbehave == "disk":
            raise OSError(28, "No space left on device")
        if self.notes:
            Path(self.notes, self.job_id).write_text(reason)


PLACES = {"here": {}, "here, two at once": {"overlap": 2}, "processes": {"workers": 2}}


@pytest.mark.parametrize("where", PLACES)
def test_every_job_ends_in_its_own_way(where, recorder, tmp_path):
    jobs = [
        Sum("a"),
        Sum("b", blocks=0),
        Sum("c", 4, "block", str(tmp_path)),
        Sum("d", 1, "prepare"),
        Sum("e", 2, "finish"),
        Sum("f", 1, "defect"),
        Sum("g", 1, "stale"),
        Sum("h", blocks=5),
        Sum("i", 1, "stubborn"),
        Sum("j", 1, "stubborn itself"),
        Sum("k", 1, "memory"),
    ]
    summary = carry_out(places.local(**PLACES[where]), {}, jobs, recorder(["x"]))
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
        "g": "Stale file handle (/slides/a.svs)",
        "i": "no codec",
        "j": "StubbornError: 1: deflate; this looks like a defect, please report it",
        "k": "out of memory; try fewer workers, or give each more memory, or a smaller --batch-size",
    }
    assert (tmp_path / "c").read_text() == "block 1 is broken"
    assert recorder.outcomes == summary.outcomes
    assert (summary.done, summary.tiles) == (3, 130)
    assert "ZeroDivisionError: oops" in summary.outcomes["f"].detail
    assert "in run" in summary.outcomes["f"].detail


def test_jobs_may_come_while_others_run(recorder):
    supply = Supply([Sum("a")], closed=False)

    class Filling(type(recorder)):
        def ended(self, job_id, outcome):
            super().ended(job_id, outcome)
            if job_id == "a":
                supply.put(Sum("b", blocks=1))
                supply.put(Sum("c", blocks=0))
            if len(self.outcomes) == 3:
                supply.close()

    listener = Filling()
    with places.local(overlap=2) as place:
        outcomes = run_jobs(place, supply, listener)
    assert {name: outcome.tiles for name, outcome in outcomes.items()} == {"a": 30, "b": 0, "c": 0}
    assert supply.ended


def test_a_supply_that_is_shut_gives_nothing_more():
    supply = Supply([Sum("a"), Sum("b")], closed=False)
    assert supply.take().job_id == "a" and supply.waiting == 1
    supply.shut()
    supply.put(Sum("c"))
    assert supply.take() is None and supply.ended


def test_where_only_some_may_begin_the_others_wait():
    free = [True]
    supply = Supply([Sum("a"), Sum("b")], may_begin=lambda: free[0])
    supply.when_taken(free.clear)
    taken = supply.take()
    free.append(False)
    assert taken.job_id == "a" and supply.take() is None and not supply.ended
    free[0] = True
    assert supply.take().job_id == "b" and supply.ended


def test_what_is_left_of_a_job_that_failed_is_never_begun(recorder, tmp_path):
    summary = carry_out(places.local(), {}, [Sum("c", 100, "block", str(tmp_path))], recorder(["x"]))
    assert summary.failures == {"c": "block 1 is broken"}
    assert len(list(tmp_path.glob("c-*"))) <= 4


@pytest.mark.parametrize("where", [{}, {"workers": 1}], ids=["here", "a process"])
def test_a_full_disk_ends_the_run_and_nothing_more_is_begun(where, recorder, tmp_path):
    jobs = [Sum("good"), Sum("full", 2, "disk")] + [Sum(f"later-{n}", notes=str(tmp_path)) for n in range(50)]
    with pytest.raises(StoreWriteError, match=r"No space left on device \(/store\); make room"):
        carry_out(places.local(**where), {}, jobs, recorder(["x"]))
    assert recorder.outcomes["good"].status == "done"
    assert len(list(tmp_path.iterdir())) < 10


def test_a_job_that_kills_its_worker_is_named_and_the_innocent_are_done(recorder, tmp_path):
    jobs = [Sum(f"good-{n}") for n in range(6)] + [Sum("bad", 2, "die", str(tmp_path))] + [Sum("last")]
    summary = carry_out(places.local(workers=2), {}, jobs, recorder(["x"]))
    assert list(summary.failures) == ["bad"]
    assert "worker process died" in summary.failures["bad"]
    assert (tmp_path / "bad").exists()
    assert summary.done == 7


def test_nothing_is_started_for_nothing(recorder):
    class Nowhere:
        def __enter__(self):
            pytest.fail("started")

        def __exit__(self, *_):
            pytest.fail("ended")

    summary = carry_out(Nowhere(), {"a": Plan("skip", "already done")}, [], recorder([]))
    assert (summary.outcomes, summary.skipped) == ({}, 1)


def test_the_client_is_told_of_tiles_as_they_are_done(recorder):
    told = []
    recorder.advanced = lambda job_id, tiles: told.append((job_id, tiles))
    carry_out(places.local(workers=1), {}, [Sum("a"), Sum("b", 2)], recorder(["x"]))
    assert set(told) <= {("a", 1), ("b", 1)} and told
