"""Files that are whole or absent, whatever happens while they are written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream to a file beside its place, which is flushed to the disk and renamed when the block ends well.

    A reader sees the old content or the new one, after a power cut too; of a write that failed nothing is left.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place whole: see `whole_file`."""
    with whole_file(path) as stream:
        stream.write(content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside its place, which takes the place when the block ends well; what was there before is then gone.

    A reader sees the old folder, or the new one, whole; of a block that failed nothing is left.

    Raises:
        OSError: it cannot be written.
    """
    beside, before = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("part", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        if path.exists():
            # Two renames, since none of the system's puts a folder in the place of one that holds anything.
            path.replace(before)
        try:
            beside.replace(path)
        except OSError:
            if before.exists():
                before.replace(path)
            raise
        flush_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def standing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def starts_otherwise(path: Path, beginning: bytes) -> str:
    """Why a file must not be replaced by one that begins so; "" where nothing is there, or such a file.

    Raises:
        OSError: it cannot be read.
    """
    if not path.exists():
        return ""
    if not path.is_file():
        return "is no plain file"
    with path.open("rb") as stream:
        found = stream.read(len(beginning))
    return "" if found in (b"", beginning) else "is another file, which would be lost"


def flush_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut, where the system can (Windows cannot)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_all(path: Path) -> None:
    """Make a file, or a folder with all that is in it, outlive a power cut."""
    if not path.is_dir():
        _flush_file(path)
        return
    for root, _, names in os.walk(path):
        for name in names:
            _flush_file(Path(root, name))
        flush_folder(Path(root))


def _flush_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
