"""Where what a user names lies, and how it is read: a regular file or a folder; or an object or a prefix, by URL.

`roots` says of either what files it has, and `Part.read` gives ranges of them, so that what is made of a source (its
fingerprint, a copy) is made in one way. What cannot be had is an OSError that says why.
"""

import errno
import hashlib
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from wsi_idc.objects import SCHEMES, is_url, objects_at, objects_error

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_REQUESTS = 8
"""Of one source, under way at once."""


@dataclass(frozen=True)
class Url:
    """An object, or a prefix of objects, as the user wrote it: `SCHEME://BUCKET/KEY`.

    No `Path`: that would take the two slashes for one. Nothing in it is decoded: `%20`, `#` and `?` are part of a key.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def scheme(self) -> str:
        """What stands before `://`."""
        return self.text.partition("://")[0]

    @property
    def bucket(self) -> str:
        """The bucket's own URL."""
        return f"{self.scheme}://{self.text.partition('://')[2].partition('/')[0]}"

    @property
    def key(self) -> str:
        """What stands after the bucket."""
        return self.text.partition("://")[2].partition("/")[2].rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's, as a Path has it."""
        return PurePosixPath(self.name).suffix

    def with_name(self, name: str) -> "Url":
        """What lies beside it, by its name."""
        parent = self.key.rpartition("/")[0]
        return Url(f"{self.bucket}/{parent}/{name}" if parent else f"{self.bucket}/{name}")

    def fault(self) -> tuple[str, str] | None:
        """Why nothing can lie there, and what to write; None where something can."""
        known = ", ".join(f"{name}://" for name in SCHEMES)
        if self.scheme not in SCHEMES:
            return f"{self.scheme}:// is not supported", f"give a path, or a URL that begins with {known}"
        form = f"write {self.scheme}://BUCKET/KEY"
        if not self.key:
            return "names no object", form
        odd = {"", ".", ".."} & set(self.key.split("/")) or any(map(str.isspace, self.bucket))
        return ("is not the URL of an object", form) if self.bucket == f"{self.scheme}://" or odd else None


Source: TypeAlias = Path | Url


def source_of(text: str) -> Source:
    """Where a user's or a store's word for a source says that it lies."""
    return Url(text) if is_url(text) else Path(text)


@dataclass(frozen=True)
class Part:
    """One file of a source.

    Attributes:
        inner: its path within the folder that the source is, with `/`; "" where the source is the file.
        size: in bytes.
        version: another one once it was written anew.
        at: where it lies.
    """

    inner: str
    size: int
    version: str
    at: Source

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` to `stop`, `stop` left out; fewer where a file has become shorter.

        Raises:
            OSError: they cannot be read; ESTALE: the object was replaced since it was looked at.
        """
        if isinstance(self.at, Path):
            with self.at.open("rb") as stream:
                stream.seek(start)
                return stream.read(stop - start)
        if start == stop:
            return b""
        options: Any = {"range": (start, stop), **({"if_match": self.version} if self.version[:1] == '"' else {})}
        with _asking(self.at):
            return bytes(_bucket(self.at.bucket).get(self.at.key, options=options).bytes())


@dataclass(frozen=True)
class Root:
    """The file or folder that a source is, or a folder that belongs to it, with what is in it.

    Attributes:
        name: the last part of its path.
        is_folder: whether it is one.
        parts: in the order of their names.
    """

    name: str
    is_folder: bool
    parts: list[Part]


def roots(source: Source) -> list[Root]:
    """What a source consists of: a file or folder, and the companion folder of a MIRAX file.

    Raises:
        OSError: it is not there, cannot be looked at, or is neither a file nor a folder.
    """
    return _roots_of_path(source) if isinstance(source, Path) else _roots_of_url(source)


def version(source: Source) -> str:
    """Another one once anything of it was written anew; "" for a path, since a disk's time stamps can be set.

    Raises:
        OSError: as `roots`.
    """
    if isinstance(source, Path):
        return ""
    parts = [(part.inner, part.size, part.version) for root in roots(source) for part in root.parts]
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def read_all(wanted: Sequence[tuple[Part, int, int]]) -> Iterator[bytes]:
    """Ranges of parts, in their order; those of objects several at a time, as each is a request of its own.

    Raises:
        OSError: as `Part.read`.
    """
    if not any(isinstance(part.at, Url) for part, _, _ in wanted):
        yield from (part.read(start, stop) for part, start, stop in wanted)
        return
    with ThreadPoolExecutor(_REQUESTS) as executor:
        yield from executor.map(lambda piece: piece[0].read(piece[1], piece[2]), wanted)


def named_in(text: str) -> list[str]:
    """The names that a VMS or VMU file gives, of the pictures beside it among others."""
    return [line.partition("=")[2].strip() for line in text.splitlines() if "=" in line]


def check_source(path: Path) -> None:
    """Refuse what is neither a file nor a folder before it is opened: opening a pipe waits for ever.

    Raises:
        OSError: it is a pipe, a socket or a device; or it is not there, or may not be looked at.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "is not a file or folder", str(path))


def first_bytes(path: Path, count: int) -> bytes:
    """The beginning of a file.

    Raises:
        OSError: it cannot be read.
    """
    check_source(path)
    with path.open("rb") as stream:
        return stream.read(count)


def _roots_of_path(path: Path) -> list[Root]:
    check_source(path)
    companion = path.with_suffix("") if path.suffix.lower() == ".mrxs" else None
    found = []
    for root in [path, *([companion] if companion and companion.is_dir() else [])]:
        is_folder = root.is_dir()
        files = sorted(child for child in root.rglob("*") if child.is_file()) if is_folder else [root]
        found.append(Root(root.name, is_folder, [_part_of_path(file, root) for file in files]))
    return found


def _part_of_path(file: Path, root: Path) -> Part:
    status = file.stat()
    inner = "" if file == root else file.relative_to(root).as_posix()
    return Part(inner, status.st_size, f"{status.st_mtime_ns} {status.st_ino}", file)


def _roots_of_url(url: Url) -> list[Root]:
    with _asking(url):
        store = _bucket(url.bucket)
        try:
            found = [Root(url.name, False, [_part_of_object(store.head(url.key), url, "")])]
        except FileNotFoundError:
            found = [Root(url.name, True, _below(store, url))]
        if not found[0].parts:
            raise FileNotFoundError
        if url.suffix.lower() == ".mrxs":
            companion = url.with_name(PurePosixPath(url.name).stem)
            if parts := _below(store, companion):
                found.append(Root(companion.name, True, parts))
        return found


def _below(store: "ObjectStore", url: Url) -> list[Part]:
    """The objects below a prefix, in the order in which a folder's files come."""
    found = {str(meta["path"]): meta for chunk in store.list(url.key) for meta in chunk}
    # Consoles keep empty objects in the place of folders.
    folders = {str(folder) for name in found for folder in PurePosixPath(name).parents} | {url.key}
    names = [name for name, meta in found.items() if not (name in folders and meta["size"] == 0)]
    inner = {name: name[len(url.key) + 1 :] for name in names}
    ordered = sorted(names, key=lambda name: PurePosixPath(inner[name]))
    return [_part_of_object(found[name], Url(f"{url.bucket}/{name}"), inner[name]) for name in ordered]


def _part_of_object(meta: Any, at: Url, inner: str) -> Part:
    return Part(inner, meta["size"], meta["e_tag"] or str(meta["last_modified"]), at)


@lru_cache(maxsize=64)
def _bucket(url: str) -> "ObjectStore":
    """A bucket, with its connections."""
    return objects_at(url)


@contextmanager
def _asking(url: Url) -> Iterator[None]:
    """What an object store answers, in the system's words."""
    from obstore.exceptions import BaseError, PreconditionError

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object, and none below it", str(url)) from error
    except PreconditionError as error:
        raise OSError(errno.ESTALE, "was replaced while it was read", str(url)) from error
    except (BaseError, OSError, ValueError) as error:
        raise objects_error(str(url), error) from error
