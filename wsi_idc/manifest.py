"""The manifest: a CSV of slides, read whole or refused with every fault named.

The standard library only, and quick to import: the command line reads it before anything heavy.
"""

import csv
import difflib
import io
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wsi_idc.errors import ManifestError
from wsi_idc.names import check_slide_id, same_name
from wsi_idc.objects import is_url
from wsi_idc.sources import Source, Url
from wsi_idc.units import MPP_RANGE, Mpp

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "slide_id", "patient_id", "mpp", "annotation", "mask", "split", "label")
"""The columns that mean something; all others are metadata."""

_MAX_FILE_BYTES = 256 * 1024 * 1024
_PATH_ALIASES = frozenset({"file", "filename", "filepath", "slide", "slide_path", "image", "image_path", "wsi"})
_ALIASES = {
    **dict.fromkeys(("patient", "patients", "patientno", "patientnr", "patientnumber", "patientname"), "patient_id"),
    **dict.fromkeys(("micronsperpixel", "umperpixel", "umperpx", "umpx", "mmp"), "mpp"),
    **dict.fromkeys(("annot", "annotationfile", "annotationpath", "geojson"), "annotation"),
    **dict.fromkeys(("maskfile", "maskpath", "tissuemask"), "mask"),
    **dict.fromkeys(("datasplit", "splitset"), "split"),
}
"""Other words for our columns, as letters and digits alone."""
_LIKENESS = 0.87
"""Of `difflib`, from which a word is a misspelling: `splt` is one of split, `annotator` none of annotation."""


@dataclass(frozen=True)
class Row:
    """One slide of a manifest.

    Args:
        slide_id: names the slide's folder in the store; unique, whatever the case.
        path: absolute; a file, or a folder for DICOM, OME-NGFF and IDC patches; or the URL of one.
        patient_id: all slides of a patient share one split.
        mpp: level-0 um/px that overrides the slide's own; None: the slide's own.
        annotation: absolute, or a URL; which part of the slide is IDC; None: unknown.
        mask: absolute, or a URL; which part of the slide is tissue; None: to be found.
        split: "train", "val", "test", or "" for none.
        label: as it stands.
        metadata: the other columns.
        line: where the row starts in the manifest, from 1; 0: in no file.
        missing: why the slide, its annotation or its mask cannot be had; "": all are there, or lie in an object store,
            which is not asked here. Such a slide fails alone: without its annotation or mask it would be another slide.
    """

    slide_id: str
    path: Source
    patient_id: str
    mpp: Mpp | None = None
    annotation: Source | None = None
    mask: Source | None = None
    split: str = ""
    label: str = ""
    metadata: dict[str, str] = field(default_factory=dict, hash=False)
    line: int = 0
    missing: str = ""

    @property
    def urls(self) -> list[Url]:
        """What of it lies in an object store."""
        return [place for place in (self.path, self.annotation, self.mask) if isinstance(place, Url)]


@dataclass(frozen=True)
class Table:
    """A CSV's header and its rows, each a line number and a value for every named column."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]


def read_manifest(path: str | os.PathLike[str], *, strict: bool = False, away: bool = False) -> list[Row]:
    """The slides of a manifest, in its order.

    A slide, annotation or mask that is not there is told in its row's `missing`, and is that slide's failure.

    Args:
        path: a CSV file.
        strict: a file that is missing is a fault of the manifest.
        away: no file is asked for, so that all may be missing: only what the manifest says is wanted.

    Raises:
        ManifestError: every fault of the manifest, each with its line, column and value. Files that are missing are
            faults where every row misses one: then the manifest is wrong, or a disk is away.
    """
    path = Path(path)
    faults: list[tuple[int, str]] = []
    missing: list[tuple[int, str]] = []
    table = read_table(path, faults)
    faults += _header_faults(table)
    rows = [_read_row(path.absolute().parent, line, values, faults, missing) for line, values in table.rows]
    if strict or (not away and all(row.missing for row in rows)):
        faults = missing + faults
    if not table.rows and not faults:
        faults.append((0, "no slides: only a header; add a line for each slide"))
    _check_ids(rows, table.columns, faults)
    _check_patients(rows, faults)
    raise_faults(path, faults)
    return rows


def raise_faults(path: Path, faults: Iterable[tuple[int, str]]) -> None:
    """Raise a ManifestError if there are faults, in the order of their lines.

    Args:
        path: the file they are in.
        faults: line (0: the whole file) and text of each.
    """
    ordered = sorted(faults, key=lambda item: item[0])
    if ordered:
        raise ManifestError(path, [f"line {line}, {text}" if line else text for line, text in ordered])


def fault(column: str, value: str, problem: str, advice: str) -> str:
    """A fault of one value, without its line."""
    shown = value if len(value) <= 120 else f"{value[:117]}..."
    return f"column {column}, {shown!r}: {problem}; {advice}"


def read_table(path: Path, faults: list[tuple[int, str]]) -> Table:
    """A CSV with a header, values stripped, blank lines left out; its faults of form are added to `faults`.

    A row with another number of fields than the header is a fault and left out. A column without a name is ignored.
    """
    text = _read_text(path, faults)
    records = _records(text, faults)
    if not records:
        if not faults:
            faults.append((0, "is empty; write a header line with a column 'path', then a line for each slide"))
        return Table([], [])
    header_line, columns = records[0]
    twice = [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]
    faults += [(header_line, fault(name, name, "the column is there twice", "rename or remove one")) for name in twice]
    rows = []
    for line, values in records[1:]:
        if len(values) != len(columns):
            few = "few" if len(values) < len(columns) else "many"
            counts = f"{len(values)} where the header has {len(columns)}"
            faults.append((line, f"too {few} fields: {counts}; put values that contain commas in double quotes"))
        else:
            rows.append((line, {name: value for name, value in zip(columns, values, strict=True) if name}))
    return Table([name for name in columns if name], rows)


def _read_text(path: Path, faults: list[tuple[int, str]]) -> str:
    """The file's text, or "" and a fault."""
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            # Opening a pipe that nobody writes to would wait for ever.
            faults.append((0, "is a pipe or a device; give a CSV file"))
            return ""
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        faults.append((0, "no such file; check the path, or make one with `wsi-idc manifest DIR`"))
    except IsADirectoryError:
        faults.append((0, "is a folder; make a manifest of it with `wsi-idc manifest DIR`"))
    except (OSError, ValueError) as error:
        faults.append((0, f"cannot be read ({getattr(error, 'strerror', None) or error}); give a readable CSV file"))
    else:
        if len(data) > _MAX_FILE_BYTES or b"\0" in data:
            kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not a text file"
            line = data.count(b"\n", 0, data.find(b"\0")) + 1 if b"\0" in data else 0
            what = f"{kind} (it contains NUL bytes)" if line else "larger than a manifest can be"
            faults.append((line, f"{what}; give a CSV file saved as UTF-8"))
            return ""
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            byte = f"0x{error.object[error.start]:02x}"
            faults.append((line, f"byte {byte} is not UTF-8; save the file as UTF-8 ('CSV UTF-8' in a spreadsheet)"))
    return ""


def _records(text: str, faults: list[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    """The first line and the stripped fields of each record that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[tuple[int, list[str]]] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = [value.strip() for value in next(reader)]
        except StopIteration:
            return records
        except csv.Error as error:
            faults.append((line, f"not CSV ({error}); close each double quote, and double those inside a value"))
            continue
        if any(fields):
            records.append((line, fields))


def _header_faults(table: Table) -> list[tuple[int, str]]:
    """A missing path column, and columns that were probably meant as ours."""
    if not table.columns:
        return []
    faults = []
    if "path" not in table.columns:
        header = ", ".join(table.columns)
        by_hand = [name for name in table.columns if name.casefold() in _PATH_ALIASES | {"path"}]
        close = by_hand or difflib.get_close_matches("path", table.columns, n=1, cutoff=0.5)
        advice = f"rename {close[0]!r} to 'path'" if close else "add a column 'path' with each slide's file"
        if len(table.columns) == 1 and (separator := next((mark for mark in ";\t" if mark in header), "")):
            advice = f"the fields are separated by {separator!r}: save the file with commas"
        faults.append((1, fault("path", header, "the header has no column 'path'", advice)))
    return faults + look_alike_faults(table.columns, COLUMNS[1:])


def look_alike_faults(columns: Sequence[str], known: Sequence[str]) -> list[tuple[int, str]]:
    """A fault for each column that is probably one of the known ones misspelt; none where that one is there too.

    Were they taken for metadata, patients would leak between splits, and slides would lose labels or um/px, unseen.

    Args:
        columns: a header.
        known: the columns that mean something there.
    """
    faults = []
    for name in columns:
        meant = look_alike(name, known)
        if meant is not None and name != meant and meant not in columns:
            advice = f"did you mean {meant!r}? Rename it, to something else where it is metadata"
            faults.append((1, fault(name, name, "is not a column that is known, and would be ignored", advice)))
    return faults


def look_alike(name: str, known: Sequence[str]) -> str | None:
    """Which of the known columns a column's name is, or is probably meant to be."""
    letters = {_letters(column): column for column in known}
    own = _letters(name)
    if own in letters:
        return letters[own]
    if _ALIASES.get(own) in known:
        return _ALIASES[own]
    swapped = [column for word, column in letters.items() if sorted(word) == sorted(own)]
    close = difflib.get_close_matches(own, letters, n=1, cutoff=_LIKENESS)
    return next(iter([*swapped, *(letters[word] for word in close)]), None)


def _letters(name: str) -> str:
    """A name without what people write differently: case, spaces and marks."""
    return "".join(filter(str.isalnum, name.casefold()))


def split_advice(word: str) -> str:
    """What to write in place of a word that is no split."""
    word = word.casefold()
    close = [name for name in SPLITS if word.startswith(name)] or difflib.get_close_matches(word, SPLITS, n=1)
    return f"did you mean {close[0]!r}?" if close else "write train, val or test, or leave it empty"


def _read_row(
    base: Path,
    line: int,
    values: Mapping[str, str],
    faults: list[tuple[int, str]],
    missing: list[tuple[int, str]],
) -> Row:
    """One row; its faults are added to `faults`, with harmless values in their place, and lost files to `missing`."""
    lost: list[str] = []

    def report(column: str, problem: str, advice: str) -> None:
        faults.append((line, fault(column, values.get(column, ""), problem, advice)))

    def report_missing(column: str, problem: str, advice: str) -> None:
        missing.append((line, fault(column, values[column], problem, advice)))
        lost.append(problem if column == "path" else f"{column} {values[column]!r}: {problem}")

    written = values.get("path", "")
    path = _source(base, written)
    absent = _missing(path)
    if "path" in values:
        if not written:
            report("path", "is empty", "write the slide's file or folder")
            lost.append("is empty")
        elif isinstance(path, Url) and (wrong := path.fault()):
            report("path", *wrong)
        elif absent:
            report_missing("path", absent, "correct the path or remove the line")
    companions: dict[str, Source | None] = {"annotation": None, "mask": None}
    for column in companions:
        if values.get(column):
            companions[column] = file = _source(base, values[column])
            if isinstance(file, Url):
                if wrong := file.fault():
                    report(column, *wrong)
            elif problem := _missing(file) or ("is a folder" if file.is_dir() else ""):
                report_missing(column, problem, "correct the path or leave the field empty")

    slide_id = values.get("slide_id") or _default_id(path, absent=bool(absent))
    if written and (bad_id := check_slide_id(slide_id)):
        column = "slide_id" if values.get("slide_id") else "path"
        what = bad_id if column == "slide_id" else f"its default slide_id {slide_id!r} {bad_id}"
        report(column, what, "write a slide_id of letters, digits, '.', '_' and '-'")

    mpp, split = _read_mpp(values.get("mpp", ""), report), values.get("split", "")
    if split and split not in SPLITS:
        report("split", "is not a split", split_advice(split))
    return Row(
        slide_id,
        path,
        values.get("patient_id") or slide_id,
        mpp,
        **companions,
        split=split,
        label=values.get("label", ""),
        metadata={name: value for name, value in values.items() if name not in COLUMNS},
        line=line,
        missing="; ".join(lost),
    )


def _default_id(source: Source, *, absent: bool) -> str:
    """A file's name without its suffix, a folder's name.

    Of what is not there, or in an object store, only the name can tell which it is: a suffix with a letter in it is a
    file's, but for `.zarr`; the numbers of a DICOM identifier are a folder's.
    """
    path, absent = (Path(source.name), True) if isinstance(source, Url) else (source, absent)
    is_file = any(map(str.isalpha, path.suffix)) and path.suffix != ".zarr" if absent else not path.is_dir()
    return path.stem if is_file else path.name


def _read_mpp(text: str, report: Callable[[str, str, str], None]) -> Mpp | None:
    """The um/px of a row; None where it is empty or at fault."""
    if not text:
        return None
    low, high = MPP_RANGE
    try:
        mpp = Mpp(float(text.replace("_", "?")))
    except ValueError:
        point = f"write {text.replace(',', '.')}" if text.count(",") == 1 else "write um/px as a number such as 0.25"
        report("mpp", "is not a number", point)
        return None
    if math.isnan(mpp) or not low <= mpp <= high:
        report("mpp", f"is not between {low:g} and {high:g} um/px", "write the um/px of the slide's finest level")
        return None
    return mpp


def _source(base: Path, text: str) -> Source:
    return Url(text) if is_url(text) else _absolute(base, text)


def _absolute(base: Path, text: str) -> Path:
    """A path as the system itself would follow it: links before `..`, and no link followed without need."""
    path = base / text
    if ".." not in path.parts:
        return path
    try:
        return path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    except (OSError, RuntimeError):  # a loop of links: what is missing is reported by its caller
        return path


def _missing(path: Source) -> str:
    """Why a path cannot be used, or "". An object store is not asked: that would be a request for every line."""
    if isinstance(path, Url):
        return ""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"no such file or folder (looked for {path})"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "is not a file or folder"


def _check_ids(rows: Sequence[Row], columns: Sequence[str], faults: list[tuple[int, str]]) -> None:
    """Report each slide_id that an earlier row has, whatever its case."""
    seen: dict[str, Row] = {}
    for row in rows:
        if not row.slide_id:
            continue
        first = seen.setdefault(same_name(row.slide_id), row)
        if first is not row:
            same = "is" if first.slide_id == row.slide_id else "differs only in case from"
            problem = f"{same} the slide_id of line {first.line}"
            advice = "give each slide its own" if "slide_id" in columns else "add a column slide_id with an id for each"
            faults.append((row.line, fault("slide_id", row.slide_id, problem, advice)))


def _check_patients(rows: Sequence[Row], faults: list[tuple[int, str]]) -> None:
    """Report each row whose patient is in another split already: that would leak between training and test."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row.split not in SPLITS:
            continue
        first = seen.setdefault(row.patient_id, row)
        if first.split != row.split:
            problem = f"patient {row.patient_id!r} is in {first.split!r} at line {first.line}"
            faults.append((row.line, fault("split", row.split, problem, "put all slides of a patient in one split")))
