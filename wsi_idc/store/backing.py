"""What a store lies on: whole objects under keys, and a lease for the one run that writes.

A key is a path of names joined by "/", without one at its ends; "" is the whole store. A backing promises what each
verb says and no more; `docs/store.md` has what follows for a store. One suite of tests runs against every backing.
"""

import json
import os
import shutil
import socket
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wsi_idc.errors import StoreBusyError, StoreError, system_reason
from wsi_idc.files import flush_folder, write_whole
from wsi_idc.objects import is_url

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

LEASE = "lease"
"""Key below which a lease keeps its files. `Store` makes it an empty Zarr array: what lies below an array is not walked
by those who list the hierarchy."""
HOLDER = f"{LEASE}/holder.json"
"""Who has the lease: what `holder` gives, and what its kind of lease adds."""
_PART = ".part"


class Lease(Protocol):
    """The right to write: one run has it at a time. Readers need none."""

    @property
    def nonce(self) -> str:
        """What this lease wrote into the store when it was taken, and no other ever does; "" before. See `holds`."""

    @property
    def lost(self) -> bool:
        """Whether another run is known to have taken it over; a run that lost it must write nothing more."""

    def acquire(self) -> None:
        """Take it.

        Raises:
            StoreBusyError: another run has it; names the run where it can.
            StoreError: the place cannot be written.
        """

    def release(self) -> None:
        """Give it back."""


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

    def holds_anything(self) -> bool:
        """Whether there is any object but the lease's."""

    def flush(self, prefix: str) -> None:
        """When this returns, all that was written below the prefix, by any process here, outlives a power cut."""

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
        for root, _, names in os.walk(self._path(prefix)):
            for name in names:
                handle = os.open(Path(root, name), os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            flush_folder(Path(root))

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
        self._lock = FileLock(backing.folder / LEASE / "lock", timeout=0)

    @property
    def nonce(self) -> str:
        """See `Lease.nonce`."""
        return self._nonce

    @property
    def lost(self) -> bool:
        """See `Lease.lost`: the system takes a lock from nobody."""
        return False

    def acquire(self) -> None:
        """See `Lease.acquire`."""
        from filelock import Timeout

        folder, who = self._backing.folder, holder()
        try:
            (folder / LEASE).mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._backing.write(HOLDER, json.dumps(who).encode())
            self._nonce = who["nonce"]
        except Timeout as error:
            raise StoreBusyError(folder, f"another run holds the store{self._who()}", _WAIT) from error
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

    def _who(self) -> str:
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
