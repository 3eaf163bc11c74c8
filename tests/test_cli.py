"""The command line as users meet it: lines, exit codes, signals."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from wsi_idc.settings import ExtractSettings, InferSettings

COMMANDS = (
    *("extract", "infer", "train", "evaluate", "export", "report", "view", "status", "verify", "prune"),
    *("doctor", "manifest", "info", "demo", "model", "run", "config", "bench"),
)
HEAVY = (
    *("torch", "tiatoolbox", "zarr", "dask", "distributed"),
    *("onnxruntime", "openvino", "matplotlib", "scipy", "pydantic"),
)
NEVER_HERE = (
    *("torch", "torchvision", "lightning", "tiatoolbox", "dask", "distributed", "tornado", "cryptography", "obstore"),
    *(
        "matplotlib",
        "sklearn",
        "skimage",
        "pandas",
        "pyarrow",
        "bokeh",
        "flask",
        "shapely",
        "onnx",
        "prometheus_client",
    ),
    "PIL.XbmImagePlugin",  # of all the formats that Pillow knows: it was made to look for one
)
"""What a slide's way to its map, table and page needs nothing of, in one process on the CPU."""


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["model", "import"]])
def test_help_imports_nothing_heavy(command):
    code = f"""
import sys
from wsi_idc.cli import main
try:
    main({[*command, "--help"]!r})
except SystemExit as end:
    assert end.code == 0, end.code
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Usage: " in done.stdout


def test_a_slide_goes_its_way_without_what_takes_long_to_import(tmp_path, make):
    make.tissue_slide(tmp_path / "a.tif", seed=1)
    (tmp_path / "m.csv").write_text("path\na.tif\n")
    for command in (["extract", "m.csv"], ["infer"], ["run", "m.csv"]):
        code = f"""
import sys
from wsi_idc.cli import main
try:
    main({[*command, "--store", command[0]] if command[0] == "run" else command!r})
except SystemExit as end:
    assert not end.code, end.code
print(sorted(set({NEVER_HERE!r}) & set(sys.modules)))
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "done a: " in done.stdout and done.stdout.splitlines()[-1] == "[]", command


def test_every_command_is_tested_here(wsi_idc):
    listed = wsi_idc("--help").stdout.split("Commands:")[1]
    assert set(re.findall(r"^  (\w+) ", listed, re.MULTILINE)) >= set(COMMANDS)


def test_the_defaults_in_the_help_are_the_defaults(wsi_idc):
    text = " ".join(wsi_idc("extract", "--help").stdout.split())
    settings = ExtractSettings()
    for option, value in (
        ("--tile-size", settings.tile.size_px),
        ("--mpp", settings.tile.mpp),
        ("--last", settings.tile.last),
        ("--tissue", settings.tissue),
        ("--min-tissue", settings.min_tissue),
        ("--annotation-class", settings.annotation_class),
    ):
        assert re.search(rf"{option} [^\[]*\[default: {re.escape(str(value))}\]", text), option
    text = " ".join(wsi_idc("infer", "--help").stdout.split())
    assert f"[default: {InferSettings().batch_size}]" in text


def test_the_way_from_a_manifest_to_maps(wsi_idc, slides, bundle):
    folder = slides.parent
    done = wsi_idc("extract", slides, cwd=folder)
    assert done.returncode == 1
    assert re.search(r"^failed broken: cannot read the region", done.stderr, re.MULTILINE)
    assert "done a: 24 tiles" in done.stdout
    assert re.search(r"slides done +skipped +failed +tiles +seconds\n2 +0 +1 +72 ", done.stdout)
    done = wsi_idc("infer", "--model", bundle, cwd=folder)
    assert done.returncode == 0, done.stderr
    done = wsi_idc("infer", "--model", bundle, cwd=folder)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            "note: 1 slide without complete tiles left out: see wsi-idc status",
            "infer: nothing to do, 2 slides are up to date",
        ],
    )
    done = wsi_idc("status", cwd=folder)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1][:4] == ["a", "yes", "24", "mean"]
    assert lines[3][:2] == ["broken", "failed"]
    assert (folder / "tiles.zarr").is_dir()


def test_status_of_a_manifest_has_slides_that_were_never_tried(wsi_idc, slides):
    folder = slides.parent
    wsi_idc("extract", slides, "--only", "a", cwd=folder)
    states = [json.loads(line) for line in wsi_idc("status", slides, "--json", cwd=folder).stdout.splitlines()][:-1]
    assert [(state["slide_id"], state["extracted"], state["tiles"]) for state in states] == [
        ("a", "yes", 24),
        ("b", "no", None),
        ("broken", "no", None),
    ]


def test_json_is_one_object_a_line(wsi_idc, slides, bundle):
    done = wsi_idc("extract", slides, "--json", cwd=slides.parent)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["event"] for event in events} == {"done", "failed", "summary"}
    assert all(event["seconds"] > 0 and event["time"] for event in events[:-1])
    assert events[-1] == {
        "event": "summary",
        "command": "extract",
        "done": 2,
        "skipped": 0,
        "failed": 1,
        "tiles": 72,
        "seconds": events[-1]["seconds"],
    }
    done = wsi_idc("infer", "--json", "--model", bundle, "--only", "a", cwd=slides.parent)
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["done", "summary"]


def test_quiet_says_only_what_failed_and_verbose_what_was_skipped(wsi_idc, slides):
    done = wsi_idc("extract", slides, "-q", cwd=slides.parent)
    assert done.stdout == "" and done.stderr.startswith("failed broken: ")
    done = wsi_idc("extract", slides, "-v", cwd=slides.parent)
    assert "skipped a: already done" in done.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_the_traceback_of_a_slide_that_failed_is_there_for_those_who_ask(wsi_idc, slides, workers):
    arguments = ("extract", slides, "--only", "broken", "--workers", workers)
    assert "Traceback" not in wsi_idc(*arguments, cwd=slides.parent).stderr
    done = wsi_idc(*arguments, cwd=slides.parent, WSI_IDC_DEBUG="1")
    assert done.stderr.startswith("failed broken: ")
    assert "Traceback (most recent call last)" in done.stderr and "in find_tissue" in done.stderr


def test_a_dry_run_says_what_would_be_done_and_does_nothing(wsi_idc, slides):
    done = wsi_idc("extract", slides, "--dry-run", cwd=slides.parent)
    assert done.stdout.splitlines() == ["run   a: new", "run   b: new", "run   broken: new"]
    assert not (slides.parent / "tiles.zarr").exists()
    wsi_idc("extract", slides, cwd=slides.parent)
    done = wsi_idc("extract", slides, "--dry-run", "--tile-size", "64", cwd=slides.parent)
    assert done.stdout.splitlines()[0] == "redo  a: tile size and stride changed"


def test_no_pixels_and_the_other_options_arrive(wsi_idc, slides):
    done = wsi_idc(
        "extract", slides, "--only", "a", "--no-pixels", "--tile-size", 100, "--mpp", 2.0, "--stride", 50,
        "--last", "drop", "--tissue", "none", "--store", "other.zarr", cwd=slides.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    attributes = json.loads((slides.parent / "other.zarr/slides/a/zarr.json").read_text())["attributes"]
    made = attributes["complete"]["made_from"]
    assert (made["tile size"], made["tile um/px"], made["stride"], made["edge rule"]) == (100, 2.0, 50, "drop")
    assert (made["tissue"], made["pixels"]) == ("none", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "none.csv"], "none.csv"),
        (["extract", "manifest.csv", "--tile-size", "3"], "--tile-size: 3"),
        (["extract", "manifest.csv", "--tissue", "magic"], "--tissue: 'magic'"),
        (["extract", "manifest.csv", "--only", "aa"], "did you mean a?"),
        (["extract", "manifest.csv", "--store", "a.tif"], "not a tile store"),
        (["extract", "--tile-sise", "50"], "--tile-sise"),
        (["extract"], "manifest"),
        (["extarct"], "extarct"),
        (["infer", "--model", "bundle"], "tiles.zarr: no such store"),
        (["infer", "--model", "none"], "no bundle.json"),
        (["infer"], "tiles.zarr: no such store"),
        (["evaluate"], "tiles.zarr: no such store"),
        (["infer", "--model", "bundle", "--gpus", "1", "--workers", "2"], "cannot go with --workers"),
        (["status"], "no such store"),
        (["status", "none.csv"], "none.csv"),
        (["manifest", "none"], "none"),
        (["info", "none.svs", "--tissue", "x"], "--tissue"),
    ],
)
def test_bad_usage_is_said_in_a_line_with_exit_code_2(wsi_idc, slides, bundle, arguments, message):
    before = sorted(slides.parent.rglob("*"))
    done = wsi_idc(*arguments, cwd=slides.parent)
    assert done.returncode == 2, done.stderr
    assert message.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert sorted(slides.parent.rglob("*")) == before


def test_gpus_that_are_not_there(wsi_idc, slides, bundle):
    wsi_idc("extract", slides, cwd=slides.parent)
    done = wsi_idc("infer", "--model", bundle, "--gpus", 1, cwd=slides.parent, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["wsi-idc: --gpus: 1 asked for, 0 found; leave --gpus out to run on the CPU"]


def test_all_faults_of_a_manifest_are_told_at_once(wsi_idc, tmp_path):
    (tmp_path / "m.csv").write_text("path,mpp,split\nnone.svs,fast,trian\n,0.25,train\n")
    done = wsi_idc("extract", "m.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("line 2") == 3 and done.stderr.count("line 3") == 1
    assert not (tmp_path / "tiles.zarr").exists()


def test_a_missing_slide_is_exit_code_1_and_with_strict_2(wsi_idc, slides):
    (slides.parent / "a.tif").unlink()
    done = wsi_idc("extract", slides, "--strict", cwd=slides.parent)
    assert done.returncode == 2 and "no such file or folder" in done.stderr
    assert not (slides.parent / "tiles.zarr").exists()
    done = wsi_idc("extract", slides, cwd=slides.parent)
    assert done.returncode == 1
    assert "failed a: no such file or folder" in done.stderr and "done b" in done.stdout


def test_a_store_that_is_held_is_exit_code_75(wsi_idc, slides):
    wsi_idc("extract", slides, cwd=slides.parent)
    from wsi_idc.store import hold_store

    with hold_store(slides.parent / "tiles.zarr"):
        done = wsi_idc("extract", slides, "--force", cwd=slides.parent)
    assert done.returncode == 75
    assert f"another run holds the store (host {socket.gethostname()}, process {os.getpid()}, since " in done.stderr


@pytest.mark.parametrize(
    ("workers", "number"),
    [
        (0, signal.SIGINT),
        pytest.param(0, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
        (2, signal.SIGTERM),
    ],
)
def test_an_interrupted_run_says_so_and_goes_on_from_there(wsi_idc, tmp_path, make, number, workers):
    names = [f"s{index}" for index in range(12)]
    for index, name in enumerate(names):
        make.tissue_slide(tmp_path / f"{name}.tif", 1500, 1500, seed=index)
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(f"{name}.tif" for name in names))
    command = [sys.executable, "-m", "wsi_idc.cli", "extract", "m.csv", "--workers", str(workers)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("wsi-idc: interrupted")
    done = {line.split()[1].rstrip(":") for line in (first + output).splitlines() if line.startswith("done")}
    after = wsi_idc("extract", "m.csv", "-v", cwd=tmp_path)
    assert after.returncode == 0, after.stderr
    skipped = {line.split()[1].rstrip(":") for line in after.stdout.splitlines() if line.startswith("skipped")}
    assert done and done <= skipped < set(names)


def test_a_run_that_is_killed_leaves_a_store_that_the_next_run_completes(wsi_idc, tmp_path, make):
    for index in range(6):
        make.tissue_slide(tmp_path / f"s{index}.tif", 1500, 1500, seed=index)
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(f"s{index}.tif" for index in range(6)))
    command = [sys.executable, "-m", "wsi_idc.cli", "extract", "m.csv"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    done = wsi_idc("extract", "m.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = [json.loads(line) for line in wsi_idc("status", "--json", cwd=tmp_path).stdout.splitlines()]
    assert [state["extracted"] for state in whole[:-1]] == ["yes"] * 6
    assert not list((tmp_path / "tiles.zarr").rglob("*.partial"))


def test_output_that_nobody_reads_is_no_error(wsi_idc, slides):
    wsi_idc("extract", slides, cwd=slides.parent)
    command = f"{sys.executable} -m wsi_idc.cli status | true"
    done = subprocess.run(command, shell=True, cwd=slides.parent, capture_output=True, text=True, check=False)
    time.sleep(0.1)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_manifest_of_a_folder_is_one_that_extract_takes(wsi_idc, slides):
    done = wsi_idc("manifest", ".", "-o", "new.csv", cwd=slides.parent)
    assert done.returncode == 0, done.stderr
    with (slides.parent / "new.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["slide_id"] for row in rows] == ["a", "b", "broken"]
    assert wsi_idc("extract", "new.csv", "--dry-run", cwd=slides.parent).returncode == 0
    assert wsi_idc("manifest", ".", cwd=slides.parent).stdout.startswith("path,slide_id,patient_id\n")


def test_info_says_what_a_slide_is(wsi_idc, slides):
    fields = json.loads(wsi_idc("info", "a.tif", "--json", cwd=slides.parent).stdout)
    assert (fields["size"], fields["mpp"], fields["mpp_source"]) == ([500, 400], [4.0, 4.0], "TIFF resolution tag")
    assert (fields["tiles"], fields["cells"], fields["levels"]) == (24, 80, [{"size": [500, 400], "mpp": 4.0}])
    lines = wsi_idc("info", "a.tif", cwd=slides.parent).stdout.splitlines()
    assert "size        500 x 400 px, 2 x 1.6 mm" in lines
    assert "tiles       24 of 80 have tissue (50 px at 4 um/px)" in lines
    done = wsi_idc("info", "a.tif", "--preview", "p.png", cwd=slides.parent)
    assert done.returncode == 0
    from PIL import Image

    assert min(Image.open(slides.parent / "p.png").size) > 500  # a small slide comes out large enough to see
    assert wsi_idc("info", "a.tif", "--preview", "no/p.png", cwd=slides.parent).returncode == 2
    before = (slides.parent / "a.tif").read_bytes()
    done = wsi_idc("info", "a.tif", "--preview", "../" + slides.parent.name + "/a.tif", cwd=slides.parent)
    assert done.returncode == 2 and "is the slide" in done.stderr and (slides.parent / "a.tif").read_bytes() == before
    assert wsi_idc("info", "manifest.csv", cwd=slides.parent).returncode == 1


def test_a_defect_is_one_line_and_the_traceback_is_there_for_those_who_ask(slides, monkeypatch, capsys):
    from wsi_idc import cli, status

    monkeypatch.setattr(status, "store_state", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as end:
        cli.main(["status"])
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("wsi-idc: ZeroDivisionError: division by zero; a defect")
    monkeypatch.setenv("WSI_IDC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["status"])


def test_a_full_disk_ends_the_run_with_one_line_and_loses_nothing_that_was_done(wsi_idc, slides):
    """A limit on the size of files stands for the disk: the same OSError from the same place."""
    folder = slides.parent
    wsi_idc("extract", slides, "--only", "a", cwd=folder)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from wsi_idc.cli import main; main(['extract', 'manifest.csv'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("wsi-idc: the store: File too large") and "make room" in last
    assert "Traceback" not in done.stderr
    states = {
        state["slide_id"]: state
        for state in map(json.loads, wsi_idc("status", "--json", cwd=folder).stdout.splitlines()[:-1])
    }
    assert states["a"]["extracted"] == "yes"
    assert states["b"]["extracted"] != "yes"
    assert "done b" in wsi_idc("extract", slides, cwd=folder).stdout


def test_the_shell_completes_commands():
    code = "import sys; sys.argv = ['wsi-idc']; from wsi_idc.cli import main; main()"
    asked = {"_WSI_IDC_COMPLETE": "complete_bash", "COMP_WORDS": "wsi-idc ex", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["extract", "export"]
