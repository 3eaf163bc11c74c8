"""What every backing promises, and every lease: one suite for all of them."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from wsi_idc.errors import StoreBusyError, UsageError
from wsi_idc.store.backing import FolderBacking, backing_at, holds


@pytest.fixture(params=["folder", "objects"])
def backing(request, tmp_path):
    """A fresh backing of each kind."""
    if request.param == "folder":
        return backing_at(tmp_path / "store")
    return backing_at(f"s3://{request.getfixturevalue('objects').bucket()}/a prefix/store")


def test_what_was_written_is_read_and_replaced_whole(backing):
    assert backing.read("a/b") is None
    backing.write("a/b", b"one")
    assert backing.read("a/b") == b"one"
    backing.write("a/b", b"another")
    assert backing.read("a/b") == b"another"
    assert backing.read("a") is None


def test_readers_see_the_old_object_or_the_new_one(backing):
    contents = [bytes([number]) * 200_000 for number in range(6)]
    backing.write("a", contents[0])
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(backing.read("a"))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents * 3:
        backing.write("a", content)
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_an_object_is_replaced_only_where_it_is_what_it_was(backing):
    assert not backing.replace("a", b"", b"new")
    backing.write("a", b"old")
    assert not backing.replace("a", b"other", b"new")
    assert backing.read("a") == b"old"
    assert backing.replace("a", b"old", b"new")
    assert backing.read("a") == b"new"


def test_deleting_takes_the_object_and_all_below_and_nothing_beside(backing):
    for key in ("a/b", "a/b/c", "a/bc", "ab") if not isinstance(backing, FolderBacking) else ("a/b/c", "a/bc", "ab"):
        backing.write(key, b"x")
    backing.delete("a/b")
    assert backing.read("a/b/c") is None
    assert backing.read("a/bc") == backing.read("ab") == b"x"
    backing.delete("a/b")
    backing.delete("ab")
    assert backing.read("ab") is None


def test_folders_are_what_has_something_below(backing):
    assert backing.folders("") == backing.folders("none") == []
    for key in ("slides/b/zarr.json", "slides/a/x/y", "slides/zarr.json"):
        backing.write(key, b"x")
    assert backing.folders("slides") == ["a", "b"]
    assert backing.folders("") == ["slides"]


def test_objects_are_what_lies_directly_below_and_keys_all_that_does(backing):
    assert backing.objects("") == list(backing.keys("none")) == []
    for key in ("zarr.json", "slides/zarr.json", "slides/b", "slides/a/x/y", "slidesx/z"):
        backing.write(key, b"x")
    assert backing.objects("") == ["zarr.json"]
    assert backing.objects("slides") == ["b", "zarr.json"]
    assert sorted(backing.keys("slides")) == ["slides/a/x/y", "slides/b", "slides/zarr.json"]
    assert sorted(backing.keys("")) == ["slides/a/x/y", "slides/b", "slides/zarr.json", "slidesx/z", "zarr.json"]


def test_names_that_are_odd_are_names(backing):
    for name in ("with space", "ümlaut", "per%20cent", "plus+", "hash#", "a.b", "'quote'"):
        backing.write(f"slides/{name}/zarr.json", name.encode())
        assert backing.read(f"slides/{name}/zarr.json") == name.encode()
        assert name in backing.folders("slides")


def test_zarr_sees_the_same_place(backing):
    import numpy as np
    import zarr

    array = zarr.create_array(backing.zarr(read_only=False), name="g/x", shape=(3,), dtype="uint8", zarr_format=3)
    array[...] = np.arange(3, dtype=np.uint8)
    assert json.loads(backing.read("g/x/zarr.json"))["node_type"] == "array"
    backing.flush("g")
    found = zarr.open_array(backing.zarr(read_only=True), path="g/x", mode="r")
    assert found[...].tolist() == [0, 1, 2]
    backing.delete("g/x")
    with pytest.raises(Exception, match="g/x"):
        zarr.open_array(backing.zarr(read_only=True), path="g/x", mode="r")


def test_the_lease_alone_is_nothing(backing):
    assert not backing.holds_anything()
    lease = backing.lease()
    lease.acquire()
    assert not backing.holds_anything()
    lease.release()
    backing.write("a", b"x")
    assert backing.holds_anything()


def test_one_has_the_lease_at_a_time_and_the_other_is_told_who(backing):
    first, second = backing.lease(), backing.lease()
    first.acquire()
    with pytest.raises(StoreBusyError, match=f"process {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_what_holds_the_lease_is_known_to_all_by_its_nonce(backing):
    first, second = backing.lease(), backing.lease()
    assert first.nonce == "" and not holds(backing, "")
    first.acquire()
    nonce = first.nonce
    assert holds(backing, nonce) and not holds(backing, "another")
    first.release()
    assert not holds(backing, nonce)
    second.acquire()
    assert second.nonce != nonce
    assert holds(backing, second.nonce) and not holds(backing, nonce)
    second.release()


def test_who_looks_sees_the_run_that_has_the_lease_and_takes_it_from_nobody(backing):
    lease = backing.lease()
    assert backing.lease().look() is None
    lease.acquire()
    seen = backing.lease().look()
    assert (seen.process, seen.alive, seen.does) == (os.getpid(), True, {})
    assert holds(backing, lease.nonce)
    lease.release()
    assert backing.lease().look() is None


def test_of_ten_at_once_one_gets_the_lease(backing):
    leases, got, start = [backing.lease() for _ in range(10)], [], threading.Barrier(10)

    def take(lease):
        start.wait()
        try:
            lease.acquire()
            got.append(lease)
        except StoreBusyError:
            pass

    threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_the_lease_of_a_killed_process_is_free(backing):
    code = f"""
        import os
        from wsi_idc.store.backing import backing_at
        backing_at({backing.address!r}).lease().acquire()
        os._exit(9)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert killed.returncode == 9
    lease = backing.lease()
    seen = lease.look()
    assert seen.alive is False and seen.host
    lease.acquire()
    lease.release()


@pytest.mark.parametrize("address", ["ftp://host/store", "s3://", "s3:///store", "http://host/store"])
def test_an_address_that_no_backing_has_is_refused(address):
    with pytest.raises(UsageError, match=address.partition(":")[0]):
        backing_at(address)


def test_a_backing_can_go_to_other_processes_and_threads(backing):
    backing.write("a", b"x")
    assert pickle.loads(pickle.dumps(backing)).read("a") == b"x"
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda number: backing.write(f"b/{number}/c", b"y"), range(40)))
        assert set(executor.map(lambda number: backing.read(f"b/{number}/c"), range(40))) == {b"y"}
    assert len(backing.folders("b")) == 40
