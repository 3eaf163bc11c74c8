"""Sixteen hex digits that tell one thing from another: values, arrays, files, and the sources of slides."""

import hashlib
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_idc.sources import Part, Source, read_all, roots

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


def fingerprint(source: Source) -> str:
    """Sixteen hex digits of a file's, or a folder's, content; the same wherever it lies.

    A file over 8 MiB is sampled: its size, and 32 samples of 64 KiB from the first byte to the last, since hashing
    gigabytes would cost as much as reading the slide. A folder is the names and sizes of all regular files in it, and
    their contents laid end to end, sampled as one file is. The companion folder of a MIRAX file belongs to it.

    Raises:
        OSError: it cannot be read, or is neither a file nor a folder.
    """
    total = hashlib.blake2b(digest_size=8)
    for root in roots(source):
        if root.is_folder:
            for part in root.parts:
                total.update(f"{part.inner}\0{part.size}\0".encode())
        else:
            total.update(b".\0")
        _add(total, root.parts)
    return total.hexdigest()


def _add(total: "hashlib.blake2b", parts: list[Part]) -> None:
    """Add the length of files laid end to end, and their content, or samples of it where they are long."""
    ends = list(accumulate(part.size for part in parts))
    size = ends[-1] if ends else 0
    total.update(f"{size}\0".encode())
    wanted = [(part, 0, part.size) for part in parts]
    if size > _WHOLE:
        wanted = []
        for index in range(_SAMPLES):
            first = index * (size - _SAMPLE) // (_SAMPLES - 1)
            last = first + _SAMPLE
            for number in range(bisect_right(ends, first), len(parts)):
                start = ends[number - 1] if number else 0
                if start >= last:
                    break
                wanted.append((parts[number], max(first - start, 0), min(last - start, parts[number].size)))
    for data in read_all(wanted):
        total.update(data)
