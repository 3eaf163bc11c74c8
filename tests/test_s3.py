"""Every command over a store on S3: a server as a process of its own, and the command as another."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from wsi_idc.cli import app
from wsi_idc.store import hold_store, open_store
from wsi_idc.store.backing import HOLDER, backing_at

SPLITS = ["train", "train", "train", "val", "val", "test", "test"]
ID = "p{}"


@pytest.fixture
def here(objects, tmp_path, monkeypatch):
    """Runs a command in this process, and in an own folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return invoke


@pytest.fixture
def cohort(tmp_path, make):
    """Folders of labelled patches, IDC ones bluer, and a slide; gives the manifest."""
    generator = np.random.default_rng(0)
    rows = ["path,slide_id,patient_id,split"]
    for number, split in enumerate(SPLITS):
        patient = ID.format(number)
        for index in range(24):
            label = index % 2
            folder = tmp_path / patient / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            base = (150, 90, 170) if label else (215, 160, 195)
            pixels = np.clip(np.array(base) + generator.normal(0, 30, (50, 50, 3)), 0, 255).astype(np.uint8)
            x, y = index % 6 * 50 + 1, index // 6 * 50 + 1
            Image.fromarray(pixels).save(folder / f"{patient}_idx5_x{x}_y{y}_class{label}.png")
        rows.append(f"{patient},{patient},{patient},{split}")
    make.tissue_slide(tmp_path / "slide.tif", 700, 600)
    rows.append("slide.tif,slide,q,")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(rows))
    return manifest


def contents(store, path="", found=None):
    """Every array of a store, by path: its metadata and its values, which zarr gives."""
    found = {} if found is None else found
    for name in store.backing.folders(path):
        below = f"{path}/{name}".strip("/")
        document = json.loads(store.backing.read(f"{below}/zarr.json") or b"{}")
        if document.get("node_type") == "group":
            contents(store, below, found)
        elif name != "lease":
            import zarr

            array = zarr.open_array(store.backing.zarr(read_only=True), path=below, mode="r", zarr_format=3)
            found[below] = (document, np.asarray(array[...]).tobytes())
    return found


def records(store):
    """The record of every slide and map, but for what each attempt has of its own."""
    paths = [f"slides/{name}" for name in store.all_slide_ids()]
    paths += [f"maps/mean/{name}" for name in store.all_slide_ids()]
    found = {path: json.loads(store.backing.read(f"{path}/zarr.json"))["attributes"] for path in paths}
    return {path: {**attributes, "attempt": None, "committed": None} for path, attributes in found.items()}


def test_every_command_does_on_s3_what_it_does_in_a_folder(wsi_idc, here, objects, cohort, bundle, tmp_path):
    url = f"s3://{objects.bucket()}/some/where"
    done = wsi_idc("extract", cohort, "--store", url, "--workers", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = wsi_idc("infer", "--model", bundle, cwd=tmp_path, WSI_IDC_STORE=url)
    assert done.returncode == 0, done.stderr
    for command in (["extract", cohort], ["infer", "--model", bundle]):
        assert here(*command, "--store", "folder.zarr").exit_code == 0
    remote, local = open_store(url), open_store("folder.zarr")
    assert contents(remote) == contents(local)
    assert len(contents(remote)) == 8 * 9 + 8 * 2
    assert records(remote) == records(local)
    assert not (tmp_path / "s3:").exists() and not (tmp_path / "tiles.zarr").exists()

    place = ["--store", url]
    assert "up to date" in here("extract", cohort, *place).output
    assert "skip  slide: already done" in here("extract", cohort, *place, "--dry-run").output
    states = [json.loads(line) for line in here("status", *place, "--json").stdout.splitlines()][:-1]
    assert [state["slide_id"] for state in states] == [*map(ID.format, range(7)), "slide"]
    assert {(state["extracted"], state["scored"]) for state in states} == {("yes", "mean")}

    quick = ["--network", "idc-2016", "--epochs", 1, "--batch-size", 16, "--threads", 1]
    assert here("train", *place, *quick, "--out", "m").exit_code == 0
    assert here("infer", *place, "--model", "m").exit_code == 0
    done = here("evaluate", *place, "--model", "m", "--json")
    assert done.exit_code == 0 and (tmp_path / "evaluation" / "report.html").is_file()
    assert json.loads(done.stdout.splitlines()[0])["context"]["store"] == url
    assert here("report", *place, "--model", "mean").exit_code == 0
    assert url in (tmp_path / "report.html").read_text()


def run_killed_after_a_slide(arguments, folder):
    """The ids of slides that it said were done before it was killed."""
    command = [sys.executable, "-m", "wsi_idc.cli", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.kill()
    rest, _ = process.communicate(timeout=60)
    return {line.split()[1].rstrip(":") for line in (first + rest).splitlines() if line.startswith("done")}


def test_a_run_that_is_killed_leaves_a_store_that_the_next_run_completes(here, objects, tmp_path, make):
    for index in range(6):
        make.tissue_slide(tmp_path / f"s{index}.tif", 1200, 1200, seed=index)
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(f"s{index}.tif" for index in range(6)))
    url = f"s3://{objects.bucket()}/store"
    done = run_killed_after_a_slide(["extract", "m.csv", "--store", url], tmp_path)
    after = here("extract", "m.csv", "--store", url, "-v")
    assert after.exit_code == 0, after.output
    skipped = {line.split()[1].rstrip(":") for line in after.output.splitlines() if line.startswith("skipped")}
    assert done and done <= skipped < {f"s{index}" for index in range(6)}
    assert here("extract", "m.csv", "--store", "folder.zarr").exit_code == 0
    assert contents(open_store(url)) == contents(open_store("folder.zarr"))


def test_the_second_of_two_runs_is_told_of_the_first(wsi_idc, objects, slides):
    url = f"s3://{objects.bucket()}"
    with hold_store(url, create=True):
        done = wsi_idc("extract", slides, "--store", url, cwd=slides.parent)
    assert done.returncode == 75
    assert f"another run holds the store (host {socket.gethostname()}, process {os.getpid()}, since " in done.stderr
    assert done.stderr.count("\n") == 1
    assert open_store(url).all_slide_ids() == []


def test_a_run_whose_lease_was_taken_over_stops_and_says_so(wsi_idc, proxy, objects, tmp_path, make):
    for index in range(5):
        make.tissue_slide(tmp_path / f"s{index}.tif", 400, 400, seed=index)
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(f"s{index}.tif" for index in range(5)))
    url = f"s3://{objects.bucket()}/store"
    another = json.dumps({"nonce": "another", "host": "h", "pid": 7, "start": "t"}).encode()
    commits = []

    def take_over(method, path, body):
        if b'"complete"' in body:
            commits.append(path)
            backing_at(url).write(HOLDER, another)

    proxy.refuse = take_over
    done = wsi_idc("extract", "m.csv", "--store", url, cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    assert "another run has taken the store over" in done.stderr and "Traceback" not in done.stderr
    # Two slides are under way at once; both may have asked before the lease was gone.
    assert 1 <= len(open_store(url).slide_ids()) == len(commits) <= 2
    assert backing_at(url).read(HOLDER) == another


@pytest.mark.slow
def test_of_ten_commands_at_once_one_works_and_nine_are_told_of_it(objects, tmp_path, make):
    make.tissue_slide(tmp_path / "a.tif", 3000, 3000)
    (tmp_path / "m.csv").write_text("path\na.tif\n")
    url = f"s3://{objects.bucket()}/store"
    command = [sys.executable, "-m", "wsi_idc.cli", "extract", "m.csv", "--force", "--store", url]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with hold_store(url, create=True):
        runs = [subprocess.Popen(command, cwd=tmp_path, text=True, **streams) for _ in range(10)]
        errors = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [75] * 10
    assert all(f"process {os.getpid()}" in error for error in errors)
    runs = [subprocess.Popen(command, cwd=tmp_path, text=True, **streams) for _ in range(10)]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    codes = [run.returncode for run in runs]
    # One that comes when another is done works, too; never two at a time.
    assert 0 in codes and set(codes) <= {0, 75}, errors
    assert open_store(url).slide("a").count > 0


def test_credentials_that_expire_cost_what_was_not_finished_and_the_next_run_goes_on(
    wsi_idc, here, proxy, objects, tmp_path, make
):
    for index in range(4):
        make.tissue_slide(tmp_path / f"s{index}.tif", 400, 400, seed=index)
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(f"s{index}.tif" for index in range(4)))
    url = f"s3://{objects.bucket()}/store"
    commits = []

    def refuse(method, path, body):
        """Expired from the moment on at which a second slide would have been complete."""
        if b'"complete"' in body:
            commits.append(path)
        return (400, "ExpiredToken") if len(commits) > 1 else None

    proxy.refuse = refuse
    done = wsi_idc("extract", "m.csv", "--store", url, cwd=tmp_path)
    assert done.returncode == 1
    assert "the credentials have expired (ExpiredToken): renew them" in done.stderr
    assert "Traceback" not in done.stderr
    proxy.refuse = lambda *request: None
    assert len(open_store(url).slide_ids()) == 1
    assert here("extract", "m.csv", "--store", url).exit_code == 0
    assert len(open_store(url).slide_ids()) == 4


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (404, "NoSuchBucket", "there is no such bucket"),
        (403, "AccessDenied", "permission denied (AccessDenied)"),
        (400, "ExpiredToken", "the credentials have expired"),
    ],
)
@pytest.mark.parametrize("command", ["extract", "status"])
def test_a_server_that_refuses_from_the_start_is_one_line(proxy, objects, slides, capsys, command, status, code, told):
    from wsi_idc.cli import main

    url = f"s3://{objects.bucket()}/store"
    proxy.refuse = lambda *request: (status, code)
    with pytest.raises(SystemExit) as end:
        main([command, str(slides), "--store", url])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"wsi-idc: {url}: ") and told in errors and errors.count("\n") == 1


@pytest.mark.parametrize("address", ["ftp://host/store", "s3://"])
def test_an_address_that_is_not_supported_is_bad_usage(here, slides, address):
    from wsi_idc.errors import UsageError

    for command in (["extract", slides], ["infer"], ["status"], ["train"], ["evaluate"]):
        with pytest.raises(UsageError, match=r"is not supported|names no bucket"):
            here(*command, "--store", address)


def test_a_store_that_is_not_there_is_told_apart_from_a_bucket_that_is_not(wsi_idc, objects, tmp_path):
    done = wsi_idc("status", "--store", f"s3://{objects.bucket()}/store", cwd=tmp_path)
    assert done.returncode == 2 and "no such store; run wsi-idc extract first" in done.stderr
    done = wsi_idc("status", "--store", "s3://no-such-bucket/store", cwd=tmp_path)
    assert done.returncode == 2 and "there is no such bucket" in done.stderr


def kinds(requests):
    """Requests by what a bill calls them."""

    def kind(method, path):
        if method == "GET" and "list-type" in path:
            return "LIST"
        return "DELETE" if method == "POST" and path.endswith("?delete") else method

    return Counter(kind(method, path) for method, path in requests)


def test_requests_of_a_slide_are_few_and_known(here, objects, bundle, tmp_path, make):
    """`docs/store.md` has these; a slide here is one shard of one chunk."""
    for index in range(6):
        make.tissue_slide(tmp_path / f"s{index}.tif", seed=index)
    commands = {
        "extract": ["extract", "m.csv"],
        "infer": ["infer", "--model", bundle],
        "extract again": ["extract", "m.csv"],
        "infer again": ["infer", "--model", bundle],
        "status": ["status"],
    }
    counts = {name: [] for name in commands}
    for number in (1, 6):
        (tmp_path / "m.csv").write_text("path\n" + "\n".join(f"s{index}.tif" for index in range(number)))
        url = f"s3://{objects.bucket()}/store"
        for name, command in commands.items():
            before = len(objects.requests())
            assert here(*command, "--store", url).exit_code == 0
            counts[name].append(kinds(objects.requests()[before:]))
    most = {
        "extract": {"PUT": 19, "GET": 25, "LIST": 2, "DELETE": 3},
        "infer": {"PUT": 6, "GET": 23, "LIST": 2, "DELETE": 2},
        "extract again": {"GET": 1},
        "infer again": {"GET": 2},
        "status": {"GET": 2},
    }
    for command, (one, six) in counts.items():
        each = {kind: (six[kind] - one[kind]) / 5 for kind in six if six[kind] != one[kind]}
        assert each.keys() == most[command].keys(), each
        assert all(each[kind] <= most[command][kind] for kind in each), each
