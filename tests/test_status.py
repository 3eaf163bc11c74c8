"""Status says what is there, what should be looked at, and how far a run is; it never writes."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from wsi_idc.cli import app
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.status import run_line, store_state
from wsi_idc.store import Holding, hold_store
from wsi_idc.work.jobs import Outcome
from wsi_idc.work.telling import Telling


@pytest.fixture
def store(slides, bundle, recorder, make):
    """Of the slides a and b with maps, one without tissue, and one that failed: the address."""
    make.tissue_slide(slides.parent / "empty.tif", 200, 200, 100)
    slides.write_text(slides.read_text() + "empty.tif,p4,south\n")
    path = slides.parent / "tiles.zarr"
    extract(read_manifest(slides), path, ExtractSettings(), listener=recorder)
    infer(path, read_bundle(bundle), InferSettings(), only=["a", "empty"], listener=recorder)
    return path


def status(store, *arguments):
    return CliRunner().invoke(app, ["status", *map(str, arguments), "--store", str(store)])


def test_totals_and_warnings(store):
    done = status(store)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[-2:] == [
        "4 slides: 3 extracted (72 tiles), 1 failed, 0 not yet; 1 with warnings, 3 flagged",
        "maps by mean: 2 current, 0 stale, 0 failed, 2 none",
    ]
    assert any(line.startswith("empty") and "warning: no tissue found; flag: no tissue: " in line for line in lines)
    events = [json.loads(line) for line in status(store, "--json").stdout.splitlines()]
    assert {event["slide_id"]: event["warnings"] for event in events[:-1]}["empty"] == ["no tissue found"]
    assert events[0]["maps"] == {"mean": {"kind": "current", "why": ""}}
    assert events[-1]["maps"] == {"mean": {"current": 2, "stale": 0, "failed": 0, "none": 2}}


def test_fail_exits_with_1_where_a_slide_or_a_map_failed_and_else_with_0(store, slides):
    assert status(store, "--fail").exit_code == 1
    slides.write_text("path\na.tif\nb.tif\nempty.tif\n")
    # What failed is no longer wanted.
    assert status(store, slides, "--fail").exit_code == 0
    with hold_store(store) as held:
        held.map_node("mean", "b").fail("out of memory")
    assert status(store, slides, "--fail").exit_code == 1
    assert "maps by mean: 2 current, 0 stale, 1 failed, 0 none" in status(store, slides).stdout


def test_the_slides_of_a_manifest_are_shown_though_its_files_are_away(store, slides):
    for name in ("a", "b", "broken", "empty"):
        (slides.parent / f"{name}.tif").unlink()
    assert status(store, slides).exit_code == 0


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_a_run_in_progress_says_who_it_is_since_when_and_how_far(kind, tmp_path, request, recorder, monkeypatch):
    address = tmp_path / "tiles.zarr"
    if kind == "objects":
        address = f"s3://{request.getfixturevalue('objects').bucket()}/store"
        from wsi_idc.store import objects as module

        # A lease is renewed, and then tells how far its run is, every third of its life.
        lease = module.ObjectLease
        monkeypatch.setattr(module, "ObjectLease", lambda backing: lease(backing, 3.0))
    monkeypatch.setattr("wsi_idc.store.backing._TOLD_EVERY_S", 0.0)
    with hold_store(address, create=True) as held:
        told = Telling(held, "extract", list("abcd"), recorder)
        told.ended("a", Outcome("done"))
        told.ended("b", Outcome("failed"))
        line = ""
        for _ in range(100):
            found = store_state(address)
            line = found.lines()[-1]
            if "2 of 4" in line:
                break
            time.sleep(0.05)
        assert line.startswith("extract is running (host ") and "2 of 4 slides, 1 failed" in line
        assert found.holding.alive
        event = json.loads(status(address, "--json").stdout.splitlines()[-1])
        assert (event["event"], event["does"]["slides"], event["alive"]) == ("run", 4, True)
    assert store_state(address).holding is None
    assert recorder.outcomes.keys() == {"a", "b"}


def test_a_run_that_was_killed_is_told_as_such(store):
    (store / "lease" / "holder.json").write_text(json.dumps({"host": "h", "pid": 1, "start": "t", "nonce": "x"}))
    (store / "lease" / "lock").touch()
    line = store_state(store).lines()[-1]
    assert line == ("a run was killed (host h, process 1, since t): nobody has the lock; the next run takes its place")
    (store / "lease" / "holder.json").write_text("{")
    assert "a run was killed (an unknown run)" in store_state(store).lines()[-1]


def test_looking_keeps_no_run_from_beginning_and_writes_nothing(store):
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    ended = threading.Event()

    def look():
        while not ended.is_set():
            store_state(store)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for thread in lookers:
        thread.start()
    for _ in range(20):
        with hold_store(store):
            pass
    ended.set()
    for thread in lookers:
        thread.join()
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


def test_how_long_it_will_take_is_told_from_what_is_done():
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    does = {"command": "infer", "slides": 100, "done": 24, "failed": 1}
    holding = Holding("h", 7, begun.isoformat(), True, "", does)
    line = run_line(holding, begun + timedelta(minutes=10))
    assert line.endswith("+00:00): 25 of 100 slides, 1 failed, about 30 min left")
    assert line.startswith("infer is running (host h, process 7, since 2026-01-01")
    assert run_line(holding, begun + timedelta(seconds=10)).endswith(", about 30 s left")
    nothing = {**does, "done": 0, "failed": 0}
    assert run_line(Holding("h", 7, "?", True, "", nothing)).endswith("0 of 100 slides, 0 failed")
