"""A result exists when its record says so, and not before."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import zarr

from wsi_idc.errors import StoreBusyError, StoreError
from wsi_idc.settings import TileSpec
from wsi_idc.store import create_store, open_store, tiles_per_chunk, tiles_per_shard


@pytest.fixture
def store(tmp_path):
    return create_store(tmp_path / "tiles.zarr", TileSpec())


def test_a_group_with_arrays_but_no_record_is_invisible(store):
    node = store.slide_node("a")
    node.begin()
    node.put("cell", np.zeros((3, 2), np.int32), ("tile", "axis"))
    assert store.slide_ids() == []
    assert store.all_slide_ids() == ["a"]
    with pytest.raises(StoreError, match="not extracted"):
        store.slide("a")
    node.commit({"patient_id": "p", "complete": {"tiles": 3}})
    assert store.slide_ids() == ["a"]
    assert store.slide("a").count == 3


def test_beginning_again_clears_what_was_there(store):
    node = store.slide_node("a")
    node.begin()
    node.put("cell", np.zeros((3, 2), np.int32), ("tile", "axis"))
    node.commit({"complete": {"tiles": 3}})
    node.begin()
    assert store.slide_ids() == []
    assert not (node.folder / "cell").exists()


def test_a_failure_hides_an_older_result_without_removing_it(store):
    node = store.slide_node("a")
    node.begin()
    node.commit({"complete": {"tiles": 3}})
    node.fail("disk on fire")
    assert store.slide_ids() == []
    assert node.record().complete == {"tiles": 3}
    assert node.record().failed == "disk on fire"
    node.begin()
    node.commit({"complete": {"tiles": 4}})
    assert node.record().failed is None


def test_what_a_failed_attempt_left_is_removed(store):
    node = store.slide_node("a")
    node.begin()
    node.put("cell", np.zeros((3, 2), np.int32), ("tile", "axis"))
    node.fail("disk full")
    assert [path.name for path in node.folder.iterdir()] == ["zarr.json"]


def test_a_slide_that_was_never_begun_can_fail(store):
    store.slide_node("a").fail("no such thing")
    assert store.slide_node("a").record().failed == "no such thing"


def test_attributes_can_be_replaced_while_the_result_stays(store):
    node = store.slide_node("a")
    node.begin()
    node.commit({"patient_id": "p", "complete": {"tiles": 3}})
    node.update({"patient_id": "q"})
    assert dict(node.record().attributes) == {"patient_id": "q", "complete": {"tiles": 3}}


def test_empty_arrays_can_be_stored(store):
    node = store.slide_node("a")
    node.begin()
    node.put("cell", np.zeros((0, 2), np.int32), ("tile", "axis"))
    assert node.array("cell")[...].shape == (0, 2)


def test_the_store_is_zarr_and_says_what_it_is(store):
    attributes = dict(zarr.open_group(store.path, mode="r").attrs)
    assert attributes == {
        "format": "wsi-idc-store/1",
        "tile": {"size_px": 50, "mpp": 4.0, "stride_px": 50, "last": "keep"},
    }
    assert open_store(store.path).spec == TileSpec()


def test_shards_are_whole_chunks():
    for size in (8, 50, 224, 4096):
        assert tiles_per_shard(size) % tiles_per_chunk(size) == 0
        assert tiles_per_chunk(size) * size * size * 3 <= max(2**20, size * size * 3)


@pytest.mark.parametrize("make_it", ["nothing", "a file", "another folder", "another zarr", "another version"])
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
    with pytest.raises(StoreError):
        open_store(path)
    if make_it != "nothing":
        with pytest.raises(StoreError):
            create_store(path, TileSpec())
    assert make_it != "another folder" or (path / "precious.txt").read_text() == "hello"


def test_damaged_metadata_is_named(store):
    node = store.slide_node("a")
    node.begin()
    (node.folder / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="damaged metadata"):
        node.record()


def test_two_runs_cannot_hold_one_store(store):
    with store.lock():
        code = f"""
            from pathlib import Path
            from wsi_idc.errors import StoreBusyError
            from wsi_idc.store import open_store
            try:
                with open_store(Path({str(store.path)!r}), read_only=False).lock():
                    print("held")
            except StoreBusyError as error:
                print(error.exit_code)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "75"
    with store.lock():
        pass


def test_a_lock_of_a_killed_run_is_no_lock(store):
    code = f"""
        import os
        from pathlib import Path
        from wsi_idc.store import open_store
        with open_store(Path({str(store.path)!r}), read_only=False).lock():
            os._exit(9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    with store.lock(), pytest.raises(StoreBusyError), open_store(store.path, read_only=False).lock():
        pass
