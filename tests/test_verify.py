"""Whatever is damaged in a store is found and named; repaired, the next run does it again; nothing else is touched."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from wsi_idc.cli import app
from wsi_idc.errors import StoreBusyError, UsageError
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import hold_store, open_store
from wsi_idc.store.backing import backing_at
from wsi_idc.verify import verify


@pytest.fixture(scope="module")
def place(tmp_path_factory, make):
    """A folder with two slides, their manifest, a bundle, and the store that they were made into."""
    folder = tmp_path_factory.mktemp("verify")
    make.tissue_slide(folder / "a.tif", seed=1)
    make.tissue_slide(folder / "b.tif", 600, 500, seed=2)
    make.write_bundle(folder / "bundle")
    (folder / "m.csv").write_text("path\na.tif\nb.tif\n")
    run(folder, folder / "tiles.zarr", make)
    return folder


def run(folder, address, make):
    """Extract and infer; gives the reason of each slide that was done, of both."""
    rows, nobody = read_manifest(folder / "m.csv"), make.recorder()
    cut = extract(rows, address, ExtractSettings(), listener=nobody)
    scored = infer(address, read_bundle(folder / "bundle"), InferSettings(), listener=nobody)
    assert not cut.failures and not scored.failures
    done = [summary.plans for summary in (cut, scored)]
    return [{name: plan.reason for name, plan in plans.items() if plan.action != "skip"} for plans in done]


@pytest.fixture
def store(place, tmp_path):
    """A copy of it, which a test may damage: the address."""
    return shutil.copytree(place / "tiles.zarr", tmp_path / "tiles.zarr")


def look(address, make, **options):
    return verify(address, listener=make.recorder(), **options)


def bad(found):
    return [(finding.key, finding.problem) for finding in found.findings if finding.bad]


def files(address):
    """Every file of a folder: its content."""
    return {path.relative_to(address): path.read_bytes() for path in Path(address).rglob("*") if path.is_file()}


def flip(path, where=-20):
    """Change a byte."""
    content = bytearray(path.read_bytes())
    content[where] ^= 0xFF
    path.write_bytes(content)


def edit(path, change):
    """Change what a record says."""
    document = json.loads(path.read_text())
    change(document["attributes"])
    path.write_text(json.dumps(document))


def set_values(address, path, change):
    """Change an array as a program would: whole chunks, sound by themselves."""
    array = zarr.open_array(address, path=path, mode="r+")
    values = array[...]
    change(values)
    array[...] = values


def test_a_store_that_is_whole_is_whole_and_nothing_is_written(store, make):
    before = files(store)
    found = look(store, make)
    assert (found.slides, found.maps, list(found.findings)) == (2, 2, [])
    assert look(store, make, repair=True).repairs == []
    assert files(store) == before


SLIDE = ("tiles", "cell", "position", "tissue", "idc", "blur", "pen", "thumbnail", "tissue_mask")


HOW = ("a byte", "gone", "metadata")
# `idc` is unknown everywhere: zarr keeps no file of its values.
WAYS = [(name, how) for name in SLIDE for how in HOW if (name, how) != ("idc", "a byte")]


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_damage_to_any_array_of_a_slide_is_named(store, make, name, how):
    folder = store / "slides" / "a" / name
    if how == "a byte":
        chunk = next(path for path in (folder / "c").rglob("*") if path.is_file())
        flip(chunk, len(chunk.read_bytes()) // 2)
    elif how == "gone":
        shutil.rmtree(folder)
    else:
        (folder / "zarr.json").write_text("{")
    ((key, _),) = bad(look(store, make))
    assert key == f"slides/a/{name}"


RECORDS = {
    "garbage": lambda path: path.write_text("{"),
    "another thing": lambda path: path.write_text('{"zarr_format": 3, "node_type": "array"}'),
    "a count": lambda path: edit(path, lambda known: known["complete"].update(tiles=23)),
    "a resolution": lambda path: edit(path, lambda known: known.update(mpp=[4.1, 4.1])),
    "a tile size": lambda path: edit(path, lambda known: known["tile"].update(size_px=51)),
    "an identity": lambda path: edit(path, lambda known: known["complete"].update(identity="0" * 16)),
    "no checksums": lambda path: edit(path, lambda known: known["complete"].pop("checksums")),
    "a grid that is none": lambda path: edit(path, lambda known: known["complete"].update(grid=5)),
    "an array less": lambda path: edit(path, lambda known: known["complete"]["checksums"].pop("blur")),
    "no tiles": lambda path: edit(path, lambda known: known["complete"]["checksums"].pop("tiles")),
}


@pytest.mark.parametrize("how", RECORDS)
def test_a_damaged_record_is_found(store, make, how):
    RECORDS[how](store / "slides" / "a" / "zarr.json")
    found = look(store, make)
    assert bad(found) and all(key.startswith("slides/a") for key, _ in bad(found))
    look(store, make, repair=True)
    assert bad(look(store, make)) == []


@pytest.mark.parametrize("name", ["0", "probability"])
def test_damage_to_a_map_is_named(store, make, name):
    chunk = next(path for path in (store / "maps" / "mean" / "b" / name / "c").rglob("*") if path.is_file())
    flip(chunk)
    assert [key for key, _ in bad(look(store, make))] == [f"maps/mean/b/{name}"]


def test_an_image_that_is_not_its_probabilities_is_found_though_its_checksum_is_right(store, make):
    from wsi_idc.digests import checksum

    set_values(store, "maps/mean/b/0", lambda values: np.copyto(values, np.roll(values, 1, axis=0)))
    image = zarr.open_array(store, path="maps/mean/b/0", mode="r")[...]
    edit(
        store / "maps" / "mean" / "b" / "zarr.json",
        lambda known: known["complete"]["checksums"].update({"0": checksum(image)}),
    )
    assert bad(look(store, make)) == [("maps/mean/b/0", "it is not its probabilities at the tiles' cells")]


@pytest.mark.parametrize("group", ["slides/a", "maps/mean/a"])
def test_an_array_of_a_version_to_come_is_read_by_its_checksum(store, make, group):
    edit(store / group / "zarr.json", lambda known: known["complete"]["checksums"].update(shade="0" * 16))
    assert [key for key, _ in bad(look(store, make))] == [f"{group}/shade"]


def test_counts_of_a_map_that_disagree_are_found(store, make):
    edit(store / "maps" / "mean" / "b" / "zarr.json", lambda known: known["complete"].update(positive=7))
    ((key, problem),) = bad(look(store, make))
    assert key == "maps/mean/b/zarr.json" and problem.startswith("7 tiles from the threshold on are recorded")


def test_what_is_repaired_is_done_again_by_the_next_run_and_the_rest_is_left(place, store, make):
    flip(next((store / "slides" / "a" / "tiles" / "c").rglob("0/0/0/0")), 100)
    flip(next((store / "maps" / "mean" / "b" / "0" / "c").rglob("0/0")))
    before = {path: content for path, content in files(store).items() if path.parts[:2] == ("slides", "b")}
    found = look(store, make, repair=True)
    assert found.repairs == [
        "slides/a: hidden as failed, the next extract cuts it again",
        "maps/mean/b: removed, the next infer makes it again",
    ]
    assert {path: content for path, content in files(store).items() if path.parts[:2] == ("slides", "b")} == before
    failed = open_store(store).slide_node("a").record().failed
    assert failed.startswith("damaged in the store: slides/a/tiles: tiles 0 to 23 are not what was written")
    # The map of the slide that is cut again is the same slide's: it stays.
    assert run(place, store, make) == [{"a": "failed last time"}, {"b": "new"}]
    assert list(look(store, make).findings) == []
    assert [path for path in files(store) if "lease" in path.parts] == [Path("lease/zarr.json")]


@pytest.mark.parametrize("key", ["zarr.json", "slides/zarr.json", "maps/zarr.json", "maps/mean/zarr.json"])
@pytest.mark.parametrize("content", [None, b"{"])
def test_a_document_of_the_store_that_is_lost_is_named_and_put_back(place, store, make, key, content):
    whole = json.loads((store / key).read_bytes())
    (store / key).unlink()
    if content is not None:
        (store / key).write_bytes(content)
    assert [found for found, _ in bad(look(store, make))] == [key]
    assert f"{key}: written anew" in look(store, make, repair=True).repairs
    mended = json.loads((store / key).read_bytes())
    if key == "maps/mean/zarr.json":
        assert mended["attributes"]["files"] == whole["attributes"]["files"]
    else:
        assert mended == whole
    assert list(look(store, make).findings) == []
    assert run(place, store, make) == [{}, {}]


def test_a_folder_that_is_no_store_is_not_made_one(tmp_path, make):
    (tmp_path / "precious.txt").write_text("hello")
    with pytest.raises(UsageError, match="not a tile store"):
        look(tmp_path, make, repair=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_what_no_record_names_is_told_and_removed_by_repair_but_never_what_is_somebody_elses(store, make):
    strays = ["slides/a/tiles/c/9/0/0/0", "maps/mean/b/alone/zarr.json", "slides/.zarr.json.1.part"]
    others = ["README.txt", "slides/.ipynb_checkpoints/x", "maps/notes.txt", "slides/a/notes.txt"]
    others.append("maps/mean/.ipynb_checkpoints/x")
    for key in strays + others:
        (store / key).parent.mkdir(parents=True, exist_ok=True)
        (store / key).write_text("x")
    found = look(store, make)
    assert bad(found) == []
    assert {finding.key for finding in found.findings if finding.kind == "leftover"} == set(strays)
    notes = {finding.key for finding in found.findings if finding.kind == "note"}
    assert {"README.txt", "slides/.ipynb_checkpoints", "maps/notes.txt"} <= notes
    look(store, make, repair=True)
    assert not any((store / key).exists() for key in strays)
    assert [key for key in others if not (store / key).exists()] == []
    assert look(store, make).count("leftover") == 0


def test_what_a_killed_run_began_is_told_as_no_damage_and_removed_by_repair(store, make):
    with hold_store(store) as held:
        for node in (held.slide_node("c"), held.map_node("mean", "b")):
            node.begin()
            node.put("cell", np.zeros((3, 2), np.int32), ("tile", "axis"))
        found = look(store, make)
        assert bad(found) == [] and found.count("begun") == 0
        assert {finding.key for finding in found.findings} == {"slides/c", "maps/mean/b"}
        assert "not finished yet (host " in found.findings[0].problem
    found = look(store, make)
    assert bad(found) == [] and found.count("begun") == 2
    look(store, make, repair=True)
    assert open_store(store).all_slide_ids() == ["a", "b"]
    assert list(look(store, make).findings) == []


def test_a_store_that_a_run_holds_is_looked_at_and_not_repaired(store, make):
    flip(next((store / "slides" / "a" / "tiles" / "c").rglob("0/0/0/0")), 100)
    with hold_store(store):
        assert len(bad(look(store, make))) == 1
        before = files(store)
        with pytest.raises(StoreBusyError):
            look(store, make, repair=True)
        assert files(store) == before


def test_a_slide_that_is_cut_again_while_it_is_read_is_not_called_damaged(store, make, monkeypatch):
    from wsi_idc.store import StoredSlide

    read, left = StoredSlide.read_tiles, [1]

    def meanwhile(slide, *arguments):
        if left and slide.slide_id == "a":
            left.pop()
            path = store / "slides" / "a" / "zarr.json"
            edit(path, lambda known: known.update(attempt="another"))
            raise slide.node.damaged("tiles", "it is half written")
        return read(slide, *arguments)

    monkeypatch.setattr(StoredSlide, "read_tiles", meanwhile)
    found = look(store, make)
    assert list(found.findings) == [] and found.slides == 2


def test_what_the_disk_does_not_give_is_named_and_never_removed(store, make, monkeypatch):
    from wsi_idc.store import StoredSlide

    def broken(slide, *arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(StoredSlide, "read_tiles", broken)
    before = files(store)
    found = look(store, make, repair=True)
    assert bad(found) == [(f"slides/{name}", "cannot be read: Input/output error") for name in "ab"]
    assert files(store) == before


def test_a_map_without_tiles_is_noted_and_what_lies_there_is_still_checked(store, make):
    shutil.rmtree(store / "slides" / "a")
    (note,) = look(store, make).findings
    assert (note.kind, note.key) == ("note", "maps/mean/a") and "there are no sound tiles" in note.problem
    flip(next((store / "maps" / "mean" / "a" / "0" / "c").rglob("0/0")))
    assert [key for key, _ in bad(look(store, make))] == ["maps/mean/a/0"]


def test_it_can_be_limited_and_what_is_not_there_is_refused(store, make):
    flip(next((store / "maps" / "mean" / "b" / "0" / "c").rglob("0/0")))
    assert bad(look(store, make, only=["a"])) == []
    assert look(store, make, only=["b"]).maps == 1
    for options, message in (({"only": ["c"]}, "no such slide in the store"), ({"model": "x"}, "it has mean")):
        with pytest.raises(UsageError, match=message):
            look(store, make, **options)


def test_tiles_without_pixels_and_slides_without_tissue_are_whole_too(place, tmp_path, make):
    make.tissue_slide(tmp_path / "empty.tif", 200, 200, 100)
    shutil.copy(place / "a.tif", tmp_path)
    (tmp_path / "m.csv").write_text("path\na.tif\nempty.tif\n")
    address, nobody = tmp_path / "tiles.zarr", make.recorder()
    extract(read_manifest(tmp_path / "m.csv"), address, ExtractSettings(pixels=False), listener=nobody)
    infer(address, read_bundle(place / "bundle"), InferSettings(), listener=nobody)
    found = look(address, make)
    assert (found.slides, found.maps, list(found.findings)) == (2, 2, [])


def test_the_command_names_damage_on_stderr_and_exits_with_1(store):
    flip(next((store / "slides" / "a" / "tiles" / "c").rglob("0/0/0/0")), 100)
    done = CliRunner().invoke(app, ["verify", "--store", str(store)])
    assert done.exit_code == 1
    assert done.stderr == "failed a: slides/a/tiles: tiles 0 to 23 are not what was written\n"
    assert done.stdout.splitlines()[-1].startswith("verify: 2 slides and 2 maps read, 1 damaged, 0 left over")
    done = CliRunner().invoke(app, ["verify", "--store", str(store), "--json", "--repair"])
    assert done.exit_code == 1
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (finding,) = [event for event in events if event["event"] == "damage"]
    assert (finding["key"], finding["slide"]) == ("slides/a/tiles", "a")
    assert events[-1]["repaired"] == 1
    done = CliRunner().invoke(app, ["verify", "--store", str(store), "-q"])
    assert (done.exit_code, done.output) == (0, "")


def test_an_object_store_is_verified_and_repaired_like_a_folder(place, objects, make):
    url = f"s3://{objects.bucket()}/some/where"
    run(place, url, make)
    found = look(url, make)
    assert (found.slides, found.maps, list(found.findings)) == (2, 2, [])
    backing = backing_at(url)
    key = next(key for key in backing.keys("slides/a/tiles") if "/c/" in key)
    shard = bytearray(backing.read(key))
    shard[100] ^= 0xFF
    backing.write(key, bytes(shard))
    backing.write("slides/b/tiles/stray", b"x")
    found = look(url, make)
    bad_keys = [finding.key for finding in found.findings if finding.kind != "note"]
    assert bad_keys == ["slides/a/tiles", "slides/b/tiles/stray"]
    look(url, make, repair=True)
    assert run(place, url, make) == [{"a": "failed last time"}, {}]
    assert list(look(url, make).findings) == []
