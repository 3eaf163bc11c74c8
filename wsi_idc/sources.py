"""What a user names to be read is a regular file or a folder, and says why where it cannot be read."""

import errno
import stat
from pathlib import Path


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
