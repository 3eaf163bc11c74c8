"""The night: one command for all stages, and what it tells those who were asleep."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from wsi_idc import cli, side_by_side
from wsi_idc.errors import ClusterError
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.run import Night, Stage, summary_text
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import hold_store, open_store
from wsi_idc.work.cut import CutJob
from wsi_idc.work.jobs import Outcome, Summary

SETTINGS = """
model = "bundle"
[run]
log_file = "run.log"
metrics = "run.prom"
summary = "summary.txt"
"""


@pytest.fixture
def night(slides, bundle, monkeypatch, make):
    """The folder of three slides, one broken, and one without tissue, with settings beside the manifest."""
    folder = slides.parent
    make.write_tiff(folder / "empty.tif", make.texture(300, 300) * 0 + 244)
    slides.write_text(slides.read_text() + "empty.tif,p4,south\n")
    (folder / "wsi-idc.toml").write_text(SETTINGS)
    monkeypatch.chdir(folder)
    for name in ("WSI_IDC_STORE", "WSI_IDC_MODEL", "WSI_IDC_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return folder


def run(*arguments):
    """The command in this process; gives its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cli.main(["run", "manifest.csv", *arguments])
        return 0
    except SystemExit as end:
        return end.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def figures(folder):
    """What the metrics file says: name and label values -> value."""
    families = text_string_to_metric_families((folder / "run.prom").read_text())
    return {
        (one.name, *(one.labels[label] for label in sorted(one.labels))): one.value
        for family in families
        for one in family.samples
    }


def test_a_night_does_all_stages_and_the_next_one_only_what_failed(night, capsys):
    assert run() == 1
    told = capsys.readouterr()
    lines = [line.split() for line in told.out.splitlines()]
    header = lines.index(["stage", "slides", "done", "skipped", "failed", "tiles", "tiles/s", "time"])
    assert [line[:5] for line in lines[header + 1 : header + 5]] == [
        ["extract", "3", "0", "1", "72"],
        ["infer", "3", "0", "0", "72"],
        ["export", "3", "0", "0", "72"],
        ["report", "4", "0", "0", "0"],
    ]
    assert told.out.splitlines()[-1].startswith("run: 3 of 4 slides are up to date, 1 failed, in ")
    assert "Research use only" in told.out
    assert told.err.count("failed broken: ") == 1
    assert (night / "export/slides.csv").is_file() and (night / "export/csv/a.csv").is_file()

    found = figures(night)
    assert found["wsi_idc_run_exit_code",] == 1
    assert (found["wsi_idc_slides",], found["wsi_idc_slides_failed",], found["wsi_idc_slides_without_tissue",]) == (
        4,
        1,
        1,
    )
    assert found["wsi_idc_stage_slides", "done", "extract"] == 3
    assert found["wsi_idc_stage_slides", "failed", "extract"] == 1
    assert found["wsi_idc_stage_tiles", "infer"] == 72
    assert found["wsi_idc_stage_tiles_per_second", "infer"] > 0
    assert found["wsi_idc_run_end_timestamp_seconds",] >= found["wsi_idc_run_start_timestamp_seconds",]

    text = (night / "summary.txt").read_text()
    assert re.match(r"wsi-idc run of manifest\.csv on \S+: 3 of 4 slides are up to date, 1 failed\n\nBegun ", text)
    assert "exit code 1." in text and "Failed (1)\n  broken: extract: cannot read the region" in text
    assert "Without tissue (1)\n  empty\n" in text and "Warnings" not in text

    logged = (night / "run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (INFO|WARNING|ERROR) ", line) for line in logged)
    assert "WARNING failed broken: " in "\n".join(logged)

    assert run("--json") == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "run" and events[-1]["exit_code"] == 1
    assert {name: stage["skipped"] for name, stage in events[-1]["stages"].items()} == {
        "extract": 3, "infer": 3, "export": 3, "report": 4,
    }  # fmt: skip
    (failed,) = [event for event in events if event["event"] == "failed"]
    assert (failed["command"], failed["slide"]) == ("extract", "broken")
    assert failed["seconds"] > 0 and re.match(r"\d{4}-.*\+00:00$", failed["time"])


def test_pixels_are_kept_where_that_is_said_and_stay_where_they_are(night, capsys):
    run()
    assert not open_store("tiles.zarr").slide("a").has_pixels
    table = (night / "export/csv/a.csv").read_text()
    assert run("--pixels") == 1
    store = open_store("tiles.zarr")
    assert store.slide("a").has_pixels
    # Sharpness and ink are the same, whoever measured them, and so is all else.
    assert (night / "export/csv/a.csv").read_text() == table
    assert run() == 1
    assert open_store("tiles.zarr").slide("a").identity == store.slide("a").identity


def test_both_stages_give_what_their_commands_give(night, recorder):
    run()
    rows, store = read_manifest(night / "manifest.csv"), open_store("tiles.zarr")
    extract(rows, "other.zarr", ExtractSettings(), listener=recorder)
    infer("other.zarr", read_bundle(night / "bundle"), InferSettings(), listener=recorder)
    other = open_store("other.zarr")
    assert store.slide_ids() == other.slide_ids() == ["a", "b", "empty"]
    for name in store.slide_ids():
        mine, theirs = store.map("mean", name), other.map("mean", name)
        assert mine.attributes["flags"] == theirs.attributes["flags"]
        assert np.array_equal(mine.read("probability"), theirs.read("probability"))
        assert np.array_equal(mine.read("0"), theirs.read("0"), equal_nan=True)
    assert store.slide_node("broken").record().failed == other.slide_node("broken").record().failed


def test_a_slide_is_scored_while_others_are_cut(night, make, monkeypatch):
    """The last slide is cut only once the first has its map: with the stages in turn, that would wait for ever."""
    (night / "manifest.csv").write_text("path\na.tif\nb.tif\nlast.tif\n")
    make.tissue_slide(night / "last.tif", 500, 400)
    prepare = CutJob.prepare

    def later(job, work):
        until = time.monotonic() + 60
        while job.job_id == "last" and not open_store("tiles.zarr").map("mean", "a").record.usable:
            assert time.monotonic() < until
            time.sleep(0.01)
        return prepare(job, work)

    monkeypatch.setattr(CutJob, "prepare", later)
    assert run() == 0


def test_quiet_says_only_what_went_wrong_and_the_log_has_it_all(night, capsys):
    assert run("-q") == 1
    told = capsys.readouterr()
    assert told.out == "" and "failed broken: " in told.err
    assert "done a: 24 tiles" in (night / "run.log").read_text()


def test_slides_that_left_the_manifest_are_left_out_of_all_stages(night, capsys):
    run()
    (night / "manifest.csv").write_text("path\na.tif\n")
    (night / "bundle/bundle.json").write_text(
        (night / "bundle/bundle.json").read_text().replace("{", '{"threshold": 0.4, ', 1)
    )
    capsys.readouterr()
    assert run() == 0
    assert "run: 1 of 1 slides are up to date" in capsys.readouterr().out
    assert [line.split(",")[0] for line in (night / "export/slides.csv").read_text().splitlines()[1:]] == ["a"]


def test_a_store_that_is_held_is_exit_code_75_and_the_files_say_so(night, capsys):
    with hold_store(night / "tiles.zarr", create=True):
        assert run() == 75
    assert figures(night)["wsi_idc_run_exit_code",] == 75
    text = (night / "summary.txt").read_text()
    assert "The run could not go on:\n  tiles.zarr: another run holds the store" in text
    assert "ERROR" in (night / "run.log").read_text()


def test_what_was_done_before_a_cluster_was_lost_is_told(night, monkeypatch, capsys):
    both = side_by_side.run_jobs

    def lost(place, jobs, listener, *, urgency=0, **options):
        if not urgency:
            return both(place, jobs, listener, **options)
        while (job := jobs.take()) is None or job.job_id != "a":
            time.sleep(0.01)
        listener.ended("a", Outcome("done", 24))
        raise ClusterError("the scheduler", "it is lost", "the same command goes on")

    monkeypatch.setattr(side_by_side, "run_jobs", lost)
    assert run() == 1
    text = (night / "summary.txt").read_text()
    assert "not finished, 1 failed\n" in text and "the scheduler: it is lost; the same command goes on" in text
    assert re.search(r"^infer \(not finished\) +1 +0 +0 +24 ", text, re.MULTILINE)
    assert figures(night)["wsi_idc_stage_slides", "done", "infer"] == 1
    assert "export" not in text
    assert "wsi-idc: the scheduler: it is lost" in capsys.readouterr().err


def test_where_no_slide_has_tiles_there_is_the_page_alone(night):
    (night / "manifest.csv").write_text("path\nbroken.tif\n")
    assert run() == 1
    assert "0 of 1 slides are up to date, 1 failed" in (night / "summary.txt").read_text()
    assert not (night / "export").exists()
    assert "broken" in (night / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--summary", "none/summary.txt"], "none/summary.txt: its folder is not there"),
        (["--metrics", "bundle"], "bundle: is a folder"),
        (["--log-file", "none/run.log"], "none/run.log: cannot be written"),
        (["--config", "none.toml"], "none.toml: no such settings file"),
        (["--model", "none"], "no bundle.json"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "--workers: cannot go with --scheduler"),
        (["--store", "a.tif"], "a.tif: not a tile store"),
        (["--store", ""], "store"),
        (["--summary", "manifest.csv"], "manifest.csv: is another file, which would be lost"),
        (["--metrics", "a.tif"], "a.tif: is another file, which would be lost"),
        (["--summary", "/dev/null"], "/dev/null: is no plain file"),
        (["--summary", "x.txt", "--metrics", "x.txt"], "x.txt: two outputs are to be written there"),
    ],
)
def test_what_cannot_be_is_told_before_the_first_slide(night, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (night / "tiles.zarr").exists()


def test_a_model_that_does_not_fit_the_tiles_is_told_before_the_first_slide(night, capsys, monkeypatch):
    monkeypatch.setenv("WSI_IDC_EXTRACT_TILE_SIZE", "64")
    assert run() == 2
    assert "extract with --tile-size 50" in capsys.readouterr().err
    assert not (night / "tiles.zarr").exists()
    assert figures(night)["wsi_idc_run_exit_code",] == 2


def test_a_store_without_room_is_told_before_the_first_slide(night, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=150_000_000))
    assert run() == 2
    assert "tiles.zarr: 0.1 GB free for 4 new slides, which take about 0.2 GB; make room" in capsys.readouterr().err
    assert not list((night / "tiles.zarr/slides").glob("*/"))


def test_an_interrupted_night_says_so_in_its_files(night, make):
    for index in range(4):
        make.tissue_slide(night / f"s{index}.tif", 1500, 1500, seed=index)
    (night / "manifest.csv").write_text("path\n" + "\n".join(f"s{index}.tif" for index in range(4)))
    command = [sys.executable, "-m", "wsi_idc.cli", "run", "manifest.csv"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("done "):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and errors.splitlines()[-1].startswith("wsi-idc: interrupted")
    assert figures(night)["wsi_idc_run_exit_code",] == 143
    assert "interrupted by signal 15" in (night / "summary.txt").read_text()
    assert "ERROR" in (night / "run.log").read_text()


def test_what_files_are_called_cannot_break_the_summary_or_the_metrics():
    night = Night(Path("m\x1b.csv"), "a\x1bb")
    night.stages.append(Stage("extract", Summary({}, {"s\n": Outcome("failed", reason="x\x1b[31m\r")}, 1.0), True))
    night.end()
    assert not re.search(r"[\x1b\r]", summary_text(night))


def test_a_summary_is_to_be_read():
    night = Night(Path("m.csv"), "t.zarr")
    outcomes = {f"s{index}": Outcome("failed", reason="broken") for index in range(1000)}
    night.stages.append(Stage("extract", Summary({}, outcomes, 1.0), True))
    night.end()
    text = summary_text(night)
    assert "Failed (1,000)" in text and "  and 800 more: see wsi-idc status" in text
    assert len(text.splitlines()) < 250


def test_config_shows_what_is_in_force_and_from_where(night, wsi_idc):
    done = wsi_idc("config", "manifest.csv", cwd=night, WSI_IDC_STAGE_GB="7")
    lines = [re.split(r" {2,}", line) for line in done.stdout.splitlines()]
    assert ["model", "bundle", "wsi-idc.toml"] in lines
    assert ["infer.stage_gb", "7.0", "WSI_IDC_STAGE_GB"] in lines
    assert ["store", "tiles.zarr", "default"] in lines


def test_commands_that_read_take_the_store_from_the_settings(night, capsys):
    (night / "wsi-idc.toml").write_text("store = 'other.zarr'\n" + SETTINGS)
    run()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["status", "manifest.csv"])
    assert end.value.code == 0
    assert "broken" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["export", "--config", "wsi-idc.toml", "--out", "again"])
    assert end.value.code == 0 and (night / "again/slides.csv").is_file()
    with pytest.raises(SystemExit) as end:
        cli.main(["status"])
    assert end.value.code == 2 and "tiles.zarr: no such store" in capsys.readouterr().err
