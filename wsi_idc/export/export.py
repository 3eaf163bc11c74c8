"""Results as files that other programs read: one a slide and format, written anew where its reasons changed.

    OUT/<format>/<slide_id><suffix>       a file or a folder
    OUT/slides.csv, OUT/slides.parquet    a row a slide
    OUT/exported.json                     what each was made from

The store is the truth and `exported.json` only saves work: a file that is gone, or not of the size and time that stand
there, is written again. So what a killed run left counts for nothing, be it a folder that it began to remove, or a file
that it put in its place and could not note. Files that no current map stands behind are named and left where they are.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from wsi_idc import __version__
from wsi_idc.digests import digest
from wsi_idc.errors import (
    SlideError,
    StoreBusyError,
    StoreDamageError,
    StoreWriteError,
    UsageError,
    system_advice,
    system_reason,
)
from wsi_idc.files import flush_all, flush_folder, write_whole
from wsi_idc.plan import Plan, plan
from wsi_idc.results import Absent, Choice, Result, choose_model, limited, look
from wsi_idc.settings import ExportFormat, ExportSettings
from wsi_idc.store import open_store
from wsi_idc.work.jobs import Listener, Outcome, Summary

INDEX = "exported.json"
WRITE_S = 5.0
"""Seconds after which what was done is noted down."""
_NAMED = 5
"""Files that a note names."""


class Format(Protocol):
    """A module of this package that writes one format.

    Attributes:
        SUFFIX: of its files' or folders' names; one that has several is a `SeveralSuffixes` too.
        VERSION: another one where the same result would give another file.

    A format that not every slide can have also has a function `lacks(result)`: why a slide cannot, or "".
    """

    SUFFIX: str
    VERSION: int

    def write(self, result: Result, path: Path) -> list[str]:
        """Write a slide's result to a path where nothing is; gives warnings.

        Raises:
            SlideError: it cannot be had in this format.
            OSError: it cannot be written.
        """


@runtime_checkable
class SeveralSuffixes(Protocol):
    """A module whose files have another suffix where there is a reason."""

    def suffix(self, result: Result) -> str:
        """The suffix of a result's file."""


_MODULES: Mapping[ExportFormat, str] = {
    "csv": "tile_csv",
    "parquet": "tile_parquet",
    "geojson": "geojson",
    "png": "png",
    "ome-tiff": "ome_tiff",
    "ngff": "ngff",
    "ngff-0.4": "ngff_04",
    "annotation-store": "annotation_store",
    "dicom": "dicom",
}
FORMATS = tuple(_MODULES)


def format_of(name: ExportFormat) -> Format:
    """The module that writes a format."""
    return cast(Format, import_module(f"wsi_idc.export.{_MODULES[name]}"))


def lacks(name: ExportFormat, result: Result) -> str:
    """Why a slide cannot have a format, whatever its map is; "" where it can."""
    return str(getattr(format_of(name), "lacks", lambda result: "")(result))


def export(
    address: str | Path,
    model: str | None,
    settings: ExportSettings,
    *,
    only: Sequence[str] = (),
    listed: Collection[str] | None = None,
    force: bool = False,
    listener: Callable[[Sequence[str]], Listener],
) -> Summary:
    """Bring the files of every slide with a current map up to it.

    A slide whose tiles are complete and that has no current map is a failure, by name: what is there of it is not shown
    as its result. Slides without tiles are counted in a note.

    Args:
        address: the store's.
        model: whose maps, as `choose_model` takes it.
        settings: which formats, where, which threshold.
        only: slide ids to which it is limited; all where empty.
        listed: the slide ids of the manifest, where one is given: other slides of the store are left out.
        force: write again what is up to date.
        listener: is given the slides that are looked at, and gives back what is told of their progress.

    Raises:
        UsageError: there is no map, or the folder cannot be written.
        StoreBusyError: another run writes there.
        StoreWriteError: the folder's disk is full or takes no writes.
    """
    start = time.monotonic()
    store = open_store(address)
    choice = choose_model(store, model)
    whole = not only
    names = limited(store.all_slide_ids(), only, listed)
    told = listener(names)
    plans: dict[str, Plan] = {}
    outcomes: dict[str, Outcome] = {}
    left_out: Counter[str] = Counter()
    untiled = 0
    with _held(settings.out):
        index = _Index(settings.out)
        rows = []
        needs: dict[str, dict[str, Any]] = {}
        try:
            for name in names:
                found = look(store, choice, name, settings.threshold)
                index.write_now_and_then()
                if isinstance(found, Absent):
                    rows.append(_absent_row(found, choice))
                    if found.kind == "no positive class":
                        left_out[f"{found.kind}: {found.why}"] += 1
                        continue
                    if found.kind == "not extracted":
                        untiled += 1
                        continue
                    plans[name] = Plan("run", str(found))
                    outcomes[name] = Outcome("failed", reason=str(found) + index.left_behind(name))
                    told.ended(name, outcomes[name])
                    continue
                needs[name] = _made_from(found)
                kinds = []
                for kind in settings.formats:
                    if why := lacks(kind, found):
                        left_out[f"{kind}: {why}"] += 1
                    else:
                        kinds.append(kind)
                if not kinds:
                    continue
                plans[name], outcome, row = _one_slide(found, kinds, settings.out, index, force=force)
                rows.append(row)
                if outcome is not None:
                    outcomes[name] = outcome
                    told.ended(name, outcome)
            notes = _write_slides(settings, rows, whole=whole)
            if whole:
                notes += _left_behind(index, needs, outcomes)
        finally:
            index.write()
    notes += [f"{why}: {count} slide{'s' if count != 1 else ''} left out" for why, count in left_out.items()]
    if untiled:
        notes.append(
            f"{untiled} slide{'s' if untiled != 1 else ''} without complete tiles left out: see wsi-idc status"
        )
    return Summary(plans, outcomes, time.monotonic() - start, tuple(notes))


def _left_behind(index: "_Index", needs: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> list[str]:
    """A note on files that no current map stands behind, or one of other settings than this run's.

    Args:
        index: what the folder holds.
        needs: slide id -> what its files would be made from now; none of a slide without a current map.
        outcomes: those that failed have said so already.
    """
    old = [
        file
        for name, kind, file, made_from in index.files()
        if (name not in outcomes or outcomes[name].status == "done")
        and made_from != {**needs.get(name, {}), "format": format_of(kind).VERSION}
    ]
    if not old:
        return []
    shown = ", ".join(old[:_NAMED]) + (", ..." if len(old) > _NAMED else "")
    one = len(old) == 1
    return [
        f"{len(old):,} file{'' if one else 's'} there {'is' if one else 'are'} of no current map, or of other settings "
        f"({shown}): export {'its format' if one else 'their formats'} again, or delete {'it' if one else 'them'}"
    ]


def _one_slide(
    result: Result, kinds: Sequence[ExportFormat], out: Path, index: "_Index", *, force: bool
) -> tuple[Plan, Outcome | None, dict[str, Any]]:
    """What was to be done with a slide, what became of it, and its row."""
    from wsi_idc.export.tables import slide_row

    name, need = result.slide_id, _made_from(result)
    decided: dict[ExportFormat, Plan] = {}
    for kind in kinds:
        decided[kind] = plan({**need, "format": format_of(kind).VERSION}, index.made_from(name, kind), force=force)
    todo = {kind: one for kind, one in decided.items() if one.action != "skip"}
    row = index.row(name, need)
    if not todo and row is not None:
        return Plan("skip", "already done"), None, row
    first = next(iter(todo.values()), Plan("run", "new"))
    warnings: list[str] = []
    failures: list[str] = []
    try:
        for kind in todo:
            try:
                path, more = _write_one(result, kind, out)
                warnings += more
                index.put(name, kind, {**need, "format": format_of(kind).VERSION}, path)
            except StoreDamageError:
                raise
            except SlideError as error:  # Of this format alone: the slide may have the others.
                failures.append(f"{kind}: {error}")
        row = slide_row(result)
        index.put_row(name, need, row)
    except StoreDamageError as error:
        row = _absent_row(Absent(name, "damaged", error.problem, result.slide), Choice(result.model))
        return first, Outcome("failed", reason=str(error)), row
    if failures:
        return first, Outcome("failed", reason="; ".join(failures), warnings=tuple(warnings)), row
    return first, Outcome("done", tiles=result.slide.count, warnings=tuple(warnings)), row


def _made_from(result: Result) -> dict[str, Any]:
    """What files of a result are made from, by the names that a user is told."""
    tiles = {name: result.slide.attributes.get(name) for name in ("patient_id", "split", "label", "path", "origin")}
    return {
        "map": digest([result.model, (result.map.record.complete or {}).get("checksums"), result.map.record.made_from]),
        "slide": digest([tiles, result.slide.attributes["complete"]["checksums"]]),
        "threshold": result.threshold,
        "wsi-idc": __version__,
    }


def _write_one(result: Result, kind: ExportFormat, out: Path) -> tuple[Path, list[str]]:
    """Write one file beside its place, and put it there when it is whole; gives its place, and warnings."""
    module = format_of(kind)
    suffix = module.suffix(result) if isinstance(module, SeveralSuffixes) else module.SUFFIX
    path = out / kind / f"{result.slide_id}{suffix}"
    beside = path.with_name(f".part-{path.name}")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(beside)
    try:
        with _writing(path):
            warnings = module.write(result, beside)
            flush_all(beside)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            beside.replace(path)
            flush_folder(path.parent)
        return path, warnings
    finally:
        with _writing(path):
            _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Around writes: what the system refuses ends the export, since the next slide meets the same.

    Raises:
        StoreWriteError: it refused.
    """
    try:
        yield
    except OSError as error:
        advice = system_advice(error) or "choose another --out"
        raise StoreWriteError(path, f"cannot be written ({system_reason(error)})", advice) from error


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder, made if there is none, which no other run writes meanwhile.

    Raises:
        UsageError: it cannot be written.
        StoreBusyError: another run writes there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StoreBusyError(out, "another run writes there", "wait for it, or use another --out") from error
    except OSError as error:
        raise UsageError(out, f"cannot be written ({system_reason(error)})", "choose another --out") from error
    try:
        yield
    finally:
        lock.release()


@dataclass
class _Index:
    """What stands in `exported.json`: slide id -> format -> the file's name, what it was made from, size, time."""

    out: Path

    def __post_init__(self) -> None:
        try:
            found = json.loads((self.out / INDEX).read_bytes())
        except (OSError, ValueError, RecursionError):
            found = {}
        self._slides: dict[str, Any] = found if isinstance(found, dict) else {}
        self._written = time.monotonic()

    def _entry(self, name: str, kind: str) -> dict[str, Any]:
        slide = self._slides.get(name)
        entry = slide.get(kind) if isinstance(slide, dict) else None
        return entry if isinstance(entry, dict) else {}

    def made_from(self, name: str, kind: ExportFormat) -> dict[str, Any] | None:
        """What a file that is there was made from; None where it is not, or not as it was written."""
        entry, path = self._entry(name, kind), self._path(name, kind)
        try:
            same = path is not None and _stamp(path) == entry.get("stamp")
        except OSError:
            same = False
        made_from = entry.get("made from")
        return made_from if same and isinstance(made_from, dict) else None

    def _path(self, name: str, kind: ExportFormat) -> Path | None:
        """Where a slide's file was put; None where none was, or what stands there is no name of one of its files."""
        file = self._entry(name, kind).get("file")
        if not isinstance(file, str) or "/" in file or not file.startswith(f"{name}{format_of(kind).SUFFIX}"):
            return None
        return self.out / kind / file

    def put(self, name: str, kind: ExportFormat, made_from: Mapping[str, Any], path: Path) -> None:
        """A file was written; one that the slide had before under another suffix goes."""
        before = self._path(name, kind)
        if before is not None and before != path:
            with _writing(before):
                _remove(before)
        entry = {"file": path.name, "made from": dict(made_from), "stamp": _stamp(path)}
        self._slides.setdefault(name, {})[kind] = entry

    def row(self, name: str, need: Mapping[str, Any]) -> dict[str, Any] | None:
        """The slide's row, where it was made from the same."""
        entry = self._entry(name, "row")
        return entry.get("row") if entry.get("made from") == need else None

    def put_row(self, name: str, need: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Keep a slide's row."""
        self._slides.setdefault(name, {})["row"] = {"made from": dict(need), "row": dict(row)}

    def left_behind(self, name: str) -> str:
        """Words about files of a slide that are of an older map; "" where there are none."""
        kinds = [kind for kind in FORMATS if self.made_from(name, kind) is not None]
        return f"; what {' and '.join(kinds)} have of it is of an older map" if kinds else ""

    def files(self) -> Iterator[tuple[str, ExportFormat, str, dict[str, Any]]]:
        """Slide, format and name of every file that is there as it was written, and what it was made from."""
        for name in sorted(self._slides):
            for kind in FORMATS:
                if (made_from := self.made_from(name, kind)) is not None:
                    yield name, kind, f"{kind}/{self._entry(name, kind)['file']}", made_from

    def write_now_and_then(self) -> None:
        """Put it in its place every few seconds: what a run has done that is interrupted is not done again."""
        if time.monotonic() - self._written > WRITE_S:
            self.write()

    def write(self) -> None:
        """Put it in its place."""
        with _writing(self.out / INDEX):
            write_whole(self.out / INDEX, json.dumps(self._slides).encode())
        self._written = time.monotonic()


def _stamp(path: Path) -> list[int]:
    """Bytes of a file, or of all files of a folder, and when the last of them was written."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    found = [file.stat() for file in files]
    return [sum(one.st_size for one in found), max((one.st_mtime_ns for one in found), default=0)]


def _absent_row(absent: Absent, choice: Choice) -> dict[str, Any]:
    from wsi_idc.export.tables import absent_row

    return absent_row(absent, choice.model)


def _write_slides(settings: ExportSettings, rows: Sequence[Mapping[str, Any]], *, whole: bool) -> list[str]:
    """The tables of a row a slide, beside the formats that have tables; gives notes."""
    from wsi_idc.export.tables import SLIDE_TABLES, write_slides

    kinds = [kind for kind in settings.formats if kind in SLIDE_TABLES]
    if not whole:
        return [f"slides.{kind} is not written with --only: it has a row a slide" for kind in kinds]
    for kind in kinds:
        path = settings.out / f"slides.{kind}"
        with _writing(path):
            write_slides(kind, rows, path)
    return []
