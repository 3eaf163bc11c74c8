"""What tells one source file from another: its content, never its timestamp."""

import hashlib
from pathlib import Path

_WHOLE = 8 * 2**20
"""Files up to this size are hashed whole."""
_SAMPLES, _SAMPLE = 32, 2**16


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
