"""Every error that a user can cause or meet, and the exit code of each.

    WsiIdcError                 1
    |-- UsageError              2   options, or a combination of them, that cannot be carried out
    |   |-- FaultsError         2   an input with faults: all of them, one a line
    |   |   |-- ManifestError   2   a manifest
    |   |   `-- WorkersError    2   a cluster whose workers do not fit
    |   |-- ModelError          2   a bundle that is broken or does not fit the store
    |   `-- StoreError          2   a store that is missing, of another format, or not a store
    |-- SlideError              1   one slide fails; the others go on
    |   |-- ResolutionError     1   um/px absent or impossible
    |   |-- DamageError         1   the file is cut short or broken
    |   |   `-- RegionError     1   a region of it cannot be decoded
    |   |-- AccessError         1   the system does not give the file: rights, a stale handle, a disk's error
    |   |-- ChangedError        1   the file is not, or no longer, the one that the run was planned for
    |   |-- StoreDamageError    1   what the store holds of a slide is not what was written
    |   `-- AnnotationError     1   the slide's annotation cannot be used
    |-- StoreWriteError         1   the store's disk is full or takes no writes: the run ends, what was complete is kept
    |-- OvertakenError          1   a task whose result another task has begun again: seen by `jobs` alone
    |-- ClusterError            1   the scheduler, or every worker, is lost: the run ends, what was complete is kept
    `-- StoreBusyError          75  another run holds the store (EX_TEMPFAIL of sysexits.h)

An error says which input, what is wrong, and what to do, in one line.
"""

import errno
from collections.abc import Sequence

_ADVICE = {
    errno.EACCES: "check the rights",
    errno.EPERM: "check the rights",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EINVAL: "give a file or a folder",
    errno.EIO: "the disk or the network failed: try again, then check them",
    errno.ESTALE: "the file server lost it: try again",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room on the disk",
    errno.EROFS: "choose another place",
    errno.ENOMEM: "use fewer threads or workers",
    errno.EMFILE: "use fewer threads or workers, or raise the limit (ulimit -n)",
}


def system_advice(error: OSError) -> str:
    """What to do about a file operation that failed; "" where the error says that itself."""
    if isinstance(error, ObjectsError):
        return ""
    return _ADVICE.get(error.errno or 0, "check the file")


def system_reason(error: OSError) -> str:
    """What the system says of a file operation that failed, and of which file where it says so."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason} ({error.filename})" if error.filename else reason


class WsiIdcError(Exception):
    """One line for the user: `subject: problem; advice`."""

    exit_code = 1

    def __init__(self, subject: object, problem: str, advice: str = "") -> None:
        self.subject = str(subject)
        self.problem = " ".join(problem.split())
        self.advice = " ".join(advice.split())
        super().__init__(self.subject, self.problem, self.advice)

    def __str__(self) -> str:
        return self.reason if not self.subject else f"{self.subject}: {self.reason}"

    @property
    def reason(self) -> str:
        """The line without its subject."""
        return f"{self.problem}; {self.advice}" if self.advice else self.problem


class UsageError(WsiIdcError):
    """Options that cannot be carried out."""

    exit_code = 2


class FaultsError(UsageError):
    """An input with faults, all reported together."""

    def __init__(self, subject: object, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        super().__init__(subject, count, "nothing was written")

    def __reduce__(self) -> tuple[type["FaultsError"], tuple[str, list[str]]]:
        return (type(self), (self.subject, self.faults))

    def __str__(self) -> str:
        return "\n".join([f"{self.subject}: {self.reason}", *(f"  {fault}" for fault in self.faults)])


class ManifestError(FaultsError):
    """A manifest with faults."""


class WorkersError(FaultsError):
    """A cluster that has workers which could not do the work."""


class ModelError(UsageError):
    """A model bundle that cannot be used."""


class StoreError(UsageError):
    """A tile store that cannot be used."""


class StoreBusyError(WsiIdcError):
    """Another run holds the store."""

    exit_code = 75


class StoreWriteError(WsiIdcError):
    """The store's disk is full, or takes no writes."""


class OvertakenError(WsiIdcError):
    """A task found that another one had begun the same result again."""


class ClusterError(WsiIdcError):
    """The scheduler, or every worker, is lost."""


class ObjectsError(OSError):
    """What an object store answers, or that it does not: `strerror` says what to do, `filename` is the URL.

    It is about a place as a whole, not about one object: whoever meets it second meets the same.
    """


class SlideError(WsiIdcError):
    """One slide that fails; the others go on."""


class ResolutionError(SlideError):
    """A slide whose um/px is absent or impossible."""


class DamageError(SlideError):
    """A slide file that is cut short or broken: another copy may be whole."""


class RegionError(DamageError):
    """A region of a slide that cannot be decoded."""


class AccessError(SlideError):
    """A slide that the system does not give: nothing is said of its content."""

    @classmethod
    def of(cls, path: object, error: OSError) -> "AccessError":
        """What the system says of a path, and what to do about it."""
        reason = error.strerror or str(error) or type(error).__name__
        return cls(path, reason[:1].lower() + reason[1:], system_advice(error))


class ChangedError(SlideError):
    """A slide that is not, or no longer, the one that the run was planned for."""


class StoreDamageError(SlideError):
    """What the store holds of a slide is not what was written there."""


class AnnotationError(SlideError):
    """An annotation or mask that cannot be used."""
