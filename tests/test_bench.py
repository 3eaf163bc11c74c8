"""The bench measures by the code of a run, leaves nothing behind, and says of its figures what follows from them."""

import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from wsi_idc import cli
from wsi_idc.bench.advice import (
    Looked,
    Measured,
    Way,
    Work,
    advice,
    best_way,
    estimate_manifest,
    estimate_slide,
    work_of,
)
from wsi_idc.bench.figures import HEADER, ROUNDS, Figure, amount, rates, times
from wsi_idc.bench.subject import choose_model, left_to_do, spread
from wsi_idc.config import in_force

INT8, FLOAT32 = "engine int8", "engine float32"


def figure(what, *values, **about):
    return Figure(
        what, "s" if what in ("start", "open", "tissue", "cut", "map", "workers") else "tiles/s", values, **about
    )


COSTS = (
    figure("start", 2.0),
    figure("open", 0.25),
    figure("tissue", 0.5),
    figure("cut", 1.0),
    figure("map", 0.5),
    figure("decode", 4000.0, threads=1),
    figure("decode", 8000.0, threads=2),
    figure("judge", 8000.0),
)
MODEL = (
    figure("score", 1000.0, form=INT8, threads=1),
    figure("score", 1900.0, form=INT8, threads=2),
    figure("score", 250.0, form=FLOAT32, threads=1),
    figure("score", 500.0, form=FLOAT32, threads=2),
)
WAYS = (
    figure("workers", 3.0, workers=2),
    figure("together", 500.0, threads=1),
    figure("together", 900.0, 1000.0, 1100.0, threads=2, memory=10**9),
    figure("together", 980.0, 1000.0, 1020.0, threads=1, workers=2, memory=2 * 10**9),
)


def measured(*figures, form=INT8, tiles=1000, cores=2, **about):
    return Measured(figures or (*COSTS, *MODEL, *WAYS), form, tiles, cores, **about)


class Clock:
    """A clock that goes on where the work says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        left = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def work():
            self.now += next(left)

        return work


def test_work_is_done_until_the_time_is_over_and_once_at_least():
    clock = Clock()
    assert times(clock.work(3.0, 0.5), 4.0, clock) == (3.0, 0.5, 0.5)
    assert times(clock.work(9.0), 1.0, clock) == (9.0,)


def test_of_a_flow_each_part_of_the_time_has_a_rate_and_the_first_batches_do_not_count():
    clock = Clock()

    def flow(first, then):
        for seconds in itertools.chain([first], itertools.repeat(then)):
            clock.now += seconds
            yield 64

    assert rates(flow(7.0, 0.25), 1.25, clock) == (256.0,) * ROUNDS
    assert rates(flow(0.25, 32.0), 1.0, clock) == (2.0,)


def test_threads_that_bring_batches_together_are_counted_by_whole_turns():
    clock = Clock()

    def turns():
        while True:
            clock.now += 1.0
            yield 10
            yield 10

    assert rates(turns(), 1.5, clock, at_once=2) == (20.0, 20.0)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.01234, "s", "12.3 ms"),
        (1.234, "s", "1.23 s"),
        (12.34, "s", "12.3 s"),
        (1234, "s", "1234 s"),
        (1234.5, "tiles/s", "1,234 tiles/s"),
        (2.345, "tiles/s", "2.3 tiles/s"),
    ],
)
def test_values_have_the_digits_that_they_are_worth(value, unit, text):
    assert amount(value, unit) == text


def test_a_row_says_what_was_measured_by_what_and_how_far_it_spreads():
    row = figure("together", 10.0, 30.0, 20.0, threads=1, workers=2).cells()
    assert row == ["decode and score tiles", "2 workers of 1 thread", "20 tiles/s", "10 tiles/s", "30 tiles/s"]
    assert figure("score", 10.0, form=INT8, threads=2).cells()[1:] == ["engine int8, 2 threads", "10 tiles/s", "", ""]
    assert len(row) == len(HEADER)


def test_costs_are_those_of_one_thread_and_add_up():
    told = advice(measured())
    assert "A tile costs 1.38 ms of a core: the model 1 ms, decoding 0.25 ms, focus and ink 0.125 ms." in told
    assert (
        "A slide costs 1.50 s of a core besides its tiles: opening 250 ms, tissue 500 ms, records 250 ms, map 500 ms."
        in told
    )


@pytest.mark.parametrize(
    ("tiles", "decode", "begin"),
    [
        (1000, 500.0, "What binds is decoding: 43% of a slide of 1,000 tiles; "),
        (100, 4000.0, "What binds is what a slide costs besides its tiles: 92% of a slide of 100 tiles; "),
        (10_000, 4000.0, "What binds is the model: 66% of a slide of 10,000 tiles; "),
    ],
)
def test_what_binds_is_the_largest_part_of_the_slide(tiles, decode, begin):
    slow = figure("decode", decode, threads=1)
    told = advice(measured(slow, *COSTS, *MODEL, *WAYS, tiles=tiles))
    assert any(line.startswith(begin) for line in told), told


def test_pixels_that_are_kept_cost_writing_and_reading_them():
    stored = (figure("write", 1000.0), figure("read", 4000.0))
    kept = measured(*COSTS, *MODEL, *WAYS, *stored, pixels=True)
    assert kept.of_tile() == measured().of_tile() | {"writing": 0.001, "reading back": 0.00025}
    way, work = kept.ways()[0], Work(10, 10_000)
    assert kept.takes(way, work) == measured().takes(way, work) + 10_000 * 0.00125 / 2


def test_time_is_the_shared_work_and_at_least_what_cannot_be_shared():
    here, two, four = Way(0, 2, 1000.0, 1000.0), Way(2, 1, 1000.0, 1000.0), Way(0, 4, 1000.0, 1000.0)
    found = measured()
    # Ten slides: 15 s of a core for them, 10 s of both cores for their tiles, and 2 s for the run.
    assert found.takes(here, Work(10, 10_000)) == 2 + (15 + 20) / 2
    assert found.takes(two, Work(10, 10_000)) == 2 + 3 + (15 + 20) / 2
    # Of one slide nothing goes side by side but its tiles.
    assert found.takes(here, Work(1, 1000)) == 2 + 1.5 + 1
    # Two are cut at once in one process, however many cores there are.
    many = measured(cores=4)
    assert many.takes(four, Work(100, 0)) == 2 + 150 / 2
    assert many.takes(Way(4, 1, 1000.0, 1000.0), Work(100, 0)) == 2 + 3 + 150 / 4
    # Other costs of cutting, and tiles that cost more than those of the slide that was measured.
    assert found.takes(here, Work(10, 10_000, cutting=3.0, more=4.0)) == 2 + (30 + 4 + 20) / 2


def test_one_process_is_the_way_unless_another_one_is_faster_for_certain():
    assert (
        "Run by default, without --workers and --threads: 1,000 tiles/s in 1.0 GB; --workers 2 gives"
        in advice(measured())[-1]
    )
    faster = figure("together", 1500.0, 1600.0, threads=1, workers=2, memory=2 * 10**9)
    told = advice(measured(*COSTS, *MODEL, *WAYS[:3], faster))[-1]
    assert told.startswith(
        "Run with --workers 2: 1,550 tiles/s in 2.0 GB; one process by 2 threads gives 1,000 tiles/s"
    )
    assert advice(measured(*COSTS, *MODEL, *WAYS[:3], faster, free=10**9))[-1].startswith("Run by default")
    unsteady = figure("together", 800.0, 1600.0, 1700.0, threads=1, workers=2, memory=2 * 10**9)
    assert advice(measured(*COSTS, *MODEL, *WAYS[:3], unsteady))[-1].startswith("Run by default")
    alone = figure("together", 10_000.0, threads=1)
    assert advice(measured(*COSTS, *MODEL, alone, *WAYS[2:]))[-1].startswith("Run with --threads 1: ")


def test_for_a_few_slides_workers_are_not_worth_their_start():
    faster = figure("together", 1500.0, threads=1, workers=2, memory=2 * 10**9)
    found = measured(*COSTS, *MODEL, *WAYS[:3], faster)
    assert best_way(found, Work(1000, 10**6)).workers == 2
    assert best_way(found, Work(2, 2000)).workers == 0


def test_a_busy_machine_shared_cores_and_a_slow_int8_are_named():
    assert not any("busy" in line or "times as many tiles as one" in line for line in advice(measured(load=0.9)))
    assert advice(measured(load=3.0))[0].startswith("The machine was busy when this began (load 3.0 on 2 cores)")
    shared = figure("together", 600.0, threads=2)
    told = advice(measured(*COSTS, *MODEL, *WAYS[:2], shared, *WAYS[3:]))
    assert any(line.startswith("2 threads score 1.2 times as many tiles as one: ") for line in told)
    assert "int8 scores 3.8 times as many tiles as float32." in advice(measured())
    quick = figure("score", 3800.0, form=FLOAT32, threads=2)
    assert "int8 scores 0.5 times as many tiles as float32; --precision float32 is the faster one here." in advice(
        measured(*COSTS, *MODEL[:2], quick, *WAYS)
    )


def test_of_a_gpu_it_is_said_whether_the_cores_keep_it_busy():
    form = "torch float16 on cuda"
    ways = (figure("together", 5000.0, threads=8), figure("together", 5000.0, threads=8, workers=1))
    gpu = measured(*COSTS, figure("score", 8000.0, form=form, threads=8), *ways, form=form, cores=8, gpus=1)
    told = advice(gpu)
    assert (
        "One GPU scores 8,000 tiles/s, which 3.0 cores keep busy with tiles; there are 8.0 for each: the GPU will bind."
        in told
    )
    assert any(line.startswith("What binds the cores is ") for line in told)
    assert told[-1].startswith("Run with --gpus 1: 5,000 tiles/s")
    few = measured(*COSTS, figure("score", 8000.0, form=form, threads=2), *ways, form=form, gpus=1)
    assert any(line.endswith("the cores will bind.") for line in advice(few))


def test_slides_are_estimated_by_the_bytes_of_their_files_where_all_are_files():
    looked = [Looked(1000, 2.0, 100), Looked(3000, 4.0, 300, more=1.0)]
    # A quarter of the bytes was looked at; records and map take what they took of the slide that was measured.
    assert work_of(looked, [100, 300, 600, 600], measured()) == Work(4, 16_000, 3.75, 4.0)
    assert work_of(looked, [100, None, 600, 600], measured()) == Work(4, 8000, 3.75, 2.0)
    assert work_of([Looked(1000, 2.0)], [None] * 3, measured()).tiles == 3000


def test_an_estimate_says_from_how_many_slides_it_is_and_what_is_not_counted():
    looked = [Looked(1000, 2.0, 100), Looked(3000, 4.0, 300)]
    found = estimate_manifest(measured(), looked, [100] * 400, done=12)
    assert (found.work.slides, found.work.tiles) == (400, 400_000)
    assert found.seconds == 2 + (400 * 3.75 + 800) / 2
    assert found.text == (
        "400 slides to do, about 400,000 tiles: about 19 min, exports and report left out. An estimate from 2 of them"
        " (1,000 to 3,000 tiles); 12 slides are up to date and not counted."
    )
    unsure = estimate_manifest(measured(), [Looked(1000, 2.0, 100, exact=False)], [100], done=0)
    assert unsure.text.startswith("1 slide to do, at most about 1,000 tiles: at most about ")
    assert "up to date" not in unsure.text


def test_without_a_model_a_run_is_estimated_by_what_is_cut():
    found = measured(*COSTS, form="")
    assert found.of_tile() == {"decoding": 1 / 4000, "focus and ink": 1 / 8000}
    (way,) = found.ways()
    assert way.rate == pytest.approx(1 / (1 / 8000 + 1 / 16_000))
    assert not any(line.startswith("Run ") for line in advice(found))
    assert estimate_slide(found).seconds == pytest.approx(2 + 1.5 + 1000 / way.rate)


def test_the_slides_that_are_looked_at_stand_for_small_and_large_ones():
    sizes = [70, 10, 90, 30, 50, 20, 80, 40, 60, 0]
    assert [sizes[place] for place in spread(sizes, 5)] == [10, 30, 50, 70, 90]
    assert spread([3, None, 1], 5) == [1, 2, 0]
    assert spread([], 5) == []


def test_tiles_are_the_models_unless_others_are_asked_for(tmp_path, make):
    folder = make.write_bundle(tmp_path / "other", 100, 2.0)
    tile = choose_model(in_force({"model": str(folder)}, environment={})).cut.tile
    assert (tile.size_px, tile.mpp, tile.stride_px) == (100, 2.0, 100)
    without = choose_model(in_force({"extract.tile_size": 224, "extract.mpp": 0.5}, environment={}))
    assert without.bundle is None and without.cut.tile.size_px == 224
    assert without.note.startswith("No model was measured: idc-resnet50 is for 50 px at 4 um/px; name one for 224 px")


def test_what_is_left_to_do_is_what_a_run_would_do(scored, slides, bundle):
    settings = in_force({"store": scored.address, "model": str(bundle)}, manifest=slides, environment={})
    left = left_to_do(slides, settings, choose_model(settings))
    # Two have their maps, and one cannot be cut.
    assert ([row.slide_id for row in left.rows], left.done) == (["broken"], 2)
    assert left.sizes == [(slides.parent / "broken.tif").stat().st_size]
    other = in_force({"store": scored.address}, manifest=slides, environment={})
    left = left_to_do(slides, other, choose_model(other))
    assert ([row.slide_id for row in left.rows], left.done) == (["a", "b", "broken"], 0)
    none = in_force({"store": str(slides.parent / "none.zarr")}, manifest=slides, environment={})
    assert len(left_to_do(slides, none, choose_model(none)).rows) == 3


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.name != ".ses")  # ONNX Runtime's


@pytest.mark.slow
def test_a_manifest_is_measured_on_one_of_its_slides_and_nothing_stays(wsi_idc, slides, bundle):
    folder = slides.parent
    (folder / "tmp").mkdir()
    before = files(folder)
    done = wsi_idc(
        "bench", slides, "--model", bundle, "--seconds", 0.05, "--json", cwd=folder, TMPDIR=str(folder / "tmp")
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("left out broken: cannot read the region")
    assert files(folder) == before
    events = [json.loads(line) for line in done.stdout.splitlines()]
    found = [event for event in events if event["event"] == "figure"]
    threads = sorted({1, len(os.sched_getaffinity(0))})
    measured_by = {(one["what"], one["form"], one["threads"], one["workers"]) for one in found}
    once = {(what, "", 0, 0) for what in ("start", "open", "thumbnail", "tissue", "cut", "map", "write", "read")}
    assert measured_by >= once | {("judge", "", 1, 0), *(("decode", "", count, 0) for count in threads)}
    ours = {name for _, name, _, _ in measured_by if name}
    assert len(ours) == 1 and ours.pop().endswith(" float32")
    assert {one["threads"] for one in found if one["what"] == "score"} == set(threads)
    together = [one for one in found if one["what"] == "together"]
    assert [one["threads"] for one in together if not one["workers"]] == threads
    assert all(one["memory"] > 50e6 for one in together)
    assert all(0 < one["lowest"] <= one["median"] <= one["highest"] for one in found)
    (slide,) = [event for event in events if event["event"] == "slide"]
    assert (slide["slide"], slide["tiles"]) == ("b", 48)
    (estimate,) = [event for event in events if event["event"] == "estimate"]
    assert (estimate["of"], estimate["slides"]) == ("manifest", 3)
    assert "An estimate from 2 of them (24 to 48 tiles)" in estimate["text"]
    assert any(event["event"] == "advice" and event["text"].startswith("What binds is ") for event in events)
    assert (events[-1]["event"], events[-1]["figures"]) == ("summary", len(found))


def test_without_a_slide_one_is_painted_and_without_a_model_for_its_tiles_none_is_measured(wsi_idc, tmp_path):
    done = wsi_idc("bench", "--tile-size", 100, "--mpp", 4, "--seconds", 0.02, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["processor", "cores", "slide"]
    assert "painted here: no real slide costs the same, give one of yours: 6400 x 4800 px, 2 um/px" in lines[2]
    assert lines[3].split() == HEADER
    words = [line.split("  ")[0] for line in lines[4:]]
    assert {"open the slide", "decode tiles", "write tiles to a store"} <= set(words) and "score tiles" not in words
    assert (
        "No model was measured: idc-resnet50 is for 50 px at 4 um/px; name one for 100 px at 4 um/px with --model."
        in lines
    )
    assert lines[-1].startswith("A run over this slide alone takes about ")
    assert files(tmp_path) == []


def test_a_manifest_of_which_all_is_done_is_still_measured(wsi_idc, slides):
    slides.write_text("path\na.tif\nb.tif\n")
    tiles = ("--tile-size", 100, "--mpp", 4)
    assert wsi_idc("extract", slides, "--no-pixels", *tiles, cwd=slides.parent).returncode == 0
    done = wsi_idc("bench", slides, *tiles, "--seconds", 0.01, cwd=slides.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Nothing is left to do of {slides}."
    assert "decode tiles" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["none.svs"], 2, "none.svs: no such slide or manifest; check the path"),
        (["none.csv"], 2, "none.csv: no such slide or manifest; check the path"),
        (["s3://bucket/a.svs"], 2, "s3://bucket/a.svs: lies in an object store; copy it here"),
        (["."], 2, ".: is a folder, and no slide; make a manifest of it"),
        (["broken.tif"], 1, "broken.tif: cannot read the region"),
        (["glass.tif"], 2, "glass.tif: has no tile that can be measured; give another slide"),
        (["faulty.csv"], 2, "the header has no column 'path'"),
        (["a.tif", "--model", "none"], 2, "none: no bundle.json there"),
        (["a.tif", "--model", "bundle", "--tile-size", "100"], 2, "mean: tile.size_px is 50"),
        (["a.tif", "--model", "bundle", "--gpus", "1"], 2, "--gpus: 1 asked for, 0 found"),
        (["a.tif", "--tile-size", "3"], 2, "--tile-size: 3"),
        (["a.tif", "--seconds", "0"], 2, "--seconds"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line_and_nothing_stays(
    arguments, code, told, slides, bundle, make, monkeypatch, capsys, tmp_path_factory
):
    folder, temporary = slides.parent, tmp_path_factory.mktemp("temporary")
    make.write_tiff(folder / "glass.tif", np.full((200, 200, 3), 244, np.uint8))
    (folder / "faulty.csv").write_text("name\na.tif\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = files(folder)
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *arguments, "--seconds", "0.01"] if "--seconds" not in arguments else ["bench", *arguments])
    assert end.value.code == code
    assert told in capsys.readouterr().err
    assert files(folder) == before and files(temporary) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_bench_leaves_nothing_behind(slides, bundle, number, tmp_path_factory):
    folder, temporary = slides.parent, tmp_path_factory.mktemp("temporary")
    (folder / "stores").mkdir()
    command = [sys.executable, "-m", "wsi_idc.cli", "bench", "a.tif", "--model", "bundle", "--json", "--seconds", "60"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WSI_IDC_")}
    environment = {**kept, "TMPDIR": str(temporary), "WSI_IDC_STORE": str(folder / "stores" / "tiles.zarr")}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=environment)
    while json.loads(process.stdout.readline())["event"] != "slide":
        pass
    # A run of its own is under way in its folder, which lies beside the store.
    while not any((folder / "stores").glob(".wsi-idc-bench-*/glass-*.zarr")):
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert files(folder / "stores") == [] and files(temporary) == []
