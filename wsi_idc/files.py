"""Files that are whole or absent, whatever happens while they are written."""

import os
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
