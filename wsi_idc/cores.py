"""How many CPU cores this process may use."""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


@lru_cache(maxsize=1)
def cores() -> int:
    """Cores that this process may use: by what it is pinned to, and by the quota of its control groups; at least 1."""
    pinned = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([pinned, *_quotas(_CGROUPS, _OWN)]))


def _quotas(root: Path, own: Path) -> Iterator[int]:
    """Cores that control groups grant, a part of one taken for a whole one; nothing where they set no limit.

    Args:
        root: where control groups are seen.
        own: the file that says which of them the process is in.
    """
    # Version 2: the process's group and all above it. In a container, the one that is seen at the root is its own.
    folders = {root}
    with suppress(OSError):
        for line in own.read_text().splitlines():
            inner = PurePosixPath(line.partition("::")[2]).relative_to("/") if "::/" in line else PurePosixPath()
            folders |= {root / folder for folder in (inner, *inner.parents)}
    for folder in folders:
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            yield -(-int(quota) // int(period))
    # Version 1, as containers see it.
    with suppress(OSError, ValueError):
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            yield -(-int(quota) // int(period))
