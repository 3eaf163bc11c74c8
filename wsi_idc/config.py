"""The settings in force, and where each comes from: the command line, WSI_IDC_* variables, a TOML file, or a default.

In that order, the first that has a setting decides. What settings there are, their ranges and defaults stand in
`settings.py` alone: the sections here are made of its fields.
"""

import difflib
import os
import tomllib
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from wsi_idc.errors import FaultsError, UsageError, WsiIdcError, system_reason
from wsi_idc.objects import is_url
from wsi_idc.settings import (
    ExportSettings,
    ExtractSettings,
    InferSettings,
    PlaceSettings,
    ReportSettings,
    RunSettings,
    Settings,
    StageSettings,
    TileSpec,
    build,
)

FILE = "wsi-idc.toml"
"""Looked for beside the manifest."""
PREFIX = "WSI_IDC_"
FILE_VARIABLE = f"{PREFIX}CONFIG"
"""Names the file where none is named on the command line."""
_NO_SETTINGS = (FILE_VARIABLE, f"{PREFIX}DEBUG", f"{PREFIX}MODELS", f"{PREFIX}DATA")

_TILE = {"tile_size": "size_px", "mpp": "mpp", "stride": "stride_px", "last": "last"}
"""Option -> field of `TileSpec`."""
_SHARED = [name for kind in (PlaceSettings, StageSettings) for name in kind.model_fields if name != "gpus"]
"""What `extract` and `infer` both have: said outside of their sections it is said to both."""
_PATHS = ("store", "model", "stage", "scheduler_file", "out", "log_file", "metrics", "summary")
"""Settings that name files or folders: those of a file start at its folder."""
_LISTS = ("formats",)
"""Settings of several values: in one text, commas are between them."""
_OPTIONS = {"pixels": "--no-pixels", "formats": "--format"}
_LIKENESS = 0.8
"""Of `difflib`, from which a name is a misspelling of a setting."""


def _section(name: str, fields: Mapping[str, FieldInfo]) -> Any:
    """A section of the file: settings of several kinds side by side."""
    parts: Any = {key: (field.annotation, field) for key, field in fields.items()}
    return create_model(name, __base__=Settings, **parts)


def _fields(kind: type[Settings], *left_out: str) -> dict[str, FieldInfo]:
    return {name: field for name, field in kind.model_fields.items() if name not in left_out}


SECTIONS: Mapping[str, Any] = {
    "extract": _section(
        "Extract",
        {
            **{option: TileSpec.model_fields[field] for option, field in _TILE.items()},
            **_fields(ExtractSettings, "tile", "gpus"),
            "strict": FieldInfo(annotation=bool, default=False),
        },
    ),
    "infer": _section("Infer", _fields(InferSettings)),
    "export": _section("Export", _fields(ExportSettings)),
    "report": _section("Report", _fields(ReportSettings)),
    "run": _section("Run", _fields(RunSettings)),
}
"""Section of the file -> what it can have."""
_TOP = ("store", "model")
KEYS = (*_TOP, *(f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.model_fields))
"""Every setting: `store`, `extract.tile_size` and so on."""


class _Joined(Settings):
    """All settings, of all sources; its fields are `_TOP`, and by `in_force` the `SECTIONS`."""

    store: Annotated[str, Field(min_length=1)] = "tiles.zarr"
    model: str = ""


@dataclass(frozen=True)
class _Source:
    """What one source says.

    Attributes:
        values: setting -> value.
        names: setting -> what a user calls it there, for messages.
        origin: what the source is called; "": by each setting's name there.
        shared: settings that were said for several sections at once.
    """

    values: dict[str, Any]
    names: dict[str, str]
    origin: str
    shared: frozenset[str]

    @classmethod
    def of(cls, said: Mapping[str, tuple[str, Any]], origin: str) -> "_Source":
        """From setting, or one that sections share -> its name there, and the value."""
        values: dict[str, Any] = {}
        names: dict[str, str] = {}
        shared: set[str] = set()
        for key in sorted(said, key=lambda key: "." in key):
            for one in _meant(key):
                names[one], value = said[key]
                several = one.rpartition(".")[2] in _LISTS and isinstance(value, str)
                values[one] = [part.strip() for part in value.split(",")] if several else value
                (shared.add if key in _SHARED else shared.discard)(one)
        return cls(values, names, origin, frozenset(shared))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (found.setdefault(section, {}) if section else found)[name] = value
    return found


def _meant(key: str) -> list[str]:
    return [f"{section}.{key}" for section in ("extract", "infer")] if key in _SHARED else [key]


@dataclass(frozen=True)
class InForce:
    """The settings in force.

    Attributes:
        joined: all of them, checked.
        origins: setting -> where its value comes from: the command line, a variable, a file, or the default.
        shared: settings whose value was said for several sections at once.
        file: the settings file that was read.
    """

    joined: Any
    origins: Mapping[str, str]
    shared: frozenset[str]
    file: Path | None

    @property
    def store(self) -> str:
        """The store's address."""
        return str(self.joined.store)

    @property
    def model(self) -> Path | None:
        """The bundle's folder; None: the one that ships."""
        return Path(self.joined.model) if self.joined.model else None

    @property
    def strict(self) -> bool:
        """Whether a manifest that misses a file is refused."""
        return bool(self.joined.extract.strict)

    def _said(self, section: str) -> dict[str, Any]:
        """The settings of a section that have no default's value."""
        part = getattr(self.joined, section)
        return {name: getattr(part, name) for name in type(part).model_fields if name in part.model_fields_set}

    @cached_property
    def extract(self) -> ExtractSettings:
        """How tiles are cut."""
        said = self._said("extract")
        said.pop("strict", None)
        tile = build(TileSpec, **{field: said.pop(option, None) for option, field in _TILE.items()})
        return build(ExtractSettings, tile=tile, **said)

    @cached_property
    def extract_in_run(self) -> ExtractSettings:
        """How `run` cuts tiles: their pixels are kept only where that was said, as nothing else asks for them."""
        said = "pixels" in self.joined.extract.model_fields_set
        return self.extract if said else self.extract.model_copy(update={"pixels": False})

    @cached_property
    def infer(self) -> InferSettings:
        """How maps are made."""
        said = self._said("infer")
        if said.get("gpus") and "infer.workers" in self.shared:
            # Said for both: where each GPU has its process, they are extract's.
            del said["workers"]
        return build(InferSettings, **said)

    @cached_property
    def export(self) -> ExportSettings:
        """Which files are written for other programs."""
        return build(ExportSettings, **self._said("export"))

    @cached_property
    def report(self) -> ReportSettings:
        """Which page is written."""
        return build(ReportSettings, **self._said("report"))

    @cached_property
    def run(self) -> RunSettings:
        """What a run tells, and where."""
        return build(RunSettings, **self._said("run"))

    def rows(self) -> list[tuple[str, Any, str]]:
        """Setting, value in force, where it comes from."""
        origins = {**self.origins}
        if origins["extract.pixels"] == "default":
            origins["extract.pixels"] = "default (of extract; run keeps none)"
        return [(key, self._value(*key.rpartition(".")[::2]), origins[key]) for key in KEYS]

    def _value(self, section: str, name: str) -> Any:
        if not section or name == "strict":
            return getattr(self.joined.extract if section else self.joined, name)
        if section == "extract" and name in _TILE:
            return getattr(self.extract.tile, _TILE[name])
        return getattr(getattr(self, section), name)


def in_force(
    said: Mapping[str, Any] | None = None,
    *,
    manifest: Path | None = None,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> InForce:
    """The settings in force.

    Args:
        said: on the command line: setting, or one that sections share -> value; what is None was not said.
        manifest: the file beside it is read, if there is one.
        file: is read instead; None: the one that `WSI_IDC_CONFIG` names.
        environment: the variables; None: this process's.

    Raises:
        UsageError: the file cannot be read, or one option of the command line is out of range.
        FaultsError: names that are no settings and values that cannot be theirs, all of them.
    """
    environment = os.environ if environment is None else environment
    faults: list[str] = []
    path = _find(manifest, file, environment)
    line = {key: (_option(key), value) for key, value in (said or {}).items() if value is not None}
    sources = [
        _Source.of(line, "command line"),
        _Source.of(_read_environment(environment, faults), ""),
        _Source.of(_read_file(path, faults) if path else {}, str(path)),
    ]
    sections: Any = {name: (one, one()) for name, one in SECTIONS.items()}
    kind: Any = create_model("Joined", __base__=_Joined, **sections)
    try:
        joined = kind(**_nested(dict(ChainMap(*(source.values for source in sources)))))
    except ValidationError as error:
        wrong = _wrong(error, sources)
        if not faults and len(wrong) == 1 and isinstance(wrong[0], UsageError):
            raise wrong[0] from error
        raise FaultsError("settings", [*faults, *map(str, wrong)]) from error
    if faults:
        raise FaultsError("settings", faults)
    first = {key: source for source in reversed(sources) for key in source.values}
    origins = {key: (first[key].origin or first[key].names[key]) if key in first else "default" for key in KEYS}
    return InForce(joined, origins, frozenset(key for key in first if key in first[key].shared), path)


def _find(manifest: Path | None, file: Path | None, environment: Mapping[str, str]) -> Path | None:
    """The settings file, if there is one.

    Raises:
        UsageError: it was named, and is not there.
    """
    named = file or (Path(environment[FILE_VARIABLE]) if environment.get(FILE_VARIABLE) else None)
    if named is None:
        beside = None if manifest is None else manifest.parent / FILE
        return beside if beside is not None and beside.is_file() else None
    if not named.is_file():
        raise UsageError(named, "no such settings file", f"correct {'--config' if file else FILE_VARIABLE}")
    return named


def _read_file(path: Path, faults: list[str]) -> dict[str, tuple[str, Any]]:
    """What a settings file says.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            table = tomllib.load(stream)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(path, f"is not TOML ({error})", 'write it as in: store = "tiles.zarr"') from error
    except UnicodeDecodeError as error:
        raise UsageError(path, "is not UTF-8", "save it as UTF-8") from error
    except OSError as error:
        raise UsageError(path, f"cannot be read ({system_reason(error)})", "check the rights") from error
    said: dict[str, tuple[str, Any]] = {}
    for name, value in table.items():
        if name not in SECTIONS:
            found = {name: (f"{path}: {name}", value)}
        elif isinstance(value, dict):
            found = {f"{name}.{key}": (f"{path}: [{name}] {key}", part) for key, part in value.items()}
        else:
            faults.append(f"{path}: {name}: is a section; write [{name}] on a line, and its settings below it")
            continue
        for key, (shown, part) in found.items():
            if key in KEYS or key in _SHARED:
                # As a variable says it: a number that is `true` is refused in both.
                said[key] = shown, _beside(path.parent, key, str(part).lower() if isinstance(part, bool) else part)
            else:
                faults.append(f"{shown}: no such setting; {_advice(key)}")
    return said


def _advice(key: str) -> str:
    """What to write in place of a name that a file should not have."""
    section, _, name = key.rpartition(".")
    elsewhere = [one for one in KEYS if one.rpartition(".")[2] == name]
    if elsewhere:
        place = elsewhere[0].rpartition(".")[0]
        return f"it belongs in [{place}]" if place else "write it above the first section"
    known = [one.rpartition(".")[2] for one in KEYS if one.startswith(f"{section}.")] if section else None
    known = known or [*_TOP, *_SHARED, *SECTIONS]
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {f'[{close[0]}]' if close[0] in SECTIONS else close[0]}?"
    return f"known here: {', '.join(known)}"


def _beside(folder: Path, key: str, value: Any) -> Any:
    """A path in a file starts at the file's folder."""
    if key.rpartition(".")[2] not in _PATHS or not isinstance(value, str) or not value or is_url(value):
        return value
    return str(folder / Path(value).expanduser())


def _read_environment(environment: Mapping[str, str], faults: list[str]) -> dict[str, tuple[str, Any]]:
    """What the variables say. Others that begin as ours do are left alone (container systems make such for a service of
    our name), unless they look like one of ours misspelt."""
    known = {PREFIX + key.upper().replace(".", "_"): key for key in (*KEYS, *_SHARED)}
    said: dict[str, tuple[str, Any]] = {}
    for name, value in environment.items():
        if name in known and value:
            said[known[name]] = name, value
        elif name.startswith(PREFIX) and name not in (*known, *_NO_SETTINGS):
            close = difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS)
            faults += [f"{name}: no such variable; did you mean {one}?" for one in close]
    return said


def _option(key: str) -> str:
    """A setting as it is typed on the command line."""
    name = key.rpartition(".")[2]
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def _wrong(error: ValidationError, sources: Sequence[_Source]) -> list[WsiIdcError | str]:
    """What is wrong with values, each once and by the name of who said it."""
    found: dict[str, WsiIdcError | str] = {}
    for one in error.errors():
        parts = [str(part) for part in one["loc"]]
        key = next(key for key in (".".join(parts[:2]), parts[0]) if key in KEYS)
        source = next(source for source in sources if key in source.values)
        name, problem = source.names[key], f"{one['input']!r}: {one['msg'].lower()}"
        on_the_line = source is sources[0]
        found.setdefault(name, UsageError(name, problem, "see --help") if on_the_line else f"{name}: {problem}")
    return list(found.values())
