"""A cluster that somebody else started: who may work, and what becomes of slides when parts of it are lost."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.conftest import Recorder
from tests.work.clusters import Cluster, shadow
from tests.work.standin import StandIn
from tests.work.test_jobs import Sum
from wsi_idc.errors import ClusterError, UsageError, WorkersError
from wsi_idc.store import open_store
from wsi_idc.work import cluster
from wsi_idc.work.jobs import Supply, run_jobs


@pytest.fixture
def started(tmp_path):
    """Starts clusters."""
    made = []

    def start(workers=0, *options, **environment):
        made.append(Cluster(tmp_path / f"cluster{len(made)}", **environment))
        made[-1].add(workers, *options)
        return made[-1]

    yield start
    for one in made:
        one.close()


@contextlib.contextmanager
def place_at(one, jobs=(), wait=30.0, gpus=0, threads=0):
    with cluster.at("", one.file, wait=wait, gpus=gpus, threads=threads) as place:
        place.admit(jobs)
        yield place


def cohort(folder, make, count):
    """So many small slides, and their manifest."""
    lines = ["path"]
    for number in range(count):
        make.tissue_slide(folder / f"s{number:02}.tif", 700, 600, seed=number)
        lines.append(f"s{number:02}.tif")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def arrays(address):
    """Every array of a store: its path and its values."""
    found = {}

    def walk(group, path):
        for name, member in group.members():
            if isinstance(member, zarr.Group):
                walk(member, f"{path}{name}/")
            else:
                found[f"{path}{name}"] = member[...]

    walk(zarr.open_group(address, mode="r"), "")
    return found


def assert_same_arrays(one, other):
    first, second = arrays(one), arrays(other)
    assert first.keys() == second.keys() and len(first) > 10
    for name, values in first.items():
        assert values.dtype == second[name].dtype
        assert np.array_equal(values, second[name], equal_nan=values.dtype.kind == "f"), name


def undisturbed(wsi_idc, manifest, bundle):
    """The store that one process makes."""
    address = manifest.parent / "undisturbed.zarr"
    for command in (["extract", manifest], ["infer", "--model", bundle]):
        result = wsi_idc(*command, "--store", address)
        assert result.returncode == 0, result.stderr
    return address


def test_a_cluster_makes_the_store_that_one_process_makes(started, wsi_idc, make, tmp_path, bundle):
    manifest = cohort(tmp_path, make, 4)
    one = started(2)
    # Run from the store's folder, by a relative address: workers work elsewhere.
    extracted = wsi_idc("extract", manifest, "--scheduler-file", one.file, "--json", cwd=tmp_path)
    assert extracted.returncode == 0, extracted.stderr
    scored = wsi_idc("infer", "--model", "bundle", "--scheduler-file", one.file, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert scored.stdout.splitlines()[-1].split()[:4] == ["4", "0", "0", "320"]
    assert_same_arrays(tmp_path / "tiles.zarr", undisturbed(wsi_idc, manifest, bundle))


def kill_in_turn(one, address, models, every, stop):
    """SIGKILL each worker in turn, the next one whenever so many more results are there."""
    turn = 0
    while not stop.is_set():
        done = 0
        with contextlib.suppress(Exception):
            store = open_store(address)
            done = sum(store.map_node("mean", name).record().usable for name in store.slide_ids()) if models else 0
            done = done or len(store.slide_ids())
        if done >= every * (turn + 1) and turn < len(one.workers):
            one.kill_worker(turn)
            turn += 1
        time.sleep(0.05)
    return turn


def run_while_workers_die(one, wsi_idc, address, command, every, models=False):
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=lambda: killed.append(kill_in_turn(one, address, models, every, stop)))
    killer.start()
    result = wsi_idc(*command, "--store", address, "--scheduler-file", one.file)
    stop.set()
    killer.join()
    assert result.returncode == 0, result.stderr
    return killed[0]


def test_a_worker_that_is_killed_costs_no_slide(started, wsi_idc, make, tmp_path, bundle):
    manifest, address = cohort(tmp_path, make, 8), tmp_path / "tiles.zarr"
    one = started(2)
    assert run_while_workers_die(one, wsi_idc, address, ["extract", manifest], 2) >= 1
    result = wsi_idc("infer", "--model", bundle, "--store", address, "--scheduler-file", one.file)
    assert result.returncode == 0, result.stderr
    assert_same_arrays(address, undisturbed(wsi_idc, manifest, bundle))


@pytest.mark.slow
def test_fifty_slides_while_each_of_three_workers_is_killed_in_turn(started, wsi_idc, make, tmp_path, bundle):
    manifest, address = cohort(tmp_path, make, 50), tmp_path / "tiles.zarr"
    one = started(3)
    assert run_while_workers_die(one, wsi_idc, address, ["extract", manifest], 10) == 3
    assert run_while_workers_die(one, wsi_idc, address, ["infer", "--model", bundle], 10, models=True) == 3
    assert_same_arrays(address, undisturbed(wsi_idc, manifest, bundle))


@pytest.mark.slow
def test_workers_that_retire_give_their_slides_back(started, recorder, tmp_path):
    one = started(2, "--lifetime", "8 seconds", "--lifetime-stagger", "2 seconds", "--lifetime-restart")
    jobs = [Slow(f"j{number}") for number in range(24)]
    with place_at(one, jobs, wait=60) as place:
        outcomes = run_jobs(place, Supply(jobs), recorder)
    assert [outcome.status for outcome in outcomes.values()] == ["done"] * 24


class Slow(Sum):
    """A job whose blocks take a while."""

    def run(self, block, info, work):
        time.sleep(0.3)
        return super().run(block, info, work)


@pytest.mark.slow
def test_of_a_slide_that_kills_its_workers_the_others_do_not_suffer(started, recorder):
    one = started(2)
    jobs = [Sum("a"), Sum("poison", misbehave="die"), *(Sum(f"j{number}") for number in range(6))]
    with place_at(one, jobs) as place:
        outcomes = run_jobs(place, Supply(jobs), recorder)
    assert {name for name, outcome in outcomes.items() if outcome.status == "failed"} == {"poison"}
    assert outcomes["poison"].reason.endswith(", each time")
    assert len(outcomes) == 8


@pytest.mark.slow
def test_a_scheduler_that_is_lost_ends_the_run_and_the_same_command_goes_on(started, wsi_idc, make, tmp_path):
    manifest, address = cohort(tmp_path, make, 12), tmp_path / "tiles.zarr"
    one = started(1)
    command = [sys.executable, "-m", "wsi_idc.cli", "extract", manifest, "--store", address]
    process = subprocess.Popen(
        [*map(str, command), "--scheduler-file", one.file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("done")
    one.scheduler.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1 and "the scheduler is lost" in errors
    finished = len(open_store(address).slide_ids())
    assert 1 <= finished < 12
    again = wsi_idc("extract", manifest, "--store", address, "--scheduler-file", started(1).file)
    assert again.returncode == 0, again.stderr
    # The lost worker may have finished the slide that it had.
    assert 12 - finished - 1 <= int(again.stdout.splitlines()[-1].split()[0]) <= 12 - finished


@pytest.mark.slow
def test_a_run_whose_workers_are_all_gone_does_not_wait_for_ever(started, recorder):
    one = started(1, "--no-nanny")
    jobs = [Sum("poison", misbehave="die"), Sum("a")]
    with place_at(one, jobs, wait=30) as place:
        place._wait = 3
        with pytest.raises(ClusterError, match="no worker is left, and none came within 3 s"):
            run_jobs(place, Supply(jobs), recorder)


@pytest.mark.slow
def test_who_comes_later_is_given_work_if_it_fits(started, recorder, tmp_path):
    one = started(1)
    jobs = [Slow(f"j{number}") for number in range(16)]

    def join():
        one.add(1, PYTHONPATH=f"{shadow(tmp_path / 'other', 'zarr', '3.0.0')}:{one_path()}")
        one.add(1)

    with place_at(one, jobs) as place:
        threading.Thread(target=join).start()
        outcomes = run_jobs(place, Supply(jobs), recorder)
        assert place.capacity.workers == 2
        assert len(place.workers) == 2
        assert [note.partition(": ")[2] for note in place.notes] == [
            f"zarr 3.0.0, here it is {zarr.__version__}"
        ] and "was given no work" in place.notes[0]
    assert [outcome.status for outcome in outcomes.values()] == ["done"] * 16


def one_path():
    from tests.work.clusters import REPOSITORY

    return str(REPOSITORY)


@pytest.mark.slow
def test_nobody_answers_or_nobody_works_is_one_line(started, wsi_idc, make, tmp_path):
    manifest = cohort(tmp_path, make, 1)
    one = started(0)

    def refused(*options):
        result = wsi_idc("extract", manifest, "--store", tmp_path / "tiles.zarr", *options)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    assert "no worker at tcp://127.0.0.1:" in refused("--scheduler-file", one.file, "--wait", "1")
    assert "no scheduler answers at tcp://127.0.0.1:9" in refused("--scheduler", "tcp://127.0.0.1:9", "--wait", "1")
    assert "no scheduler answers at nonsense://" in refused("--scheduler", "nonsense://", "--wait", "1")
    assert "no scheduler answers at nobody.invalid:1" in refused("--scheduler", "nobody.invalid:1", "--wait", "1")
    assert "give it as --scheduler-file" in refused("--scheduler", one.file)
    assert "no address in it (No such file" in refused("--scheduler-file", tmp_path / "none.json", "--wait", "0")
    assert "no address in it" in refused("--scheduler-file", manifest, "--wait", "0")
    assert "cannot go with" in refused("--scheduler-file", one.file, "--scheduler", "tcp://127.0.0.1:9")
    assert "cannot go with" in refused("--scheduler-file", one.file, "--workers", "2")


def test_a_scheduler_of_another_dask_is_refused(started, tmp_path):
    one = started(1, PYTHONPATH=shadow(tmp_path / "other", "distributed", "2020.1.0"))
    with pytest.raises(UsageError, match=r"runs Dask 2020\.1\.0, this is 20"), place_at(one):
        pass


def test_a_scheduler_without_wsi_idc_is_refused_and_fails_no_slide(started, tmp_path):
    absent = tmp_path / "absent" / "wsi_idc"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'wsi_idc'\")\n")
    one = started(1, PYTHONPATH=str(absent.parent))
    with pytest.raises(UsageError, match="has no wsi-idc"), place_at(one, [Sum("a")]):
        pass


class Hanging(Sum):
    """Hinders whoever is told to by its environment, for a while: a mount that hangs."""

    def hindrances(self):
        time.sleep(float(os.environ.get("TEST_HANGS", "0")))
        return []


@pytest.mark.slow
def test_a_worker_that_does_not_answer_holds_up_nobody_else(started, recorder, tmp_path):
    one = started(1)
    jobs = [Hanging(f"j{number}", notes=str(tmp_path)) for number in range(6)]
    with place_at(one, jobs) as place:
        one.add(1, TEST_HANGS="3600")
        place.client.wait_for_workers(2, timeout=30)
        outcomes = run_jobs(place, Supply(jobs), recorder)
        assert len(place.workers) == 1
    assert [outcome.status for outcome in outcomes.values()] == ["done"] * 6


def test_every_worker_that_does_not_fit_is_named_with_what_is_wrong(started, tmp_path, monkeypatch):
    absent = tmp_path / "absent" / "wsi_idc"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'wsi_idc'\")\n")
    one = started(1)
    one.add(1, PYTHONPATH=str(absent.parent))
    one.add(1, PYTHONPATH=f"{shadow(tmp_path / 'other', 'openvino', '1.0.0')}:{one_path()}")
    with cluster.at("", one.file, wait=30, gpus=0, threads=0) as place:
        place.client.wait_for_workers(3, timeout=30)
        with pytest.raises(WorkersError) as caught:
            place.admit([Sum("a")])
    assert len(caught.value.faults) == 2
    text = str(caught.value)
    assert "wsi-idc cannot be imported there (ModuleNotFoundError" in text
    assert "openvino 1.0.0, here it is" in text
    assert caught.value.exit_code == 2


def test_a_worker_without_a_gpu_is_named(started):
    one = started(1)
    with pytest.raises(WorkersError, match="it sees no GPU"), place_at(one, [Sum("a")], gpus=1):
        pass


@pytest.mark.slow
def test_a_worker_that_sees_no_store_slide_or_model_is_named(started, wsi_idc, make, tmp_path):
    """Its own working folder, seen by all under one path, stands for a disk that only the client has."""
    one = started(1)
    home = tmp_path / "home"
    home.mkdir()
    cohort(home, make, 1)
    make.write_bundle(home / "bundle")
    own = "/proc/self/cwd"

    def refused(*command):
        result = wsi_idc(*command, "--scheduler-file", one.file, cwd=home)
        assert result.returncode == 2, result.stderr
        return result.stderr

    lines = refused("extract", "manifest.csv", "--store", f"{own}/tiles.zarr")
    assert f"{own}/tiles.zarr: the store is not there" in lines
    (home / "elsewhere.csv").write_text(f"path,slide_id\n{own}/s00.tif,a\n")
    lines = refused("extract", "elsewhere.csv")
    assert f"{own}/s00.tif: " in lines and "give workers the same slides" in lines
    (one.folder / "s00.tif").write_bytes(b"another")
    assert "it is another file there" in refused("extract", "elsewhere.csv")
    assert open_store(home / "tiles.zarr").all_slide_ids() == []

    assert wsi_idc("extract", "manifest.csv", cwd=home).returncode == 0
    assert f"{own}/bundle: no bundle.json there" in refused("infer", "--model", f"{own}/bundle")
    make.write_bundle(one.folder / "bundle", size_px=40)
    assert "it is another model there" in refused("infer", "--model", f"{own}/bundle")
    assert open_store(home / "tiles.zarr").backing.folders("maps/mean") == []


def test_a_store_that_a_worker_may_not_write_is_named(started, wsi_idc, make, tmp_path):
    from wsi_idc.store import hold_store
    from wsi_idc.work.cut import unseen_store

    with hold_store(tmp_path / "tiles.zarr", create=True) as held:
        assert unseen_store(held.ticket) == []
        lease = tmp_path / "tiles.zarr" / "lease"
        holder = (lease / "holder.json").read_bytes()
        # Who is root may write everywhere: a lease folder that is a file takes nothing from anybody.
        lease.rename(tmp_path / "kept")
        lease.mkdir()
        (lease / "holder.json").write_bytes(holder)
        lease.chmod(0o500)
        if os.getuid():
            assert "Permission denied" in unseen_store(held.ticket)[0]
        (lease / "holder.json").unlink()
        assert "the store is not there" in unseen_store(held.ticket)[0]


def test_threads_are_what_a_machines_cores_give_each_task():
    place = cluster.ClusterPlace(None, "x", until=0, wait=0, gpus=0, threads=0)

    def seen(host, cores):
        return cluster.Seen(host, frozenset(cores), {}, "", ())

    place._seen = {"a": seen("n1", range(8)), "b": seen("n1", range(8)), "c": seen("n2", range(16))}
    place._measure({"a": 1, "b": 1, "c": 2})
    assert (place.capacity.workers, place.capacity.slots, place.capacity.threads) == (3, 4, 4)
    # Workers that the system pins to cores of their own share none.
    place._seen["b"] = seen("n1", range(8, 16))
    place._measure({"a": 1, "b": 1, "c": 2})
    assert place.capacity.threads == 8
    place._measure({"a": 99})
    assert place.capacity.threads == 1


@pytest.mark.slow
def test_two_thousand_slides_leave_the_clients_memory_as_it_was(started):
    """What each costs, `make bench-cluster` says."""
    one = started(2)
    jobs = [StandIn(f"s{number}") for number in range(2000)]
    memory = []

    class Listener(Recorder):
        def ended(self, job_id, outcome):
            super().ended(job_id, outcome)
            if len(self.outcomes) in (200, 2000):
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    listener = Listener()
    with place_at(one, jobs) as place:
        outcomes = run_jobs(place, Supply(jobs), listener)
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    assert list(listener.outcomes) == list(dict.fromkeys(listener.outcomes)) and len(outcomes) == 2000
    assert memory[1] - memory[0] < 32 * 2**20
