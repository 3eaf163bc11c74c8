"""From a folder of slides to a manifest.

What is a slide is for the caller's `detect` to say; here is what a folder looks like: companions, copies, links, ids.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TextIO

from wsi_idc.errors import SlideError, UsageError, system_reason
from wsi_idc.files import write_whole
from wsi_idc.manifest import (
    COLUMNS,
    SPLITS,
    Row,
    fault,
    look_alike_faults,
    raise_faults,
    read_table,
    split_advice,
)
from wsi_idc.names import MAX_ID_BYTES, check_slide_id, same_name
from wsi_idc.sources import Source, named_in
from wsi_idc.units import MPP_RANGE, Mpp

Kind = Literal["slide", "folder-slide", "patches"]
Detect = Callable[[Path], Kind | None]
"""What a path is: a file that is a slide, a folder that is one, a folder of IDC patches, or none of these."""

_ANNOTATIONS = (".geojson", ".geojson.gz", ".xml")
_NAMING_PARTS = (".vms", ".vmu")
_ZARR_MARKS = ("zarr.json", ".zgroup", ".zarray")
_NAMED = 3
"""Names that a line gives of many."""


@dataclass
class LeftOut:
    """How much of a folder is not in its manifest, and why."""

    copies: int = 0
    """Folders of patches whose patient was found nearer the top."""
    others: int = 0
    """Files that are no slides, annotations not counted."""
    unreadable: list[Path] = field(default_factory=list)
    """Files and folders that cannot be read."""
    unwritable: list[Path] = field(default_factory=list)
    """Slides whose path cannot be written into a CSV in UTF-8."""

    def lines(self) -> list[str]:
        """What was left out, as a user reads it."""
        counts = [
            (self.copies, "folder", "of patches: a second copy of a patient found nearer the top"),
            (self.others, "file", "that no reader knows as a slide"),
        ]
        faults = [(self.unreadable, "cannot be read"), (self.unwritable, "its path cannot be written in UTF-8")]
        named = [f"left out {str(path)!r}: {why}" for paths, why in faults for path in paths]
        told = [f"left out {count} {noun}{'s' if count != 1 else ''} {why}" for count, noun, why in counts if count]
        return [*told, *named]


@dataclass(frozen=True)
class Scan:
    """The slides of a folder, and what a user should know of how they were found.

    Attributes:
        rows: in the order of their paths.
        left_out: what of the folder is no slide.
        unknown: ids of the split file that are of no slide found.
        without_split: slides that a split file gives no split.
    """

    rows: list[Row]
    left_out: LeftOut
    unknown: list[str] = field(default_factory=list)
    without_split: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What a user should know, a line each. An id misspelt in a split file leaks as a split misspelt does."""
        lines = self.left_out.lines()
        if self.unknown:
            ids = (
                "1 id of the split file is"
                if len(self.unknown) == 1
                else f"{len(self.unknown):,} ids of the split file are"
            )
            lines.append(f"{ids} of no slide found: {_first(self.unknown)}")
        if self.without_split:
            count = f"{len(self.without_split):,} of {len(self.rows):,} slides"
            lines.append(f"{count} have no split: {_first(self.without_split)}")
        return lines


def _first(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:_NAMED]), *(["..."] if len(names) > _NAMED else [])])


def scan(folder: Path, detect: Detect, splits: Mapping[str, str] | None = None) -> Scan:
    """The slides of a folder and of those below it.

    Hidden files, what belongs to a slide already found (the folder of an MRXS, the pictures of a VMS), and Zarr groups
    that are no slides are passed over; links to folders are followed, each folder once. An annotation beside its slide
    (`<stem>.geojson`, `<stem>.geojson.gz`, or `<stem>.xml` of ASAP) goes with it.

    Args:
        folder: a folder of slides, of patient folders, or a slide itself.
        detect: says what a path is; an OSError means that it cannot be read.
        splits: the split of a patient or slide, by its id; others get none.

    Raises:
        UsageError: there is no such folder.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UsageError(folder, what, "name the folder that holds the slides")
    left_out = LeftOut()
    found = _without_copies(sorted(_walk(folder, detect, left_out)), left_out)
    ids = _ids(folder, [path for path, _ in found])
    rows, used = [], set()
    for (path, kind), slide_id in zip(found, ids, strict=True):
        patient = path.name if kind == "patches" else slide_id
        names = (patient, slide_id, _stem(path))
        named = [name for name in names if splits and name in splits]
        used.update(named)
        split = next((splits[name] for name in named if splits[name]), "") if splits else ""
        annotation = _annotation(path) if kind == "slide" else None
        rows.append(Row(slide_id, path, patient, annotation=annotation, split=split))
    if splits is None:
        return Scan(rows, left_out)
    unknown = [name for name in splits if name not in used]
    return Scan(rows, left_out, unknown, [row.slide_id for row in rows if not row.split])


def fill_mpp(rows: Sequence[Row], mpp: Mpp, lacks_mpp: Callable[[Path], bool]) -> tuple[list[Row], list[str]]:
    """The rows, with um/px for the slides that have none of their own, and what a user should know of it.

    Args:
        rows: the slides.
        mpp: level-0 um/px of those that have none.
        lacks_mpp: whether a slide's own um/px is absent or impossible.

    Raises:
        UsageError: no slide can have that um/px.
    """
    low, high = MPP_RANGE
    if not low <= mpp <= high:
        raise UsageError(
            f"--mpp {mpp:g}", f"is not between {low:g} and {high:g} um/px", "give that of the finest level"
        )
    filled, lines = [], []
    for row in rows:
        try:
            lacks = isinstance(row.path, Path) and lacks_mpp(row.path)
        except (SlideError, OSError) as error:
            lacks = False
            reason = error.reason if isinstance(error, SlideError) else system_reason(error)
            lines.append(f"no um/px given to {str(row.path)!r}: {reason}")
        filled.append(replace(row, mpp=mpp) if lacks else row)
    count = sum(row.mpp is not None for row in filled)
    others = "" if count == len(rows) else "; the others have their own or cannot be opened"
    return filled, [*lines, f"{mpp:g} um/px given to {count:,} of {len(rows):,} slides{others}"]


def read_split_file(path: Path) -> dict[str, str]:
    """The split of each patient, by its id: "train", "val", "test", or "" where the field is empty.

    Args:
        path: CSV with the columns `split` and `patient_id`, `slide_id`, or both; where both are, the patient counts,
            and the slide where no patient is given.

    Raises:
        ManifestError: every fault of the file.
    """
    faults: list[tuple[int, str]] = []
    table = read_table(path, faults)
    faults += look_alike_faults(table.columns, ("patient_id", "slide_id", "split"))
    keys = [name for name in ("patient_id", "slide_id") if name in table.columns]
    if table.columns and not (keys and "split" in table.columns):
        missing = "split" if keys else "patient_id"
        advice = "the header needs 'split', and 'patient_id' or 'slide_id'"
        faults.append((1, fault(missing, ", ".join(table.columns), f"the header has no column {missing!r}", advice)))
        raise_faults(path, faults)
    splits: dict[str, tuple[str, int]] = {}
    for line, values in table.rows:
        key = next((name for name in keys if values[name]), None)
        if key is None:
            faults.append((line, fault(keys[0], "", "is empty", "write an id")))
            continue
        name, split = values[key], values["split"].casefold()
        if split and split not in SPLITS:
            faults.append((line, fault("split", values["split"], "is not a split", split_advice(split))))
            continue
        before, first = splits.setdefault(name, (split, line))
        if split and before and split != before:
            problem = f"{name!r} is in {before!r} at line {first}"
            faults.append((line, fault("split", split, problem, "give each patient one split")))
        elif split and not before:
            splits[name] = (split, line)
    raise_faults(path, faults)
    return {name: split for name, (split, _) in splits.items()}


def write_manifest(target: str | os.PathLike[str] | TextIO, rows: Sequence[Row]) -> None:
    """Write a manifest that `read_manifest` reads back as the same rows.

    Columns that no row uses are left out. Paths below the manifest's folder are written relative to it; all others,
    and all in a stream, are absolute. A file is put in its place whole.

    Raises:
        UsageError: the file cannot be written.
    """
    if not isinstance(target, str | os.PathLike):
        target.write(_to_csv(rows, None))
        return
    path = Path(target)
    if path.exists() and not path.is_file():
        raise UsageError(path, "is not a file", "name a file, or leave -o out and redirect what is printed")
    try:
        write_whole(path, _to_csv(rows, path.absolute().parent).encode())
    except OSError as error:
        raise UsageError(
            path, f"cannot be written ({error.strerror})", "name a file in a folder you can write"
        ) from error


def _to_csv(rows: Sequence[Row], folder: Path | None) -> str:
    records = [_to_record(row, folder) for row in rows]
    extra = dict.fromkeys(name for row in rows for name in row.metadata)
    used = [name for name in COLUMNS[3:] if any(record[name] for record in records)]
    columns = [*COLUMNS[:3], *used, *extra]
    # The csv module does not quote a lone carriage return on its own.
    returns = any("\r" in value for record in records for value in [*record, *record.values()])
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL)
    writer.writerow(columns)
    writer.writerows([record.get(name, "") for name in columns] for record in records)
    return stream.getvalue()


def _to_record(row: Row, folder: Path | None) -> dict[str, str]:
    def relative(path: Source | None) -> str:
        if not isinstance(path, Path):
            return str(path or "")
        if folder is not None and path.is_relative_to(folder) and path != folder:
            text = path.relative_to(folder).as_posix()
            return text if text == text.strip() else path.as_posix()
        return path.as_posix()

    return {
        **row.metadata,
        "path": relative(row.path),
        "slide_id": row.slide_id,
        "patient_id": row.patient_id,
        "mpp": "" if row.mpp is None else repr(row.mpp),
        "annotation": relative(row.annotation),
        "mask": relative(row.mask),
        "split": row.split,
        "label": row.label,
    }


def _walk(folder: Path, detect: Detect, left_out: LeftOut) -> Iterator[tuple[Path, Kind]]:
    """Every slide in and below a folder, or the folder itself if it is one."""
    todo, seen = [folder], set()
    while todo:
        here = todo.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            kind = detect(here)
            names = [] if kind else sorted(entry.name for entry in here.iterdir() if not entry.name.startswith("."))
            is_zarr = any((here / mark).exists() for mark in _ZARR_MARKS)
        except OSError:
            left_out.unreadable.append(here)
            continue
        if kind:
            yield from _writable(here, kind, left_out)
        if kind or is_zarr:
            continue
        parts = _parts(here, names)
        # The first of them is walked first, so that of two ways to one folder the same is always taken.
        folders = [here / name for name in names if name not in parts and (here / name).is_dir()]
        todo += reversed(folders)
        files = [here / name for name in names if name not in parts and not (here / name).is_dir()]
        yield from _files(files, detect, left_out)


def _files(files: Sequence[Path], detect: Detect, left_out: LeftOut) -> Iterator[tuple[Path, Kind]]:
    """The slides of one folder's files."""
    stems, others = set(), []
    for path in files:
        try:
            kind = detect(path)
        except OSError:
            left_out.unreadable.append(path)
            continue
        if kind:
            stems.add(path.stem)
            yield from _writable(path, kind, left_out)
        else:
            others.append(path.name)
    companions = {stem + suffix for stem in stems for suffix in _ANNOTATIONS}
    left_out.others += sum(name not in companions for name in others)


def _writable(path: Path, kind: Kind, left_out: LeftOut) -> Iterator[tuple[Path, Kind]]:
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    if text and text == text.rstrip():
        yield path, kind
    else:
        left_out.unwritable.append(path)


def _parts(folder: Path, names: Sequence[str]) -> set[str]:
    """Names in a folder that belong to a slide beside them: an MRXS's folder, the pictures of a VMS or VMU."""
    parts: set[str] = set()
    for name in names:
        path = folder / name
        if path.suffix.casefold() == ".mrxs":
            parts.add(path.stem)
        elif path.suffix.casefold() in _NAMING_PARTS:
            try:
                text = path.read_bytes()[: 2**20].decode("utf-8", "replace")
            except OSError:
                continue
            parts |= set(named_in(text))
    return parts


def _without_copies(found: Sequence[tuple[Path, Kind]], left_out: LeftOut) -> list[tuple[Path, Kind]]:
    """Without the folders of patches whose patient is found nearer the top: the IDC archive nests a copy of itself."""
    depths: dict[str, int] = {}
    for path, kind in found:
        if kind == "patches":
            depths[path.name] = min(len(path.parts), depths.get(path.name, len(path.parts)))
    kept = [(path, kind) for path, kind in found if kind != "patches" or len(path.parts) == depths[path.name]]
    left_out.copies += len(found) - len(kept)
    return kept


def _annotation(slide: Path) -> Path | None:
    """The annotation beside a slide; an XML only if it is ASAP's, as scanners write their own."""
    for suffix in _ANNOTATIONS:
        path = slide.with_name(slide.stem + suffix)
        try:
            with path.open("rb") as stream:
                if suffix != ".xml" or b"ASAP_Annotations" in stream.read(4096):
                    return path
        except OSError:
            continue
    return None


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _ids(folder: Path, paths: Sequence[Path]) -> list[str]:
    """A slide id for each path: its stem; where that is another's too, its path below the folder, joined by '-'."""
    ids = [_clean(_stem(path)) for path in paths]
    for longer in (_joined_stem, _joined_name):
        count = Counter(map(same_name, ids))
        ids = [
            _clean(longer(folder, path)) if count[same_name(text)] > 1 else text
            for path, text in zip(paths, ids, strict=True)
        ]
    taken: set[str] = set()
    for index, text in enumerate(ids):
        number, unique = 1, text
        while same_name(unique) in taken:
            number += 1
            unique = _clean(f"{text}-{number}")
        taken.add(same_name(unique))
        ids[index] = unique
    return ids


def _joined_stem(folder: Path, path: Path) -> str:
    return "-".join([*path.relative_to(folder).parent.parts, _stem(path)])


def _joined_name(folder: Path, path: Path) -> str:
    return "-".join(path.relative_to(folder).parts)


def _clean(text: str) -> str:
    """The nearest slide id to a text: '_' for what cannot be in one; of a long one, the end."""
    if check_slide_id(text):
        text = _trim("".join("_" if check_slide_id(f"a{character}b") else character for character in text))
    while len(text.encode()) > MAX_ID_BYTES:
        text = _trim(text[1:])
    return "slide" if check_slide_id(text) else text


def _trim(text: str) -> str:
    trimmed = text.strip().strip("_.")
    return text if trimmed == text else _trim(trimmed)
