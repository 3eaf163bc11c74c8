"""Sixteen hex digits that tell one thing from another: values, arrays, files, and the sources of slides."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WHOLE = 8 * 2**20
"""Files up to this size are hashed whole."""
_SAMPLES, _SAMPLE = 32, 2**16


def digest(value: object) -> str:
    """Sixteen hex digits of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def checksum(array: "NDArray[Any]") -> str:
    """Sixteen hex digits of an array's bytes in C order, with its dtype and shape."""
    sha = begin_checksum(array.dtype, array.shape)
    sha.update(array.data if array.flags.c_contiguous else array.tobytes())
    return sha.hexdigest()


def begin_checksum(dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> "hashlib.blake2b":
    """The checksum of an array whose bytes are still to come, in C order."""
    return hashlib.blake2b(f"{dtype.str}{shape}".encode(), digest_size=8)


def file_digest(path: Path) -> str:
    """Sixteen hex digits of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def fingerprint(path: Path) -> str:
    """Sixteen hex digits of a file's, or a folder's, content.

    Files over 8 MiB are sampled: size, and 32 samples of 64 KiB from the first byte to the last, since hashing
    gigabytes would cost as much as reading the slide. The companion folder of a MIRAX file belongs to it.

    Raises:
        OSError: it cannot be read.
    """
    total = hashlib.blake2b(digest_size=8)
    companion = path.with_suffix("") if path.suffix.lower() == ".mrxs" else None
    for root in [path, *([companion] if companion and companion.is_dir() else [])]:
        files = sorted(child for child in root.rglob("*") if child.is_file()) if root.is_dir() else [root]
        for file in files:
            total.update(f"{file.relative_to(root).as_posix()}\0".encode())
            _add_file(total, file)
    return total.hexdigest()


def _add_file(total: "hashlib.blake2b", file: Path) -> None:
    size = file.stat().st_size
    total.update(f"{size}\0".encode())
    with file.open("rb") as stream:
        if size <= _WHOLE:
            total.update(stream.read())
            return
        for index in range(_SAMPLES):
            stream.seek(index * (size - _SAMPLE) // (_SAMPLES - 1))
            total.update(stream.read(_SAMPLE))
