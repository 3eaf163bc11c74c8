"""What a store lies on: whole objects under keys, and a lease for the one run that writes.

A key is a path of names joined by "/", without one at its ends; "" is the whole store. A backing promises what each
verb says and no more; `docs/store.md` has what follows for a store. One suite of tests runs against every backing.
"""

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wsi_idc.errors import StoreBusyError, StoreError, system_reason
from wsi_idc.files import flush_all, write_whole
from wsi_idc.objects import is_url

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

LEASE = "lease"
"""Key below which a lease keeps its files. `Store` makes it an empty Zarr array: what lies below an array is not walked
by those who list the hierarchy."""
HOLDER = f"{LEASE}/holder.json"
"""Who has the lease: what `holder` gives, and what its kind of lease adds."""
_PART = ".part"
_TOLD_EVERY_S = 5.0
"""A lease in a folder is not written more often, to tell how far its run is."""


@dataclass(frozen=True)
class Holding:
    """A lease that a run has, or had when it was killed, as others see it who only look.

    Attributes:
        host, process, since: of the run; empty where the lease does not say.
        alive: whether the run still is; None where that cannot be told from here.
        how: how that is known, in words that follow "alive" or "gone".
        does: what the run last told of itself: command, slides, done, failed; may be empty or late.
    """

    host: str = ""
    process: int | None = None
    since: str = ""
    alive: bool | None = None
    how: str = ""
    does: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"host {self.host}, process {self.process}, since {self.since}" if self.host else "an unknown run"


class Lease(Protocol):
    """The right to write: one run has it at a time. Readers need none."""

    @property
    def nonce(self) -> str:
        """What this lease wrote into the store when it was taken, and no other ever does; "" before. See `holds`."""

    def acquire(self) -> None:
        """Take it.

        Raises:
            StoreBusyError: another run has it; names the run where it can.
            StoreError: the place cannot be written.
        """

    def release(self) -> None:
        """Give it back."""

    def tell(self, does: Mapping[str, Any]) -> None:
        """Let others see what the run does and how far it is. They may see it late; it is never an error."""

    def look(self) -> Holding | None:
        """Who has it, or had it when killed; None where nobody. Nothing is written, and no run is kept from it."""


class Backing(Protocol):
    """Where a store lies."""

    @property
    def address(self) -> str:
        """What a user types for it."""

    @property
    def everywhere(self) -> str:
        """What names it in other processes too, whatever folder they work in."""

    def read(self, key: str) -> bytes | None:
        """A whole object, or None where there is none."""

    def write(self, key: str, content: bytes) -> None:
        """Put a whole object in its place, replacing what is there: readers see the old one or the new one.

        When this returns, the object outlives a power cut.
        """

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """Put `new` where `old` is still the whole object; False, and nothing is written, where it is not."""

    def delete(self, prefix: str) -> None:
        """Remove the object of that key and all below it; no error where there is nothing."""

    def folders(self, prefix: str) -> list[str]:
        """Sorted names directly below a prefix that have something below them."""

    def objects(self, prefix: str) -> list[str]:
        """Sorted names of the objects directly below a prefix."""

    def keys(self, prefix: str) -> Iterator[str]:
        """The key of every object below a prefix, in no order."""

    def holds_anything(self) -> bool:
        """Whether there is any object but the lease's."""

    def flush(self, prefix: str) -> None:
        """When this returns, all that was written below the prefix, by any process here, outlives a power cut."""

    def free(self) -> int | None:
        """Bytes that still find room; None where there is no saying."""

    def zarr(self, *, read_only: bool) -> "ZarrStore":
        """The same place for zarr-python."""

    def lease(self) -> Lease:
        """The lease of this place, not yet taken."""


class FolderBacking:
    """A folder of a file system that renames atomically: a local disk, or NFS."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def address(self) -> str:
        """See `Backing.address`."""
        return str(self.folder)

    @property
    def everywhere(self) -> str:
        """See `Backing.everywhere`."""
        return str(self.folder.absolute())

    def _path(self, key: str) -> Path:
        return self.folder / key if key else self.folder

    def read(self, key: str) -> bytes | None:
        """See `Backing.read`."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def write(self, key: str, content: bytes) -> None:
        """See `Backing.write`."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """See `Backing.replace`; a file system cannot compare and rename at once: the lease keeps other runs away."""
        if self.read(key) != old:
            return False
        self.write(key, new)
        return True

    def delete(self, prefix: str) -> None:
        """See `Backing.delete`."""
        path = self._path(prefix)
        if path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def folders(self, prefix: str) -> list[str]:
        """See `Backing.folders`; an empty folder counts, since files are about to come there."""
        try:
            with os.scandir(self._path(prefix)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def objects(self, prefix: str) -> list[str]:
        """See `Backing.objects`."""
        try:
            with os.scandir(self._path(prefix)) as entries:
                return sorted(entry.name for entry in entries if not entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Backing.keys`."""
        for root, _, names in os.walk(self._path(prefix)):
            below = Path(root).relative_to(self.folder).as_posix()
            yield from (name if below == "." else f"{below}/{name}" for name in names)

    def holds_anything(self) -> bool:
        """See `Backing.holds_anything`."""
        try:
            names = [entry.name for entry in os.scandir(self.folder)]
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            return True
        return any(name != LEASE and not name.endswith(_PART) for name in names)

    def flush(self, prefix: str) -> None:
        """See `Backing.flush`."""
        flush_all(self._path(prefix))

    def free(self) -> int | None:
        """See `Backing.free`."""
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return None

    def zarr(self, *, read_only: bool) -> "ZarrStore":
        """See `Backing.zarr`."""
        from zarr.storage import LocalStore

        return LocalStore(self.folder, read_only=read_only)

    def lease(self) -> Lease:
        """See `Backing.lease`."""
        return FolderLease(self)


class FolderLease:
    """A lock of the operating system, which lets go of it when the process ends, however that is.

    Who has it stands in a file beside the lock, for others to read; the lock alone decides. It holds between machines
    where the file system carries locks between them (NFS version 4 does).
    """

    def __init__(self, backing: FolderBacking) -> None:
        from filelock import FileLock

        self._backing, self._nonce = backing, ""
        self._who: dict[str, Any] = {}
        self._told = -_TOLD_EVERY_S
        # Who looks has a share in the lock for a moment: see `look`.
        self._lock = FileLock(backing.folder / LEASE / "lock", timeout=0.2)

    @property
    def nonce(self) -> str:
        """See `Lease.nonce`."""
        return self._nonce

    def acquire(self) -> None:
        """See `Lease.acquire`."""
        from filelock import Timeout

        folder, who = self._backing.folder, holder()
        try:
            (folder / LEASE).mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._backing.write(HOLDER, json.dumps(who).encode())
            self._who, self._nonce = who, who["nonce"]
        except Timeout as error:
            raise StoreBusyError(folder, f"another run holds the store{self._words()}", _WAIT) from error
        except NotImplementedError as error:
            self._lock.release()
            advice = "put the store on a file system that has locks"
            raise StoreError(folder, "the file system has no locks, so two runs could spoil it", advice) from error
        except OSError as error:
            self._lock.release()
            raise StoreError(folder, f"cannot be written ({system_reason(error)})", "choose another --store") from error

    def release(self) -> None:
        """See `Lease.release`."""
        with suppress(OSError):
            self._backing.delete(HOLDER)
        self._lock.release()

    def tell(self, does: Mapping[str, Any]) -> None:
        """See `Lease.tell`."""
        now = time.monotonic()
        if now - self._told < _TOLD_EVERY_S or not holds(self._backing, self._nonce):
            return
        self._told = now
        with suppress(OSError):
            self._backing.write(HOLDER, json.dumps({**self._who, "does": dict(does)}).encode())

    def look(self) -> Holding | None:
        """See `Lease.look`: the lock alone says whether the run still is, wherever it runs."""
        content = self._backing.read(HOLDER)
        held = self._is_locked()
        if held is False and content is None:
            return None
        if held is None:
            return holding(content, None, "the system does not say whether its lock is held")
        return holding(content, held, "it has the lock" if held else "nobody has the lock")

    def _is_locked(self) -> bool | None:
        """Whether somebody has the lock; None where the system has no way to ask."""
        try:
            import fcntl
        except ImportError:
            return None
        try:
            handle = os.open(self._backing.folder / LEASE / "lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:
            return None
        try:
            # A share, given back at once: who wants the lock meanwhile tries again (`timeout`).
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(handle)

    def _words(self) -> str:
        content = None
        with suppress(OSError):
            content = self._backing.read(HOLDER)
        return holder_words(content)


_WAIT = "wait for it, or use --store"


def holder() -> dict[str, Any]:
    """Who holds a lease: this process, in plain values, with a nonce that no other lease has."""
    start = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": start, "nonce": uuid.uuid4().hex}


def holds(backing: Backing, nonce: str) -> bool:
    """Whether the lease of that nonce still is the store's: asked wherever its run works, before what it did is shown.

    One that expired, and that nobody took over since, still is.
    """
    try:
        return bool(json.loads(backing.read(HOLDER) or b"")["nonce"] == nonce)
    except (ValueError, KeyError, TypeError):
        return False


def holding(content: bytes | None, alive: bool | None, how: str) -> Holding:
    """A lease, from what it says of itself; a damaged one says nothing."""
    try:
        who = json.loads(content or b"")
        does = who.get("does")
        return Holding(
            str(who["host"]), int(who["pid"]), str(who["start"]), alive, how, does if isinstance(does, dict) else {}
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return Holding(alive=alive, how=how)


def holder_words(content: bytes | None) -> str:
    """Who holds a lease, as it stands in a message: " (host h, process p, since t)", or "" where that is unknown."""
    try:
        who = json.loads(content or b"")
        return f" (host {who['host']}, process {who['pid']}, since {who['start']})"
    except (ValueError, KeyError, TypeError):
        return ""


def backing_at(address: str | Path) -> Backing:
    """The backing of what a user typed for a store: a folder, or a URL.

    Raises:
        UsageError: a URL of a scheme that is not supported, or whose provider needs more of the environment.
    """
    if not is_url(address):
        return FolderBacking(Path(address))
    from wsi_idc.store.objects import ObjectBacking

    return ObjectBacking(str(address))
