"""A stage holds what is read now and next, within its limit, and nothing when nobody reads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import obstore
import pytest

from wsi_idc import staging
from wsi_idc.digests import fingerprint
from wsi_idc.errors import AccessError, ChangedError, RegionError, SlideError, UsageError
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.objects import objects_at
from wsi_idc.settings import ExtractSettings, InferSettings, StageSettings
from wsi_idc.sources import Part, Url
from wsi_idc.staging import GB, Stage, at_hand, stage_of, unusable
from wsi_idc.store import open_store


@pytest.fixture
def stage(tmp_path) -> Stage:
    folder = tmp_path / "stage"
    folder.mkdir()
    return Stage(folder, 10**6)


def source(path: Path, size: int = 300_000) -> tuple[Path, str]:
    path.write_bytes(os.urandom(size))
    return path, fingerprint(path)


def entries(stage: Stage) -> list[str]:
    return sorted(child.name for child in stage.folder.iterdir())


@pytest.fixture
def bucket(objects):
    """A new bucket: its URL, and what puts a file there."""
    name = objects.bucket()
    store = objects_at(f"s3://{name}")

    def put(path: Path, key: str = "") -> Url:
        obstore.put(store, key or path.name, path.read_bytes())
        return Url(f"s3://{name}/{key or path.name}")

    return put


# --- The stage by itself ------------------------------------------------------------------------------------------


def test_a_copy_stays_between_uses_and_goes_when_it_is_dropped(tmp_path, stage):
    slide = source(tmp_path / "a.svs")
    with stage.hold([slide]) as copies:
        made = copies[slide[0]]
        assert made.name == "a.svs" and made.read_bytes() == slide[0].read_bytes()
    before = made.stat()
    with stage.hold([slide]) as copies:
        assert copies[slide[0]].stat() == before
        stage.drop([slide])
        assert made.exists()
    assert entries(stage) == []


def test_folders_and_what_a_format_keeps_beside_the_slide_are_copied_too(tmp_path, stage, bucket):
    (tmp_path / "a.mrxs").write_bytes(b"index")
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "Data0000.dat").write_bytes(b"pixels")
    (tmp_path / "b.vms").write_text("[Virtual Microscope Specimen]\nImageFile=b.jpg\nMapFile=../c.jpg\nNoLayers=1\n")
    (tmp_path / "b.jpg").write_bytes(b"picture")
    here = [tmp_path / "a.mrxs", tmp_path / "b.vms", tmp_path / "a"]
    for file in ("a.mrxs", "a/deep/Data0000.dat", "b.vms", "b.jpg"):
        url = bucket(tmp_path / file, f"x/{file}")
    there = [Url(f"{url.bucket}/x/{path.name}") for path in here]
    for slide in [*here, *there]:
        with stage.hold([(slide, fingerprint(slide))]) as copies:
            copy = copies[slide]
            beside = {file.relative_to(copy.parent).as_posix() for file in copy.parent.rglob("*") if file.is_file()}
            assert (
                beside
                == {
                    "a.mrxs": {"a.mrxs", "a/deep/Data0000.dat"},
                    "b.vms": {"b.vms", "b.jpg"},
                    "a": {"a/deep/Data0000.dat"},
                }[slide.name]
            )
            assert fingerprint(copy) == fingerprint(slide)


def test_one_file_of_a_dicom_slide_is_refused(tmp_path, stage):
    (tmp_path / "1.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    with (
        pytest.raises(SlideError, match="other levels lie beside it; give the folder"),
        stage.hold([(tmp_path / "1.dcm", fingerprint(tmp_path / "1.dcm"))]),
    ):
        pass


WORKER = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from wsi_idc.digests import fingerprint
from wsi_idc.staging import Stage

stage, most = Stage(Path(sys.argv[1]), 1_000_000), 0

def use(path):
    slide = (path, fingerprint(path))
    with stage.hold([slide]) as copies:
        assert copies[path].read_bytes() == path.read_bytes()
        time.sleep(0.01)
        with stage.alone():
            there = sum(file.stat().st_size for file in stage.folder.rglob("*.svs"))
    stage.drop([slide])
    return there

with ThreadPoolExecutor(4) as executor:
    print(max(executor.map(use, [Path(name) for name in sys.argv[2:] * 2])))
"""


def test_the_limit_holds_for_all_processes_and_threads_together(tmp_path, stage):
    slides = [source(tmp_path / f"{number}.svs")[0] for number in range(6)]
    command = [sys.executable, "-c", WORKER, stage.folder, *slides]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    found = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3, found
    most = [int(told) for told, _ in found]
    assert 600_000 <= max(most) <= 1_000_000
    assert entries(stage) == []


def test_who_finds_no_room_waits_until_others_leave(tmp_path, stage):
    first, second = source(tmp_path / "a.svs", 600_000), source(tmp_path / "b.svs", 600_000)
    order = []

    def later():
        with stage.hold([second]):
            order.append("second")

    with stage.hold([first]):
        thread = threading.Thread(target=later)
        thread.start()
        time.sleep(0.5)
        order.append("first")
        stage.drop([first])
    thread.join()
    assert order == ["first", "second"]


def test_what_nobody_uses_gives_way_the_longest_unused_first(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(staging, "_BETWEEN_S", -1.0)
    slides = [source(tmp_path / f"{name}.svs") for name in "abcd"]
    for slide in slides[:3]:
        with stage.hold([slide]):
            pass
        time.sleep(0.05)
    with stage.hold([slides[0]]):
        pass
    with stage.hold([slides[3]]):
        kept = {file.stem for file in stage.folder.rglob("*.svs")}
    assert kept == {"a", "c", "d"}


def test_waiting_ends_some_day(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(staging, "_PATIENCE_S", 0.5)
    first, second = source(tmp_path / "a.svs", 600_000), source(tmp_path / "b.svs", 600_000)
    with stage.hold([first]), pytest.raises(SlideError, match="found no room in --stage"), stage.hold([second]):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from wsi_idc import sources, staging
from wsi_idc.digests import fingerprint

path = Path(sys.argv[2])
slide = (path, fingerprint(path))
if sys.argv[3] == "copying":
    def read(part, start, stop):
        print("copying", flush=True)
        time.sleep(100)
    sources.Part.read = read
with staging.Stage(Path(sys.argv[1]), 1_000_000).hold([slide]):
    print("reading", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("when", ["copying", "reading"])
def test_what_a_killed_process_left_is_deleted_by_the_next_one(tmp_path, stage, when):
    slide = source(tmp_path / "a.svs", 600_000)
    command = [sys.executable, "-c", HOLDER, stage.folder, slide[0], when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == when
        left = entries(stage)
        assert len(left) == 1
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert entries(stage) == left
    other = source(tmp_path / "b.svs", 600_000)
    with stage.hold([other]):
        assert [file.name for file in stage.folder.rglob("*.svs")] == ["b.svs"]
    stage.make()
    stage.drop([other])
    assert entries(stage) == []


def test_a_file_that_grows_while_it_is_copied_is_noticed(tmp_path, stage, monkeypatch):
    slide = source(tmp_path / "a.svs")
    plain = Part.read

    def read(part, start, stop):
        data = plain(part, start, stop)
        if part.at == slide[0]:
            with slide[0].open("ab") as stream:
                stream.write(b"more")
        return data

    monkeypatch.setattr(Part, "read", read)
    with pytest.raises(ChangedError, match="changed while it was copied; run again"), stage.hold([slide]):
        pass
    assert entries(stage) == []


def test_a_file_that_was_replaced_since_the_run_was_planned_is_noticed(tmp_path, stage):
    slide = source(tmp_path / "a.svs")
    source(tmp_path / "a.svs")
    with pytest.raises(ChangedError, match="changed since the run was planned"), stage.hold([slide]):
        pass


def test_an_object_that_is_replaced_while_it_is_copied_is_noticed(tmp_path, stage, bucket, proxy):
    monster = Stage(stage.folder, GB)
    path, _ = source(tmp_path / "a.svs", 2 * staging._PIECE)
    url = bucket(path)
    slide = (url, fingerprint(url))
    gets = []

    def refuse(method, place, body):
        if method == "GET":
            gets.append(place)
            if len(gets) == 1:
                obstore.put(behind, url.key, os.urandom(path.stat().st_size))
        return

    behind = objects_at(url.bucket)
    proxy.refuse = refuse
    with pytest.raises(ChangedError, match="changed while it was copied"), monster.hold([slide]):
        pass
    assert gets and entries(stage) == []


def test_a_copy_of_an_object_costs_a_look_before_and_after_and_a_request_for_each_piece(
    tmp_path, stage, bucket, objects
):
    path, content = source(tmp_path / "a.svs", 2 * staging._PIECE + 1)
    url = bucket(path)
    before = len(objects.requests())
    with Stage(stage.folder, GB).hold([(url, content)]) as copies:
        assert copies[url].read_bytes() == path.read_bytes()
    asked = [method for method, _ in objects.requests()[before:]]
    assert sorted(asked) == ["GET"] * 3 + ["HEAD"] * 2


def test_a_copy_that_lost_its_content_is_made_again(tmp_path, stage):
    slide = source(tmp_path / "a.svs")
    with stage.hold([slide]) as copies:
        made = copies[slide[0]]
    made.write_bytes(bytes(300_000))
    with stage.hold([slide]) as copies:
        assert copies[slide[0]].read_bytes() == slide[0].read_bytes()


def test_a_slide_larger_than_the_limit_or_the_disk_is_told_with_sizes(tmp_path, stage, monkeypatch):
    slide = source(tmp_path / "a.svs", 1_000_001)
    with pytest.raises(SlideError, match=r"has 0.001 GB, more than .*\(--stage-gb 0.001\); raise"), stage.hold([slide]):
        pass
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=10**6, free=200_000))
    with (
        pytest.raises(SlideError, match=r"does not fit on the disk of --stage .*0.0003 GB .* 0.00019 GB can be had"),
        stage.hold([source(tmp_path / "a.svs")]),
    ):
        pass
    assert entries(stage) == []


def test_errors_name_the_users_file_and_never_the_copy(tmp_path, stage):
    slide = source(tmp_path / "a.svs")
    with pytest.raises(RegionError) as caught, stage.hold([slide]) as copies:
        raise RegionError(copies[slide[0]], f"cannot read {copies[slide[0]]}", "try")
    assert str(caught.value) == f"{slide[0]}: cannot read {slide[0]}; try"
    with pytest.raises(OSError) as said, stage.hold([slide]) as copies:
        (copies[slide[0]] / "x").read_bytes()
    assert said.value.filename == f"{slide[0]}/x"
    assert entries(stage) == []
    with (
        pytest.raises(AccessError, match=f"{tmp_path}/gone.svs: no such file"),
        stage.hold([(tmp_path / "gone.svs", "")]),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "said"), [("s3://bucket/x", "is a URL"), ("{}/a.svs/x", "cannot be used \\(Not a dir")]
)
def test_a_stage_that_is_no_folder_is_refused(tmp_path, text, said):
    source(tmp_path / "a.svs")
    with pytest.raises(UsageError, match=said):
        stage_of(StageSettings(stage=text.format(tmp_path)), here=True)


def test_a_worker_says_why_it_cannot_use_the_stage(tmp_path):
    source(tmp_path / "a.svs")
    elsewhere = stage_of(StageSettings(stage=f"{tmp_path}/a.svs/x"), here=False)
    (line,) = unusable(elsewhere)
    assert line.startswith(f"--stage {tmp_path}/a.svs/x: cannot be used")
    assert unusable(None) == unusable(Stage(tmp_path / "new", 1)) == []


def test_without_a_stage_a_url_is_refused(tmp_path):
    with pytest.raises(SlideError, match="give --stage DIR"), at_hand(None, [(Url("s3://b/a.svs"), "")]):
        pass


# --- Slides through it --------------------------------------------------------------------------------------------


def run(manifest, recorder, store="tiles.zarr", **settings):
    rows = read_manifest(manifest)
    place = manifest.parent / store
    return extract(rows, place, ExtractSettings(**settings), listener=recorder), open_store(place)


def contents(store) -> dict[str, object]:
    """Every file of a store but its lease's; of records, what is no attempt's own."""
    root, found = Path(store.address), {}
    for file in root.rglob("*"):
        name = file.relative_to(root).as_posix()
        if file.is_file() and not name.startswith("lease/"):
            found[name] = file.read_bytes()
            if name.endswith("/zarr.json"):
                document = json.loads(found[name])
                for own in ("attempt", "committed"):
                    document.get("attributes", {}).pop(own, None)
                found[name] = document
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_staged_run_writes_the_same_store_and_leaves_nothing(slides, recorder, stage, workers):
    _, plain = run(slides, recorder, "plain.zarr")
    summary, staged = run(slides, recorder, stage=str(stage.folder), stage_gb=0.01, workers=workers)
    assert (summary.done, list(summary.failures)) == (2, ["broken"])
    assert contents(staged) == contents(plain)
    assert str(stage.folder) not in summary.failures["broken"]
    assert entries(stage) == []
    summary, _ = run(slides, recorder, stage=str(stage.folder))
    assert [plan.action for plan in summary.plans.values()] == ["skip", "skip", "run"]


def test_the_next_slide_is_copied_while_this_one_is_read(slides, recorder, stage, monkeypatch):
    from wsi_idc.work.cut import CutJob

    slides.write_text("path\na.tif\nb.tif\n")
    seen = []
    plain = CutJob.run

    def slow(job, *rest):
        for _ in range(200):
            there = {path.parts[-1] for path in stage.folder.glob("*.staged/slide/0/*")}
            if there == {"a.tif", "b.tif"} or seen:
                break
            time.sleep(0.05)
        seen.append(there)
        return plain(job, *rest)

    monkeypatch.setattr(CutJob, "run", slow)
    summary, _ = run(slides, recorder, stage=str(stage.folder))
    assert summary.done == 2
    assert seen[0] == {"a.tif", "b.tif"}


def test_a_stage_that_holds_one_slide_at_a_time_is_enough(slides, recorder, stage):
    slides.write_text("path\na.tif\nb.tif\n")
    size = (slides.parent / "b.tif").stat().st_size
    summary, _ = run(slides, recorder, stage=str(stage.folder), stage_gb=(size + 1) / GB)
    assert summary.done == 2
    assert entries(stage) == []


def test_slides_annotations_and_masks_may_lie_in_a_bucket_and_moving_them_there_changes_nothing(
    slides, recorder, stage, bucket, bundle
):
    from PIL import Image

    folder = slides.parent
    (folder / "a.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    Image.new("L", (60, 50), 255).save(folder / "mask.png")
    slides.write_text("path,annotation,mask\na.tif,a.geojson,\nb.tif,,mask.png\n")
    run(slides, recorder)
    urls = {name: bucket(folder / name, f"x y/{name}") for name in ("a.tif", "b.tif", "a.geojson", "mask.png")}
    slides.write_text(
        f"path,annotation,mask\n{urls['a.tif']},{urls['a.geojson']},\n{urls['b.tif']},,{urls['mask.png']}\n"
    )
    summary, store = run(slides, recorder, stage=str(stage.folder))
    assert {name: plan.action for name, plan in summary.plans.items()} == {"a": "skip", "b": "skip"}
    assert store.slide("a").attributes["path"] == str(urls["a.tif"])
    expected = contents(store)
    for name in ("a.tif", "b.tif", "a.geojson", "mask.png"):
        (folder / name).unlink()
    summary, store = run(slides, recorder, "other.zarr", stage=str(stage.folder), workers=1)
    assert summary.done == 2
    assert contents(store) == expected
    assert entries(stage) == []


def test_an_object_that_was_not_written_anew_is_one_question_and_one_that_was_is_looked_at(
    slides, recorder, stage, bucket, objects, make
):
    folder = slides.parent
    url = bucket(folder / "a.tif", "a.tif")
    slides.write_text(f"path\n{url}\n")
    run(slides, recorder, stage=str(stage.folder))

    def again():
        before = len(objects.requests())
        summary, store = run(slides, recorder, stage=str(stage.folder))
        asked = [method for method, path in objects.requests()[before:] if path.endswith("/a.tif")]
        return summary.plans["a"].action, asked, store.slide("a").attributes["seen"]

    action, asked, seen = again()
    assert (action, asked) == ("skip", ["HEAD"])
    # Written anew, it is looked at, and that is remembered.
    with (folder / "a.tif").open("ab") as stream:
        stream.write(b"\0")
    bucket(folder / "a.tif", "a.tif")
    action, asked, changed = again()
    assert action == "redo" and "GET" in asked
    assert changed != seen
    assert again()[:2] == ("skip", ["HEAD"])
    make.tissue_slide(folder / "a.tif", seed=9)
    bucket(folder / "a.tif", "a.tif")
    assert again()[0] == "redo"


def test_infer_stages_the_slides_whose_pixels_are_not_stored(slides, recorder, stage, bucket, bundle, make):
    import numpy as np

    slides.write_text("path\na.tif\nb.tif\n")
    path = run(slides, recorder, pixels=False)[1].address
    infer(path, read_bundle(bundle), InferSettings(), listener=recorder)
    plain = {name: open_store(path).map("mean", name).read("probability") for name in "ab"}
    urls = [bucket(slides.parent / name) for name in ("a.tif", "b.tif")]
    slides.write_text("path\n" + "".join(f"{url}\n" for url in urls))
    run(slides, recorder, pixels=False, stage=str(stage.folder))
    with pytest.raises(UsageError, match="the store has no pixels of it; give --stage DIR"):
        infer(path, read_bundle(bundle), InferSettings(), force=True, listener=recorder)
    settings = InferSettings(stage=str(stage.folder))
    assert infer(path, read_bundle(bundle), settings, force=True, listener=recorder).done == 2
    for name, values in plain.items():
        assert np.array_equal(open_store(path).map("mean", name).read("probability"), values)
    assert entries(stage) == []
    make.tissue_slide(slides.parent / "a.tif", seed=77)
    bucket(slides.parent / "a.tif")
    summary = infer(path, read_bundle(bundle), settings, force=True, listener=recorder)
    assert summary.failures == {"a": f"{urls[0]}: changed since it was extracted; run wsi-idc extract again"}


# --- The command line ---------------------------------------------------------------------------------------------


def test_a_manifest_of_urls_without_a_stage_is_refused_in_one_line(wsi_idc, slides):
    slides.write_text("path\na.tif\ns3://bucket/b.tif\n")
    for more in ([], ["--dry-run"]):
        done = wsi_idc("extract", slides, *more, cwd=slides.parent)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert "s3://bucket/b.tif: lies in an object store; give --stage DIR" in done.stderr
    assert not (slides.parent / "tiles.zarr").exists()


def test_a_slide_that_is_not_in_its_bucket_fails_alone(wsi_idc, slides, bucket):
    url = bucket(slides.parent / "a.tif")
    slides.write_text(f"path\n{url}\n{url.bucket}/gone.tif\n")
    done = wsi_idc("extract", slides, "--stage", "stage", cwd=slides.parent)
    assert done.returncode == 1
    assert "failed gone: no such object, and none below it; check the path" in done.stderr
    assert "done a: 24 tiles" in done.stdout
    done = wsi_idc("extract", slides, "--stage", "stage", "--strict", "--dry-run", cwd=slides.parent)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "gone.tif: no such object" in done.stderr


def test_a_bucket_that_is_not_there_or_not_ours_is_one_line_and_finished_slides_stay(wsi_idc, slides, bucket, proxy):
    url = bucket(slides.parent / "a.tif")
    slides.write_text(f"path\n{url}\n")
    assert wsi_idc("extract", slides, "--stage", "stage", cwd=slides.parent).returncode == 0
    before = contents(open_store(slides.parent / "tiles.zarr"))
    slides.write_text("path\n" + "".join(f"s3://no-such-bucket-of-ours/{name}.tif\n" for name in "abcd"))
    done = wsi_idc("extract", slides, "--stage", "stage", cwd=slides.parent)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "s3://no-such-bucket-of-ours/a.tif: there is no such bucket" in done.stderr
    assert "(and 3 more slides cannot be had)" in done.stderr
    proxy.refuse = lambda method, path, body: (403, "AccessDenied")
    slides.write_text(f"path\n{url}\n")
    done = wsi_idc("extract", slides, "--stage", "stage", cwd=slides.parent)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{url}: permission denied" in done.stderr
    assert contents(open_store(slides.parent / "tiles.zarr")) == before


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
from wsi_idc.cli import main
main(sys.argv[1:])
"""


def test_a_stage_disk_that_takes_no_more_fails_the_slide_and_not_the_run(slides, make):
    make.write_tiff(slides.parent / "large.tif", make.texture(1200, 1200))
    slides.write_text("path\nlarge.tif\na.tif\n")
    command = [sys.executable, "-c", LIMITED, "extract", slides, "--stage", "stage", "--no-pixels"]
    done = subprocess.run(command, cwd=slides.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"failed large: cannot be copied to --stage {slides.parent}/stage: File too large; make room" in done.stderr
    assert "done a: 24 tiles" in done.stdout
    assert list((slides.parent / "stage").iterdir()) == []


def test_info_says_of_a_url_what_it_says_of_the_file(wsi_idc, slides, bucket):
    url = bucket(slides.parent / "a.tif")
    there = json.loads(wsi_idc("info", url, "--json").stdout)
    here = json.loads(wsi_idc("info", slides.parent / "a.tif", "--json").stdout)
    assert there == {**here, "path": str(url)}
    for place, said in ((f"{url.bucket}/b.tif", "no such object"), ("ftp://host/a.tif", "ftp:// is not supported")):
        done = wsi_idc("info", place)
        assert (done.returncode, len(done.stderr.splitlines())) == (1 if "s3" in place else 2, 1)
        assert f"{place}: {said}" in done.stderr


def test_a_manifest_is_made_of_folders_alone(wsi_idc):
    done = wsi_idc("manifest", "s3://bucket/slides")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "s3://bucket/slides: is a URL" in done.stderr
