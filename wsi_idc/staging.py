"""A cache on a local disk that slides are copied to before they are read, of a limited size.

    STAGE/<key>.<bytes>.staged/     what one slide's work needs; the key is of where it lies and what it contains
        using/<any>                 a file for each use, locked as long as it lasts; with its process it ends
        part/                       while it is copied
        slide/                      once it is whole
        unwanted                    whoever leaves last deletes the entry

Any number of processes of a host share it: whatever is decided, one decides at a time, under a lock. An entry counts
with its whole size from the moment that it is begun. Whoever finds no room waits until others leave; what nobody uses
gives way. Nothing here is of worth: what is lost, is copied again.
"""

import errno
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from filelock import FileLock, Timeout

from wsi_idc.digests import digest, fingerprint
from wsi_idc.errors import AccessError, ChangedError, SlideError, UsageError, WsiIdcError, system_reason
from wsi_idc.objects import is_url
from wsi_idc.settings import StageSettings
from wsi_idc.slides.whole import is_dicom
from wsi_idc.sources import Part, Root, Source, Url, named_in, roots

Wanted: TypeAlias = tuple[Source, str]
"""Where something lies, and its fingerprint."""

GB = 10**9
_PIECE = 2**24
"""Bytes that are copied together; of an object, by one request."""
_PIECES = 4
"""Under way at once."""
_BETWEEN_S = 10.0
"""A slide's tasks follow each other within seconds: an entry unused for so long is wanted by none that is under way."""
_FORGOTTEN_S = 3600.0
"""An entry unused for so long is deleted by whoever comes next, needed or not."""
_PATIENCE_S = 6 * 3600.0
_RESERVE = GB
"""Bytes of the disk that are left free, but at most a hundredth of it."""
_NAME = re.compile(r"(?P<key>[0-9a-f]{16})\.(?P<bytes>\d+)\.staged")
_DELETED = ".deleted"
_NAMING_PARTS = (".vms", ".vmu")


def stage_of(settings: StageSettings, *, here: bool) -> "Stage | None":
    """The stage that a user asked for; None where none was.

    Args:
        settings: what was asked for.
        here: whether it will be used on this host.

    Raises:
        UsageError: it is no folder that can be written to.
    """
    if not settings.stage:
        return None
    if is_url(settings.stage):
        raise UsageError(f"--stage {settings.stage}", "is a URL", "give a folder on a local disk")
    stage = Stage(Path(settings.stage).expanduser().absolute(), int(settings.stage_gb * GB))
    if here:
        stage.make()
    return stage


def unusable(stage: "Stage | None") -> list[str]:
    """Why a stage cannot be used on this host."""
    try:
        if stage is not None:
            stage.make()
    except UsageError as error:
        return [str(error)]
    return []


@contextmanager
def at_hand(stage: "Stage | None", sources: Sequence[Wanted]) -> Iterator[Mapping[Source, Path]]:
    """Where a slide, and what goes with it, can be read: on the stage where there is one, else where they lie.

    Of what goes with a slide, only what lies in an object store is copied.

    Args:
        stage: the cache, or None.
        sources: the slide; then its annotation and mask.

    Raises:
        SlideError: they cannot be had. ChangedError: they are not what they were.
    """
    places: dict[Source, Path] = {source: source for source, _ in sources if isinstance(source, Path)}
    staged = _staged(stage, sources)
    if stage is None:
        yield places
        return
    with stage.hold(staged) as copies:
        yield {**places, **copies}


def drop(stage: "Stage | None", sources: Sequence[Wanted]) -> None:
    """Delete what `at_hand` copied; what others use, they delete."""
    if stage is not None:
        stage.drop(_staged(stage, sources))


def _staged(stage: "Stage | None", sources: Sequence[Wanted]) -> list[Wanted]:
    urls = [wanted for wanted in sources if isinstance(wanted[0], Url)]
    if stage is None:
        for source, _ in urls:
            raise SlideError(source, "lies in an object store", "give --stage DIR, where it can be copied to")
    return [*sources[:1], *(wanted for wanted in urls if wanted is not sources[0])]


class _Entry:
    """One entry of a stage; asked and changed under the stage's lock."""

    def __init__(self, folder: Path, key: str, size: int) -> None:
        self.folder, self.key, self.size = folder, key, size
        self.slide, self._using = folder / "slide", folder / "using"
        self._seen = self._using.stat().st_mtime if self._using.is_dir() else 0.0

    @property
    def whole(self) -> bool:
        return self.slide.is_dir()

    @property
    def unwanted(self) -> bool:
        return (self.folder / "unwanted").exists()

    @property
    def unused_s(self) -> float:
        """Seconds since somebody came or left."""
        return time.time() - self._seen

    def users(self) -> tuple[bool, bool]:
        """Whether somebody uses it, and whether somebody died who did."""
        died = False
        for file in list(self._using.iterdir()) if self._using.is_dir() else []:
            try:
                with FileLock(file, blocking=False):
                    died = True
            except Timeout:
                return True, died
            file.unlink(missing_ok=True)
        return False, died

    def join(self) -> FileLock:
        self._using.mkdir(parents=True, exist_ok=True, mode=0o700)
        use = FileLock(self._using / uuid.uuid4().hex, thread_local=False)
        use.acquire()
        return use

    def missing(self) -> int:
        """Bytes that are still to be copied."""
        if self.whole:
            return 0
        files = [file.stat() for file in (self.folder / "part").rglob("*") if file.is_file()]
        return max(0, self.size - sum(status.st_blocks * 512 for status in files))

    def delete(self) -> bool:
        """Delete it; whether that went well."""
        gone = self.folder.with_name(f"{self.folder.name}{_DELETED}")
        with suppress(OSError):
            self.folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        return not self.folder.exists()


@dataclass(frozen=True)
class Stage:
    """A folder on a local disk.

    Attributes:
        folder: absolute.
        limit: bytes that it holds at most.
    """

    folder: Path
    limit: int

    def make(self) -> None:
        """Make it where it is not there, and delete what others left in it.

        Raises:
            UsageError: it cannot be used.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.alone():
                self.sweep()
        except OSError as error:
            problem = f"cannot be used ({system_reason(error)})"
            raise UsageError(f"--stage {self.folder}", problem, "give a folder that you can write to") from error

    @contextmanager
    def hold(self, sources: Sequence[Wanted]) -> Iterator[dict[Source, Path]]:
        """Copies of sources, made where there are none, kept as long as they are used and after that until `drop`.

        An error within that names a copy is made to name its source, and drops the copies.

        Raises:
            AccessError: a source cannot be read.
            ChangedError: it is not what its fingerprint says.
            SlideError: it cannot be copied.
        """
        entry, use = self._enter(sources)
        copies = {source: place for (source, _), (_, place) in zip(sources, _places(entry, sources), strict=True)}
        failed = True
        try:
            with _named_as_given(copies):
                yield copies
            failed = False
        finally:
            self._leave(entry, use, unwanted=failed)

    def drop(self, sources: Sequence[Wanted]) -> None:
        """Delete copies, now or when nobody uses them any more."""
        if not self.folder.is_dir():
            return
        key = _key(sources)
        with suppress(OSError), self.alone():
            for entry in self._entries():
                if entry.key == key:
                    self._unwant(entry)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else decides anything meanwhile."""
        with FileLock(self.folder / "wsi-idc-stage.lock"):
            yield

    def sweep(self) -> list[_Entry]:
        """Delete what those left who were killed, and what was forgotten; gives back the others."""
        for child in self.folder.glob(f"*{_DELETED}"):
            if _NAME.fullmatch(child.name.removesuffix(_DELETED)):
                shutil.rmtree(child, ignore_errors=True)
        kept = []
        for entry in self._entries():
            used, died = entry.users()
            leftover = died or entry.unwanted or not entry.whole or entry.unused_s > _FORGOTTEN_S
            if used or not leftover or not entry.delete():
                kept.append(entry)
        return kept

    def _entries(self) -> list[_Entry]:
        found = [(child, _NAME.fullmatch(child.name)) for child in self.folder.iterdir()]
        return [_Entry(child, match["key"], int(match["bytes"])) for child, match in found if match]

    def _enter(self, sources: Sequence[Wanted]) -> tuple[_Entry, FileLock]:
        """The entry of sources, whole, and the use of it."""
        key, patience = _key(sources), _Patience()
        found: list[list[Root]] = []
        with self._refusals(sources[0][0]):
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                mine = False
                use: FileLock | None = None
                with self.alone():
                    entries = self.sweep()
                    entry = next((one for one in entries if one.key == key), None)
                    if entry is not None and entry.whole:
                        use = entry.join()
                    elif entry is None and found and self._has_room(entries, _size(found), sources[0][0]):
                        entry, mine = _Entry(self.folder / f"{key}.{_size(found)}.staged", key, _size(found)), True
                        use = entry.join()
                if entry is not None and use is not None:
                    if self._fill(entry, use, sources, found) if mine else self._still_whole(entry, use, sources):
                        return entry, use
                elif entry is None and not found:
                    found = [_look(source) for source, _ in sources]
                    self._check_size(_size(found), sources[0][0])
                else:
                    patience.wait({one.folder.name for one in entries}, self.folder, sources[0][0])

    def _fill(self, entry: _Entry, use: FileLock, sources: Sequence[Wanted], found: list[list[Root]]) -> bool:
        """Copy sources into an entry that was just begun."""
        try:
            _copy(entry.folder / "part", sources, found)
            with self.alone():  # Others count what is still to be copied.
                (entry.folder / "part").rename(entry.slide)
        except BaseException:
            self._leave(entry, use, unwanted=True)
            raise
        return True

    def _still_whole(self, entry: _Entry, use: FileLock, sources: Sequence[Wanted]) -> bool:
        """Whether what was copied before is still there: a machine may have lost power since."""
        with suppress(OSError):
            if all(fingerprint(place) == content for place, content in _prints(entry, sources)):
                return True
        self._leave(entry, use, unwanted=True)
        return False

    def _leave(self, entry: _Entry, use: FileLock, *, unwanted: bool) -> None:
        with suppress(OSError), self.alone():
            use.release()
            Path(use.lock_file).unlink(missing_ok=True)
            if unwanted or entry.unwanted:
                self._unwant(entry)
        use.release()

    def _unwant(self, entry: _Entry) -> None:
        used, _ = entry.users()
        if used:
            (entry.folder / "unwanted").touch()
        else:
            entry.delete()

    def _has_room(self, entries: list[_Entry], need: int, source: Source) -> bool:
        """Whether so many bytes fit; what nobody uses is deleted for them, the longest unused first.

        Raises:
            SlideError: the disk has no room for them, whatever is deleted.
        """
        disk = shutil.disk_usage(self.folder)
        free = disk.free - min(_RESERVE, disk.total // 100) - sum(entry.missing() for entry in entries)
        held = sum(entry.size for entry in entries)
        if need > free + held:
            free_gb = f"{_gb(need)} are needed, {_gb(max(0, free + held))} can be had"
            problem = f"does not fit on the disk of --stage {self.folder}: {free_gb}"
            raise SlideError(source, problem, "make room there, or give another --stage")
        for entry in sorted(entries, key=lambda entry: -entry.unused_s):
            if held + need <= self.limit and need <= free:
                break
            if entry.whole and entry.unused_s > _BETWEEN_S and not entry.users()[0] and entry.delete():
                held, free = held - entry.size, free + entry.size
        return held + need <= self.limit and need <= free

    def _check_size(self, need: int, source: Source) -> None:
        if need > self.limit:
            problem = f"has {_gb(need)}, more than the stage may hold (--stage-gb {self.limit / GB:g})"
            raise SlideError(source, problem, "raise --stage-gb")

    @contextmanager
    def _refusals(self, source: Source) -> Iterator[None]:
        """What the stage's own disk refuses is that slide's failure: a smaller one may fit."""
        try:
            yield
        except OSError as error:
            problem = f"cannot be copied to --stage {self.folder}: {error.strerror or error}"
            raise SlideError(source, problem, "make room there, or give another --stage") from error


class _Patience:
    """Waiting for others to leave, as long as they do."""

    def __init__(self) -> None:
        self._before: set[str] = set()
        self._since = time.monotonic()

    def wait(self, entries: set[str], folder: Path, source: Source) -> None:
        """Wait a little.

        Raises:
            SlideError: nobody has come or left for hours.
        """
        if entries != self._before:
            self._before, self._since = entries, time.monotonic()
        if time.monotonic() - self._since > _PATIENCE_S:
            problem = f"found no room in --stage {folder} for {_PATIENCE_S / 3600:g} hours: other slides hold it"
            raise SlideError(source, problem, "raise --stage-gb, or see whether another run hangs")
        time.sleep(0.2)


def _key(sources: Sequence[Wanted]) -> str:
    return digest([[str(source), content] for source, content in sources])


def _size(found: list[list[Root]]) -> int:
    return sum(part.size for all_roots in found for root in all_roots for part in root.parts)


def _places(entry: _Entry, sources: Sequence[Wanted], folder: str = "slide") -> list[tuple[Source, Path]]:
    """Each source, and where its copy is."""
    return [(source, entry.folder / folder / str(number) / source.name) for number, (source, _) in enumerate(sources)]


def _prints(entry: _Entry, sources: Sequence[Wanted]) -> list[tuple[Path, str]]:
    return [(place, content) for (_, place), (_, content) in zip(_places(entry, sources), sources, strict=True)]


def _gb(size: int) -> str:
    return f"{size / GB:.3g} GB"


@contextmanager
def _named_as_given(copies: Mapping[Source, Path]) -> Iterator[None]:
    """Users know their slides by their own names, and never by the cache's."""

    def given(text: str) -> str:
        for source, place in copies.items():
            text = text.replace(str(place), str(source))
        return text

    try:
        yield
    except WsiIdcError as error:
        error.subject, error.problem = given(error.subject), given(error.problem)
        error.args = (error.subject, error.problem, error.advice)
        raise
    except OSError as error:
        error.filename = given(error.filename) if isinstance(error.filename, str) else error.filename
        raise


def _look(source: Source) -> list[Root]:
    """What is to be copied of a source: what its fingerprint is of, and the files beside it that it names.

    Raises:
        AccessError: it cannot be looked at.
        SlideError: it has files beside it that cannot be known.
    """
    with access_to(source):
        found = roots(source)
        (first, *others) = found
        if first.is_folder:
            return found
        suffix = PurePosixPath(first.name).suffix.lower()
        if suffix in _NAMING_PARTS:
            text = first.parts[0].read(0, min(first.parts[0].size, 2**20)).decode("utf-8", "replace")
            for name in dict.fromkeys(named_in(text)):
                if name and name == PurePosixPath(name).name:
                    with suppress(FileNotFoundError):
                        others += [root for root in roots(source.with_name(name)) if not root.is_folder]
        elif suffix == ".dcm" or not any(map(str.isalpha, suffix)):
            head = first.parts[0].read(0, min(first.parts[0].size, 132))
            if is_dicom(head):
                problem = "is one file of a DICOM slide, whose other levels lie beside it"
                raise SlideError(source, problem, "give the folder: with --stage, a DICOM slide is a folder")
        return [first, *others]


def _copy(target: Path, sources: Sequence[Wanted], found: list[list[Root]]) -> None:
    """Copy sources.

    Raises:
        AccessError: they cannot be read.
        ChangedError: they are not what they were when they were looked at, or when the run was planned.
        OSError: the copies cannot be written.
    """
    for number, ((source, content), all_roots) in enumerate(zip(sources, found, strict=True)):
        folder, pieces = target / str(number), list[tuple[Part, Path, int]]()
        for root in all_roots:
            (folder / root.name if root.is_folder else folder).mkdir(parents=True, exist_ok=True, mode=0o700)
            for part in root.parts:
                file = folder / root.name / part.inner if root.is_folder else folder / root.name
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                file.touch(mode=0o600)
                pieces += [(part, file, start) for start in range(0, part.size, _PIECE)]
        with ThreadPoolExecutor(_PIECES) as executor:
            for _ in executor.map(_piece_of(source), pieces):
                pass
        if _look(source) != all_roots:
            raise _changed(source)
        with access_to(source):
            if fingerprint(folder / source.name) != content:
                raise ChangedError(source, "changed since the run was planned", "run again when it is complete")


def _piece_of(source: Source) -> Callable[[tuple[Part, Path, int]], None]:
    """Copies one piece: a part, the file that takes it, and where the piece begins in both."""

    def copy(piece: tuple[Part, Path, int]) -> None:
        part, file, start = piece
        stop = min(start + _PIECE, part.size)
        with access_to(source):
            data = part.read(start, stop)
        if len(data) != stop - start:
            raise _changed(source)
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(data)

    return copy


@contextmanager
def access_to(source: Source) -> Iterator[None]:
    """What the system, or an object store, says of a source is its slide's failure."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ESTALE:
            raise _changed(source) from error
        raise AccessError.of(source, error) from error


def _changed(source: Source) -> ChangedError:
    return ChangedError(source, "changed while it was copied", "run again when it is complete")
