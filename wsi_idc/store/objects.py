"""A store in an object store: S3 and what speaks its language, Google Cloud Storage, Azure Blob Storage.

A PUT puts a whole object in its place or none, and what it acknowledged is durable: so nothing has to be renamed or
flushed. What a folder has and this has not is a lock that ends with the process that has it: see `ObjectLease`.
"""

import errno
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import ObjectStore

from wsi_idc.errors import ObjectsError, StoreBusyError, StoreError
from wsi_idc.objects import objects_at, objects_error
from wsi_idc.store.backing import HOLDER, LEASE, Holding, Lease, holder, holder_words, holding

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Objects
    from zarr.core.buffer import Buffer, BufferPrototype

_ONE_PUT_BYTES = 2**28
"""Up to here an object is one request. What arrived of a broken upload in parts would stay, unseen and paid for."""
_ENDS = 256
"""Indexes of shards that are remembered: 16 bytes a chunk, 1 KiB a shard."""
LIFETIME_S = 120.0
"""Of a lease that is not renewed. Renewed every third of it, it outlives a minute without network; and it is how long
others wait for a run that was killed on another machine. A run that was suspended for longer can lose it."""


_answered: set[str] = set()
"""Addresses whose server has answered in this process."""


@lru_cache(maxsize=64)
def _opened(url: str, patient: bool) -> "Objects":
    """One client an address in each process: it keeps connections and credentials, and threads may share it."""
    return objects_at(url, patient=patient)


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Around requests: what goes wrong becomes an `ObjectsError`."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise objects_error(url, error) from error
    _answered.add(url)


def _check_missing(url: str, error: FileNotFoundError) -> None:
    """Let "there is no such object" pass; a bucket that is not there is an error.

    Raises:
        ObjectsError: it is the bucket that is missing.
    """
    told = objects_error(url, error)
    if told.errno == errno.ENODEV:
        raise told from error


class ObjectBacking:
    """The objects below a URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        # Refuses what can never be opened.
        self._objects  # noqa: B018

    @property
    def address(self) -> str:
        """See `Backing.address`."""
        return self._url

    @property
    def everywhere(self) -> str:
        """See `Backing.everywhere`; other machines find it where their environment says the same of its provider."""
        return self._url

    @property
    def _objects(self) -> "Objects":
        return _opened(self._url, self._url in _answered)

    def read(self, key: str) -> bytes | None:
        """See `Backing.read`."""
        return self._get(key)[0]

    def write(self, key: str, content: bytes) -> None:
        """See `Backing.write`."""
        self._put(key, content)

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """See `Backing.replace`: the server compares and swaps at once."""
        content, mark = self._get(key)
        if content != old:
            return False
        try:
            self._put(key, new, mark)
        except PreconditionError:
            # A request that is repeated after a broken connection can meet what it did itself.
            return self.read(key) == new
        return True

    def delete(self, prefix: str) -> None:
        """See `Backing.delete`."""
        with _asking(self._url):
            keys = [found["path"] for some in obstore.list(self._objects, prefix or None) for found in some]
            if keys:
                obstore.delete(self._objects, keys)
        if prefix:
            # By itself: where it does not exist, some servers say so, and a batch would end there.
            self._remove(prefix)

    def folders(self, prefix: str) -> list[str]:
        """See `Backing.folders`."""
        with _asking(self._url):
            found = obstore.list_with_delimiter(self._objects, prefix or None)
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    def objects(self, prefix: str) -> list[str]:
        """See `Backing.objects`."""
        with _asking(self._url):
            found = obstore.list_with_delimiter(self._objects, prefix or None)
        return sorted(each["path"].rpartition("/")[2] for each in found["objects"])

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Backing.keys`."""
        with _asking(self._url):
            for some in obstore.list(self._objects, prefix or None):
                yield from (found["path"] for found in some)

    def holds_anything(self) -> bool:
        """See `Backing.holds_anything`."""
        with _asking(self._url):
            found = obstore.list_with_delimiter(self._objects)
        return bool(found["objects"]) or any(path != LEASE for path in found["common_prefixes"])

    def flush(self, prefix: str) -> None:
        """See `Backing.flush`: nothing is left to do, since a server acknowledges what it has made durable."""

    def free(self) -> int | None:
        """See `Backing.free`; object stores do not end."""
        return None

    def zarr(self, *, read_only: bool) -> "ZarrObjects":
        """See `Backing.zarr`."""
        return ZarrObjects(self._objects, url=self._url, read_only=read_only)

    def lease(self) -> Lease:
        """See `Backing.lease`."""
        return ObjectLease(self)

    def _remove(self, key: str) -> None:
        """Remove an object; no error where there is none."""
        with _asking(self._url):
            try:
                obstore.delete(self._objects, key)
            except FileNotFoundError as error:
                _check_missing(self._url, error)

    def _get(self, key: str) -> tuple[bytes | None, Any]:
        """A whole object, and what tells this one from every other that was or will be there."""
        with _asking(self._url):
            try:
                found = obstore.get(self._objects, key)
                return bytes(found.bytes()), found.meta
            except FileNotFoundError as error:
                _check_missing(self._url, error)
                return None, None

    def _put(self, key: str, content: bytes, mode: Any = "overwrite") -> Any:
        """Put a whole object: as it is, where there is none ("create"), or in the place of the one that `_get` told of.

        Raises:
            AlreadyExistsError, PreconditionError: the condition did not hold. NotSupportedError: there are none.
        """
        if not isinstance(mode, str):
            mode = {name: mode[name] for name in ("e_tag", "version") if mode[name] is not None}
        with _asking(self._url):
            try:
                return obstore.put(self._objects, key, content, mode=mode, use_multipart=len(content) > _ONE_PUT_BYTES)
            except (AlreadyExistsError, PreconditionError, NotSupportedError) as error:
                if mode == "overwrite":
                    raise
                refused = error
        raise refused


class ZarrObjects(ObjectStore["Objects"]):
    """The same objects for zarr-python, with the errors of a backing.

    It remembers the groups that zarr has seen, since zarr looks at every one above each array that it makes, and the
    ends of shards, which are their indexes: zarr would ask for one before each of its chunks. So one of these is for
    one piece of work. A shard that is replaced meanwhile is read wrongly, which its checksum finds.

    Args:
        store: the objects.
        url: where they are.
        read_only: whether writing is refused.
    """

    def __init__(self, store: "Objects", *, url: str, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self._url = url
        self._groups: dict[str, bytes] = {}
        self._ends: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def __str__(self) -> str:
        # obstore's own words for an Azure store panic where the account comes from the environment.
        return self._url

    def with_read_only(self, read_only: bool = False) -> "ZarrObjects":
        """See zarr."""
        return type(self)(self.store, url=self._url, read_only=read_only)

    async def get(
        self, key: str, prototype: "BufferPrototype", byte_range: ByteRequest | None = None
    ) -> "Buffer | None":
        """See zarr."""
        suffix = byte_range.suffix if isinstance(byte_range, SuffixByteRequest) else None
        if suffix is not None and (end := self._ends.get((key, suffix))) is not None:
            return prototype.buffer.from_bytes(end)
        if byte_range is None and (group := self._groups.get(key)) is not None:
            return prototype.buffer.from_bytes(group)
        options: Any = {} if byte_range is None else {"range": _range(byte_range)}
        with _asking(self._url):
            try:
                content = await (await obstore.get_async(self.store, key, options=options)).bytes_async()
            except NotSupportedError:
                # Azure has no ranges that count from the end; zarr's own way takes two requests.
                return await super().get(key, prototype, byte_range)
            except FileNotFoundError as error:
                _check_missing(self._url, error)
                return None
        if suffix is not None:
            self._ends[key, suffix] = bytes(content)
            while len(self._ends) > _ENDS:
                with suppress(KeyError):
                    self._ends.popitem(last=False)
        elif (
            byte_range is None and key.endswith("zarr.json") and b'"node_type": "group"' in (document := bytes(content))
        ):
            self._groups[key] = document
        return prototype.buffer.from_bytes(content)  # type: ignore[arg-type]

    async def exists(self, key: str) -> bool:
        """See zarr."""
        with _asking(self._url):
            return await super().exists(key)

    async def set(self, key: str, value: "Buffer") -> None:
        """See zarr: in one request, as `ObjectBacking.write`."""
        self._check_writable()
        self._groups.pop(key, None)
        content = value.as_buffer_like()
        whole = len(content) <= _ONE_PUT_BYTES
        with _asking(self._url):
            await obstore.put_async(self.store, key, content, use_multipart=not whole)

    async def set_if_not_exists(self, key: str, value: "Buffer") -> None:
        """See zarr, which does so for every group above an array that it makes."""
        if key not in self._groups:
            with _asking(self._url):
                await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        """See zarr."""
        self._groups.pop(key, None)
        with _asking(self._url):
            await super().delete(key)


def _range(wanted: ByteRequest) -> Any:
    """The same bytes, as obstore says it."""
    if isinstance(wanted, RangeByteRequest):
        return (wanted.start, wanted.end)
    if isinstance(wanted, OffsetByteRequest):
        return {"offset": wanted.offset}
    return {"suffix": wanted.suffix}


class ObjectLease:
    """An object that says who writes the store, put if there is none, and from then on swapped by its ETag.

    Nothing rests on clocks but how soon a run that is gone is replaced. Whoever swaps the object has the lease; a run
    whose swap is refused has lost it. A lease has expired when it was not swapped for its lifetime: both ends of that
    are times of the server's (`last_modified` of the lease, and of an object put just now), so that no machine's clock
    has to be right. A run of this machine whose process is gone is replaced at once.

    Args:
        backing: the store's.
        lifetime_s: of a lease that is not renewed.
    """

    def __init__(self, backing: ObjectBacking, lifetime_s: float = LIFETIME_S) -> None:
        self._backing, self._lifetime_s = backing, lifetime_s
        self._who: dict[str, Any] = {}
        self._mark: Any = None
        self._lost = False
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def nonce(self) -> str:
        """See `Lease.nonce`."""
        return str(self._who.get("nonce", ""))

    @property
    def lost(self) -> bool:
        """Whether another run took it over; known when the next renewal is due, which is a third of the lifetime."""
        return self._lost

    def acquire(self) -> None:
        """See `Lease.acquire`.

        Raises:
            StoreError: or the server does not keep conditions, so that two runs could write.
        """
        who = {**holder(), "machine": _machine(), "lifetime_s": self._lifetime_s}
        try:
            now = self._probe(who["nonce"])
            self._mark = self._take(who, now)
        except ObjectsError as error:
            raise StoreError(self._backing.address, str(error.strerror)) from error
        self._who, self._lost, self._ended = who, False, threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._keeper.start()

    def release(self) -> None:
        """See `Lease.release`.

        The object is swapped, too, for one that says that it is free: what was looked at and then deleted could be
        another run's by then.
        """
        self._ended.set()
        if self._keeper is not None:
            self._keeper.join()
        if self._who and not self._lost:
            free = json.dumps({"released": _now(), "was": self._who}).encode()
            with suppress(ObjectsError, PreconditionError):
                self._backing._put(HOLDER, free, self._mark)

    def tell(self, does: Mapping[str, Any]) -> None:
        """See `Lease.tell`: seen from the next renewal on, which costs no request more."""
        self._who = {**self._who, "does": dict(does)}

    def look(self) -> Holding | None:
        """See `Lease.look`: by this machine's clock, since asking the server for its own would be to write there."""
        content, mark = self._backing._get(HOLDER)
        if content is None:
            return None
        found = _read(content)
        if "nonce" not in found and "released" in found:
            return None
        if _is_gone(found):
            return holding(content, False, "its process is gone")
        left_s = self._left_s(found, mark, datetime.now(UTC))
        if left_s > 0:
            return holding(content, True, f"unless it is renewed, its lease ends in {left_s:.0f} s")
        return holding(content, False, "its lease has run out, by this machine's clock")

    def _probe(self, nonce: str) -> datetime:
        """See that the server keeps the two conditions that a lease stands on; gives its time.

        Raises:
            StoreError: it does not.
            ObjectsError: it cannot be asked.
        """
        key, backing = f"{LEASE}/probe-{nonce}", self._backing
        try:
            first = backing._put(key, b"1", "create")
            kept = self._refused(key, b"2", "create")
            backing._put(key, b"3", first)
            kept = kept and self._refused(key, b"4", first)
            now: datetime = backing._get(key)[1]["last_modified"]
        except (NotSupportedError, AlreadyExistsError, PreconditionError):
            kept = False
        finally:
            with suppress(ObjectsError):
                backing._remove(key)
        if not kept:
            problem = (
                "the server has no conditional writes (If-None-Match, If-Match), so two runs could spoil the store"
            )
            raise StoreError(backing.address, problem, "use one that has them: see docs/store.md")
        return now

    def _refused(self, key: str, content: bytes, mode: Any) -> bool:
        try:
            self._backing._put(key, content, mode)
        except (AlreadyExistsError, PreconditionError):
            return True
        return False

    def _take(self, who: dict[str, Any], now: datetime) -> Any:
        """Put the lease's object in its place; gives its mark.

        Raises:
            StoreBusyError: another run has it.
        """
        mode: Any = "create"
        for _ in range(_ATTEMPTS):
            with suppress(AlreadyExistsError, PreconditionError):
                return self._backing._put(HOLDER, _document(who), mode)
            content, mark = self._backing._get(HOLDER)
            if content is None:
                mode = "create"
                continue
            found = _read(content)
            if found.get("nonce") == who["nonce"]:
                # A request that was repeated after a broken connection met what it had done.
                return mark
            left_s = self._left_s(found, mark, now)
            if left_s > 0:
                raise self._busy(content, left_s)
            mode = mark
        raise self._busy(content, self._lifetime_s)

    def _left_s(self, found: dict[str, Any], mark: Any, now: datetime) -> float:
        """Seconds until a lease that was found may be taken over; none are left of one that is free."""
        if "nonce" not in found and "released" in found:
            return 0
        if _is_gone(found):
            return 0
        lifetime_s = found.get("lifetime_s")
        if not isinstance(lifetime_s, int | float):
            lifetime_s = self._lifetime_s
        # Of seconds that the server's times round off, the run that has the lease gets the benefit.
        left: timedelta = mark["last_modified"] + timedelta(seconds=lifetime_s + 1) - now
        return max(0.0, left.total_seconds())

    def _busy(self, content: bytes | None, left_s: float) -> StoreBusyError:
        advice = f"wait for it, or use --store; if it was killed, its lease ends in {left_s:.0f} s"
        return StoreBusyError(self._backing.address, f"another run holds the store{holder_words(content)}", advice)

    def _keep(self) -> None:
        """Renew the lease until it is released or lost."""
        while not self._lost and not self._ended.wait(self._lifetime_s / 3):
            # While the server cannot be asked, nothing is lost: others cannot ask it either, or swap what we then see.
            with suppress(ObjectsError):
                self._renew()

    def _renew(self) -> None:
        try:
            self._mark = self._backing._put(HOLDER, _document(self._who), self._mark)
        except (AlreadyExistsError, PreconditionError):
            content, mark = self._backing._get(HOLDER)
            if _read(content).get("nonce") == self.nonce:
                self._mark = mark
            else:
                self._lost = True


_ATTEMPTS = 5
"""To take a lease that others give back or take at the same moment."""


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _document(who: dict[str, Any]) -> bytes:
    """The lease's object: who has it, and until when by this machine's clock, which gives each renewal its own ETag."""
    expires = datetime.now(UTC) + timedelta(seconds=who["lifetime_s"])
    return json.dumps({**who, "expires": expires.isoformat()}).encode()


def _read(content: bytes | None) -> dict[str, Any]:
    """What a lease's object says; nothing where it is damaged."""
    try:
        found = json.loads(content or b"")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
    """Names the running kernel and the space of process ids in it, which a container has of its own; "" if unknown.

    A host's name is not enough: containers may share it, and not see each other's processes.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {Path('/proc/self/ns/pid').readlink()}" if kernel else ""
    except OSError:
        return ""


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether a lease is of a process of this machine that is no more."""
    machine, pid = _machine(), found.get("pid")
    if not machine or found.get("machine") != machine or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
