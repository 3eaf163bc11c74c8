"""A result exists when its record says so, and not before."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from wsi_idc.errors import OvertakenError, StoreBusyError, StoreDamageError, StoreError
from wsi_idc.settings import TileSpec
from wsi_idc.store import MapState, Record, StoredMap, hold_store, open_store
from wsi_idc.store.slide import create_tiles, identity, tiles_per_chunk, tiles_per_shard, write_shards

SPEC = TileSpec(size_px=8)


@pytest.fixture
def store(tmp_path):
    with hold_store(tmp_path / "tiles.zarr", create=True) as held:
        yield held


def attributes(**complete):
    whole = {"tiles": 3, "identity": "x", "checksums": {}, "made_from": {"tile size": 8}, **complete}
    about = {"patient_id": "p", "split": "", "path": "a.tif", "size": [24, 8], "mpp": [4.0, 4.0]}
    return {**about, "tile": SPEC.content(), "complete": whole}


def put_slide(store, name="a", count=3):
    node = store.slide_node(name)
    attempt = node.begin()
    create_tiles(node, SPEC, count)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    shard = tiles_per_shard(8)
    parts = iter([pixels[start : start + shard] for start in range(0, count, shard)])
    checksums = {
        "tiles": [checksum for _, checksum in write_shards(node, attempt, 0, parts)],
        "cell": node.put("cell", np.zeros((count, 2), np.int32), ("tile", "axis")),
    }
    node.commit(attributes(tiles=count, checksums=checksums), attempt)
    return pixels


def test_a_group_with_arrays_but_no_record_is_invisible(store):
    node = store.slide_node("a")
    attempt = node.begin()
    node.put("cell", np.zeros((3, 2), np.int32), ("tile", "axis"))
    assert store.slide_ids() == []
    assert store.all_slide_ids() == ["a"]
    with pytest.raises(StoreError, match="not extracted"):
        store.slide("a")
    node.commit(attributes(), attempt)
    assert store.slide_ids() == ["a"]
    assert store.slide("a").count == 3


def test_beginning_again_clears_what_was_there(store):
    put_slide(store)
    store.slide_node("a").begin()
    assert store.slide_ids() == []
    assert store.backing.folders("slides/a") == []


def test_a_failure_hides_an_older_result_without_removing_it(store):
    put_slide(store)
    node = store.slide_node("a")
    node.fail("disk on fire")
    assert store.slide_ids() == []
    assert node.record().complete["tiles"] == 3
    assert node.record().failed == "disk on fire"
    with pytest.raises(StoreError, match="disk on fire"):
        store.slide("a")
    put_slide(store)
    assert node.record().failed is None


def test_what_a_failed_attempt_left_is_removed(store):
    node = store.slide_node("a")
    node.begin()
    node.put("cell", np.zeros((3, 2), np.int32), ("tile", "axis"))
    node.fail("broken")
    assert store.backing.folders("slides/a") == []
    assert node.record().attributes == {"failed": "broken"}


def test_a_task_that_was_overtaken_commits_nothing(store):
    node = store.slide_node("a")
    slow = node.begin()
    quick = node.begin()
    with pytest.raises(OvertakenError):
        node.commit(attributes(tiles=1), slow)
    assert store.slide_ids() == []
    node.commit(attributes(tiles=2), quick)
    with pytest.raises(OvertakenError):
        node.commit(attributes(tiles=1), slow)
    assert store.slide("a").count == 2


def test_a_task_that_was_overtaken_writes_no_shard_more(store):
    node = store.slide_node("a")
    slow = node.begin()
    create_tiles(node, SPEC, 3)
    node.begin()
    create_tiles(node, SPEC, 3)
    with pytest.raises(OvertakenError):
        list(write_shards(node, slow, 0, iter([np.ones((3, 8, 8, 3), np.uint8)])))
    assert not node.array("tiles")[...].any()


def test_a_task_that_is_begun_again_writes_and_commits_the_same_again(store):
    node = store.slide_node("a")
    attempt = node.begin()
    for _ in range(2):
        checksum = node.put("blur", np.arange(3, dtype=np.float32), ("tile",))
        node.commit(attributes(checksums={"blur": checksum}), attempt)
        assert store.slide("a").blur.tolist() == [0, 1, 2]


def test_who_lost_the_store_writes_nothing_more(store):
    node = store.slide_node("a")
    attempt = node.begin()
    put_slide(store, "b")
    store.backing.write("lease/holder.json", b'{"nonce": "another"}')
    for write in (
        lambda: node.commit(attributes(), attempt),
        node.begin,
        lambda: node.fail("broken"),
        lambda: store.slide_node("b").update({"patient_id": "q"}),
    ):
        with pytest.raises(StoreBusyError, match="another run has taken the store over"):
            write()
    assert store.slide_ids() == ["b"]
    assert node.record().attributes == {"attempt": attempt}


def test_attributes_can_be_replaced_while_the_result_stays(store):
    put_slide(store)
    before = store.slide_node("a").record().complete
    store.slide_node("a").update({"patient_id": "q"})
    assert store.slide("a").patient_id == "q"
    assert store.slide_node("a").record().complete == before


def test_empty_arrays_can_be_stored(store):
    node = store.slide_node("a")
    node.begin()
    checksum = node.put("cell", np.zeros((0, 2), np.int32), ("tile", "axis"))
    assert node.read("cell", checksum).shape == (0, 2)


def test_the_store_is_zarr_and_says_what_it_is(store):
    group = zarr.open_group(store.address, mode="r")
    assert dict(group.attrs) == {"format": "wsi-idc-store/2"}
    assert set(group.group_keys()) == {"slides", "maps"}
    assert group["lease"].shape == (0,)


@given(st.sampled_from([8, 16, 50, 64, 224, 512, 4096]))
def test_chunks_are_powers_of_two_and_shards_are_whole_chunks(size):
    chunk = tiles_per_chunk(size)
    assert chunk & (chunk - 1) == 0
    assert tiles_per_shard(size) % chunk == 0
    assert chunk * size * size * 3 <= max(2**20, size * size * 3)


def test_tiles_are_read_by_whole_chunks_and_no_chunk_twice(store, monkeypatch):
    monkeypatch.setattr("wsi_idc.store.slide.CHUNK_BYTES", 8 * 8 * 3 * 2)
    monkeypatch.setattr("wsi_idc.store.slide.CHUNKS_PER_READ", 2)
    monkeypatch.setattr("wsi_idc.store.slide.CHUNKS_PER_SHARD", 4)
    pixels = put_slide(store, count=21)
    slide = store.slide("a")
    read = []
    get = zarr.Array.__getitem__

    def counted(array, selection):
        read.append((selection.start, selection.stop))
        return get(array, selection)

    monkeypatch.setattr(zarr.Array, "__getitem__", counted)
    assert np.array_equal(np.concatenate(list(slide.read_tiles())), pixels)
    assert read == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 21)]
    assert np.array_equal(np.concatenate(list(slide.read_tiles(8, 16))), pixels[8:16])
    with pytest.raises(ValueError, match="whole shards"):
        next(slide.read_tiles(4, 8))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_damage_is_found_in_whichever_shard_it_is(store, monkeypatch, which):
    monkeypatch.setattr("wsi_idc.store.slide.CHUNK_BYTES", 8 * 8 * 3 * 4)
    monkeypatch.setattr("wsi_idc.store.slide.CHUNKS_PER_SHARD", 2)
    put_slide(store, count=21)
    store.backing.delete(f"slides/a/tiles/c/{which}")
    with pytest.raises(StoreDamageError, match="not what was written"):
        list(store.slide("a").read_tiles())
    if which != 0:
        list(store.slide("a").read_tiles(0, 8))


def test_an_array_that_is_gone_or_of_another_shape_is_damage(store):
    put_slide(store)
    node, slide = store.slide_node("a"), store.slide("a")
    array = zarr.open_array(store.backing.zarr(read_only=False), path="slides/a/tiles", mode="r+")
    array.resize((2, 8, 8, 3))
    with pytest.raises(StoreDamageError, match="shape"):
        list(slide.read_tiles())
    store.backing.delete("slides/a/cell")
    with pytest.raises(StoreDamageError, match="run wsi-idc extract again"):
        _ = slide.cell
    assert node.record().usable


def test_the_identity_changes_with_all_that_a_model_could_see():
    one = identity(SPEC, (4.0, 4.0), "cells", ["a", "b"])
    assert one == identity(SPEC, [4.0, 4.0], "cells", ("a", "b"))
    others = [
        identity(TileSpec(size_px=9), (4.0, 4.0), "cells", ["a", "b"]),
        identity(SPEC, (4.0, 4.1), "cells", ["a", "b"]),
        identity(SPEC, (4.0, 4.0), "other", ["a", "b"]),
        identity(SPEC, (4.0, 4.0), "cells", ["a", "c"]),
        identity(SPEC, (4.0, 4.0), "cells", {"source": "a"}),
    ]
    assert len({one, *others}) == 6


@pytest.mark.parametrize(
    "make_it", ["nothing", "a file", "another folder", "another zarr", "another version", "garbage"]
)
def test_what_is_no_store_is_refused(tmp_path, make_it):
    path = tmp_path / "x"
    if make_it == "a file":
        path.write_text("hello")
    elif make_it == "another folder":
        path.mkdir()
        (path / "precious.txt").write_text("hello")
    elif make_it == "another zarr":
        zarr.create_group(path)
    elif make_it == "another version":
        zarr.create_group(path, attributes={"format": "wsi-idc-store/99"})
    elif make_it == "garbage":
        path.mkdir()
        (path / "zarr.json").write_text("[" * 100_000)
    with pytest.raises(StoreError):
        open_store(path)
    if make_it != "nothing":
        with pytest.raises(StoreError), hold_store(path, create=True):
            pass
    assert make_it != "another folder" or [item.name for item in path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"null", b"\xff\xfe", b'{"zarr_format": 2, "node_type": "group"}', b"[" * 100_000,
     b'{"zarr_format": 3, "node_type": "group", "attributes": 5}'],
)  # fmt: skip
def test_damaged_metadata_hide_a_slide_and_are_named(store, content):
    put_slide(store, "a")
    put_slide(store, "b")
    store.backing.write("slides/a/zarr.json", content)
    assert store.slide_node("a").record().trouble.startswith("its metadata are damaged")
    assert store.slide_ids() == ["b"]
    with pytest.raises(StoreError, match="metadata are damaged"):
        store.slide("a")


def test_a_record_that_lacks_what_every_slide_has_is_damage(store):
    put_slide(store)
    document = json.loads(store.backing.read("slides/a/zarr.json"))
    del document["attributes"]["complete"]["identity"]
    store.backing.write("slides/a/zarr.json", json.dumps(document).encode())
    with pytest.raises(StoreDamageError, match=r"complete\.identity"):
        store.slide("a")


def test_a_store_of_a_format_to_come_is_refused_and_one_before_is_hidden(store):
    put_slide(store)
    document = json.loads(store.backing.read("slides/a/zarr.json"))
    document["attributes"]["complete"]["format"] = "wsi-idc-store/1"
    store.backing.write("slides/a/zarr.json", json.dumps(document).encode())
    assert store.slide_ids() == []
    assert store.slide_node("a").record().trouble == "made by an older version of the store's format"


def test_two_runs_cannot_hold_one_store(store):
    with pytest.raises(StoreBusyError), hold_store(store.address):
        pass


def test_of_ten_who_begin_a_store_at_once_one_works_and_nine_are_told_to_wait(tmp_path):
    code = f"""
import sys
from wsi_idc.errors import WsiIdcError
from wsi_idc.store import hold_store
try:
    with hold_store({str(tmp_path / "new.zarr")!r}, create=True):
        sys.stdin.readline()
except WsiIdcError as error:
    sys.exit(error.exit_code)
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) for _ in range(10)]
    for _ in range(600):
        if sum(run.poll() is not None for run in runs) >= 9:
            break
        time.sleep(0.1)
    codes = [run.poll() for run in runs]
    for run in runs:
        run.communicate("end\n")
    assert sorted(codes, key=str) == [*[75] * 9, None]
    assert [run.returncode for run in runs].count(0) == 1
    assert open_store(tmp_path / "new.zarr").slide_ids() == []


NEED = {"model": "m", "precision": "int8"}


def record(**changes):
    made_from = {"tiles": "x", **NEED}
    return Record({"complete": {"format": "wsi-idc-store/2", "made_from": made_from}, **changes})


class Tiles:
    """Stands for a slide: its identity is all that counts."""

    identity = "x"


@pytest.mark.parametrize(
    ("found", "slide", "needs", "state"),
    [
        (Record(), Tiles(), [NEED], MapState("none")),
        (record(), Tiles(), [NEED], MapState("current")),
        (record(), Tiles(), [], MapState("current")),
        (record(), Tiles(), [{"model": "other"}, NEED], MapState("current")),
        (record(), Tiles(), [{**NEED, "precision": "float32"}], MapState("stale", "precision changed")),
        (record(), None, [NEED], MapState("stale", "the slide's tiles are not complete")),
        (record(failed="no"), Tiles(), [NEED], MapState("failed", "no")),
        (Record(damage="bad"), Tiles(), [NEED], MapState("stale", "its metadata are damaged (bad)")),
        (
            Record({"complete": {"made_from": {}}}),
            Tiles(),
            [NEED],
            MapState("stale", "made by an older version of the store's format"),
        ),
    ],
)
def test_there_is_one_answer_to_whether_a_map_is_current(store, found, slide, needs, state):
    stored = StoredMap(store.map_node("m", "a"), found)
    assert stored.state(slide, needs) == state
    if slide is not None and needs:
        assert (stored.plan(slide, needs[-1], force=False).action == "skip") == (state.kind == "current")


def test_a_map_of_other_tiles_is_stale(store):
    class Others:
        identity = "y"

    assert str(StoredMap(store.map_node("m", "a"), record()).state(Others(), [NEED])) == "stale (tiles changed)"


def test_how_arrays_are_packed_is_in_their_metadata_and_no_part_of_what_they_hold(store, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("wsi_idc.store.node.compressors", lambda: (zarr.codecs.BloscCodec(cname="lz4"),))
        pixels = put_slide(store, "old", count=9)
    assert np.array_equal(pixels, put_slide(store, "new", count=9))
    old, new = store.slide("old"), store.slide("new")
    assert old.node.array("tiles").compressors != new.node.array("tiles").compressors
    assert np.array_equal(np.concatenate(list(old.read_tiles())), pixels)
    assert old.node.record().complete["checksums"] == new.node.record().complete["checksums"]


@pytest.mark.parametrize("value", [0.0, np.nan, 1.0])
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float32])
def test_of_values_that_are_all_missing_no_chunk_is_written(store, value, dtype):
    if np.isnan(value) and dtype != np.float32:
        return
    node = store.slide_node("a")
    node.begin()
    values = np.full((3, 4), value, dtype)
    checksum = node.put("values", values, ("y", "x"))
    assert np.array_equal(node.read("values", checksum), values, equal_nan=dtype == np.float32)
    missing = np.isnan(value) if dtype == np.float32 else not value
    assert len(list(store.backing.keys("slides/a/values"))) == (1 if missing else 2)


def test_black_tiles_are_read_as_they_were_written(store):
    node = store.slide_node("a")
    attempt = node.begin()
    create_tiles(node, SPEC, 5)
    (written,) = write_shards(node, attempt, 0, iter([np.zeros((5, 8, 8, 3), np.uint8)]))
    node.commit(attributes(tiles=5, checksums={"tiles": [written[1]]}), attempt)
    (tiles,) = store.slide("a").read_tiles()
    assert tiles.shape == (5, 8, 8, 3) and not tiles.any()
