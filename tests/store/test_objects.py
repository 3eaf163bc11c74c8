"""A store in an object store: the lease, and what goes wrong."""

import json
import time
from dataclasses import dataclass

import numpy as np
import pytest
import zarr

from wsi_idc.errors import ObjectsError, StoreBusyError, StoreError
from wsi_idc.store.backing import HOLDER, holds
from wsi_idc.store.objects import ObjectBacking, ObjectLease


@pytest.fixture
def backing(objects):
    """A fresh place on the server."""
    return ObjectBacking(f"s3://{objects.bucket()}/store")


def wait_for(condition):
    """Wait until something holds; it must within a minute."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("did not come true")


def suspended(backing, lifetime_s):
    """The lease of a run that took it and then does not get to renew it."""
    lease = ObjectLease(backing, lifetime_s)
    lease._keep = lambda: None
    lease.acquire()
    return lease


def holder(backing):
    return json.loads(backing.read(HOLDER))


def test_the_lease_says_who_has_it_and_until_when_and_is_renewed(backing):
    lease = ObjectLease(backing, lifetime_s=3)
    lease.acquire()
    first = holder(backing)
    assert {"host", "pid", "start", "nonce", "expires"} <= set(first)
    wait_for(lambda: holder(backing)["expires"] > first["expires"])
    assert holds(backing, lease.nonce) and not lease.lost
    lease.release()
    assert not holds(backing, lease.nonce)


def test_the_lease_leaves_nothing_else_behind(backing):
    lease = backing.lease()
    lease.acquire()
    lease.release()
    import obstore

    found = [item["path"] for some in obstore.list(backing._objects) for item in some]
    assert found == [HOLDER]


def test_a_lease_that_expired_is_taken_over_and_its_run_has_lost_it(backing):
    first, second = suspended(backing, 1), ObjectLease(backing, 60)
    with pytest.raises(StoreBusyError, match=r"process \d+, since .* ends in \d s"):
        second.acquire()
    time.sleep(3)
    # Nobody took it over: it still is the run's own, also when it wakes now.
    assert holds(backing, first.nonce)
    first._renew()
    assert not first.lost
    time.sleep(3)
    second.acquire()
    assert holds(backing, second.nonce) and not holds(backing, first.nonce)
    first._renew()
    assert first.lost
    first.release()
    assert holds(backing, second.nonce) and not second.lost
    second.release()


def test_a_renewal_that_finds_another_run_knows_that_the_lease_is_lost(backing):
    lease = ObjectLease(backing, lifetime_s=0.6)
    lease.acquire()
    backing.write(HOLDER, b'{"nonce": "another"}')
    wait_for(lambda: lease.lost)
    lease.release()
    assert holder(backing)["nonce"] == "another"


def test_a_server_that_cannot_be_asked_for_a_while_costs_no_lease(proxy, objects):
    backing = ObjectBacking(f"s3://{objects.bucket()}/store")
    lease = ObjectLease(backing, lifetime_s=0.6)
    lease.acquire()
    asked = []

    def refuse(*request):
        asked.append(request)
        return (403, "AccessDenied")

    proxy.refuse = refuse
    wait_for(lambda: len(asked) > 2)
    proxy.refuse = lambda *request: None
    before = holder(backing)
    wait_for(lambda: holder(backing) != before)
    assert not lease.lost and holds(backing, lease.nonce)
    lease.release()


def test_the_lease_of_a_run_on_another_machine_is_waited_for(backing):
    lease = suspended(backing, 3600)
    elsewhere = {**holder(backing), "machine": "another", "pid": 2**30}
    backing.write(HOLDER, json.dumps(elsewhere).encode())
    with pytest.raises(StoreBusyError, match=r"its lease ends in 36\d\d s"):
        backing.lease().acquire()
    lease.release()


def test_a_lease_that_cannot_be_read_is_waited_for_like_any_other(backing):
    backing.write(HOLDER, b"[" * 10)
    with pytest.raises(StoreBusyError, match="another run holds the store;"):
        ObjectLease(backing, 3600).acquire()
    time.sleep(2)
    lease = ObjectLease(backing, 0.1)
    lease.acquire()
    lease.release()


def test_a_repeated_request_that_meets_what_it_did_itself_is_no_other_run(backing, monkeypatch):
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    put = ObjectBacking._put

    def repeated(self, key, content, mode="overwrite"):
        mark = put(self, key, content, mode)
        if key == HOLDER:
            raise (AlreadyExistsError if mode == "create" else PreconditionError)("as if it had been sent twice")
        return mark

    monkeypatch.setattr(ObjectBacking, "_put", repeated)
    lease = backing.lease()
    lease.acquire()
    lease._renew()
    assert not lease.lost and holds(backing, lease.nonce)
    lease.release()
    assert not holds(backing, lease.nonce)


@pytest.mark.parametrize("ignored", ["if-none-match", "if-match"])
def test_a_server_that_does_not_keep_conditions_is_refused(proxy, objects, ignored):
    proxy.ignored = (ignored,)
    backing = ObjectBacking(f"s3://{objects.bucket()}/store")
    with pytest.raises(StoreError, match="no conditional writes"):
        backing.lease().acquire()
    assert not backing.holds_anything() and backing.read(HOLDER) is None


@dataclass
class Case:
    """An error of the server's, and what is made of it."""

    status: int
    code: str
    told: str


CASES = [
    Case(403, "AccessDenied", "permission denied"),
    Case(403, "SignatureDoesNotMatch", "permission denied"),
    Case(400, "ExpiredToken", "credentials have expired"),
    Case(404, "NoSuchBucket", "no such bucket"),
    Case(405, "SomethingElse", "SomethingElse"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.code)
def test_what_goes_wrong_is_said_whatever_was_asked(proxy, objects, case):
    url = f"s3://{objects.bucket()}/store"
    backing = ObjectBacking(url)
    array = zarr.create_array(backing.zarr(read_only=False), name="g/x", shape=(3,), dtype="uint8", zarr_format=3)
    proxy.refuse = lambda *request: (case.status, case.code)
    asked = [
        lambda: backing.read("a"),
        lambda: backing.write("a", b"x"),
        lambda: backing.replace("a", b"x", b"y"),
        lambda: backing.delete("a"),
        lambda: backing.folders(""),
        lambda: backing.holds_anything(),
        lambda: array[...],
        lambda: array.__setitem__(..., np.arange(3, dtype=np.uint8)),
        lambda: zarr.open_array(backing.zarr(read_only=True), path="g/x", mode="r", zarr_format=3),
    ]
    for ask in asked:
        with pytest.raises(ObjectsError, match=case.told) as caught:
            ask()
        assert caught.value.filename == url
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match=case.told):
        backing.lease().acquire()


def test_a_conflict_that_no_condition_asked_for_is_an_error(proxy, objects):
    backing = ObjectBacking(f"s3://{objects.bucket()}/store")
    proxy.refuse = lambda *request: (409, "OperationAborted")
    with pytest.raises(ObjectsError, match="OperationAborted"):
        backing.write("a", b"x")


def test_a_bucket_that_is_not_there_is_no_empty_store(objects):
    backing = ObjectBacking(f"s3://missing-{objects.bucket()}/store")
    for ask in (lambda: backing.read("zarr.json"), backing.holds_anything, lambda: backing.write("a", b"")):
        with pytest.raises(ObjectsError, match="no such bucket"):
            ask()


def test_a_server_that_does_not_answer_is_said(objects, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("wsi_idc.objects._RETRY", {"max_retries": 1})
    with pytest.raises(ObjectsError, match="does not answer"):
        ObjectBacking(f"s3://{objects.bucket()}/store").read("a")


def test_a_shard_is_one_request_to_write_and_its_index_one_to_read(objects, backing):
    shape, chunks, shards = (64, 8), (8, 8), (32, 8)
    array = zarr.create_array(
        backing.zarr(read_only=False), name="x", shape=shape, chunks=chunks, shards=shards, dtype="uint8", zarr_format=3
    )
    values = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    before = len(objects.requests())
    array[...] = values
    assert sum(method == "PUT" for method, _ in objects.requests()[before:]) == 2
    array = zarr.open_array(backing.zarr(read_only=True), path="x", mode="r", zarr_format=3)
    before = len(objects.requests())
    assert all(np.array_equal(array[start : start + 8], values[start : start + 8]) for start in range(0, 64, 8))
    assert len(objects.requests()) - before == 8 + 2
