"""Settings: what changes a result, and what only changes how it is computed.

Each field says which it is: `content` enters the settings hash, so that another value is a reason to do a slide again;
`runtime` does not. A test fails for a field that says neither.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsi_idc.digests import digest
from wsi_idc.errors import UsageError
from wsi_idc.units import MPP_RANGE, Mpp, TilePx

TissueMethod = Literal["default", "otsu", "morphological", "none"]
LastTile = Literal["keep", "drop"]
Reader = Literal["auto", "openslide", "tiatoolbox"]
EmptyAnnotation = Literal["unknown", "negative"]
Precision = Literal["auto", "float32", "int8"]
ExportFormat = Literal["csv", "parquet", "geojson", "png", "ome-tiff", "ngff", "ngff-0.4", "annotation-store", "dicom"]

CONTENT: dict[str, Any] = {"kind": "content"}
RUNTIME: dict[str, Any] = {"kind": "runtime"}


class Settings(BaseModel):
    """Base of all settings: frozen, unknown names refused, hashed by what changes a result."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """The fields that change a result, as plain JSON types."""
        names = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("kind") == "content"
        }
        return self.model_dump(mode="json", include=names)

    def content_hash(self) -> str:
        """Sixteen hex digits that differ where a result could differ."""
        return digest(self.content())


class TileSpec(Settings):
    """The tile grid: size in pixels, resolution in um/px, stride in pixels of that resolution."""

    size_px: Annotated[TilePx, Field(ge=8, le=4096, json_schema_extra=CONTENT)] = TilePx(50)
    mpp: Annotated[Mpp, Field(ge=MPP_RANGE[0], le=MPP_RANGE[1], json_schema_extra=CONTENT)] = Mpp(4.0)
    stride_px: Annotated[TilePx, Field(ge=1, le=65536, json_schema_extra=CONTENT)] = TilePx(0)
    last: Annotated[LastTile, Field(json_schema_extra=CONTENT)] = "keep"

    @model_validator(mode="before")
    @classmethod
    def _stride_defaults_to_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("stride_px"):
            return {**values, "stride_px": values.get("size_px", cls.model_fields["size_px"].default)}
        return values

    def __str__(self) -> str:
        stride = "" if self.stride_px == self.size_px else f", stride {self.stride_px} px"
        return f"{self.size_px} px at {self.mpp:g} um/px{stride}"


class CutSettings(Settings):
    """What the tiles of a slide depend on."""

    tile: Annotated[TileSpec, Field(json_schema_extra=CONTENT)] = TileSpec()
    tissue: Annotated[TissueMethod, Field(json_schema_extra=CONTENT)] = "default"
    min_tissue: Annotated[float, Field(ge=0.0, le=1.0, json_schema_extra=CONTENT)] = 0.05
    reader: Annotated[Reader, Field(json_schema_extra=CONTENT)] = "auto"
    annotation_class: Annotated[str, Field(min_length=1, json_schema_extra=CONTENT)] = "IDC"
    empty_annotation: Annotated[EmptyAnnotation, Field(json_schema_extra=CONTENT)] = "unknown"
    pixels: Annotated[bool, Field(json_schema_extra=CONTENT)] = True
    icc: Annotated[bool, Field(json_schema_extra=CONTENT)] = False


class StageSettings(Settings):
    """Where slides are copied to before they are read; by default they are read where they lie."""

    stage: Annotated[str, Field(json_schema_extra=RUNTIME)] = ""
    stage_gb: Annotated[float, Field(gt=0, le=1e6, json_schema_extra=RUNTIME)] = 50.0


class PlaceSettings(Settings):
    """Where work runs: in this process, in local ones, or on a cluster; see `work/places.py`."""

    workers: Annotated[int, Field(ge=0, le=1024, json_schema_extra=RUNTIME)] = 0
    gpus: Annotated[int, Field(ge=0, le=1024, json_schema_extra=RUNTIME)] = 0
    threads: Annotated[int, Field(ge=0, le=256, json_schema_extra=RUNTIME)] = 0
    scheduler: Annotated[str, Field(json_schema_extra=RUNTIME)] = ""
    scheduler_file: Annotated[Path | None, Field(json_schema_extra=RUNTIME)] = None
    wait: Annotated[float, Field(ge=0, le=604800, json_schema_extra=RUNTIME)] = 60.0

    @property
    def elsewhere(self) -> bool:
        """Whether it runs on a cluster."""
        return bool(self.scheduler or self.scheduler_file)


class ExtractSettings(CutSettings, PlaceSettings, StageSettings):
    """Everything that `extract` can be told."""

    def cut(self) -> CutSettings:
        """The part that the tiles depend on."""
        return CutSettings(**{name: getattr(self, name) for name in CutSettings.model_fields})


class InferSettings(PlaceSettings, StageSettings):
    """Everything that `infer` can be told, besides the model."""

    precision: Annotated[Precision, Field(json_schema_extra=CONTENT)] = "auto"
    batch_size: Annotated[int, Field(ge=1, le=4096, json_schema_extra=RUNTIME)] = 64


class ExportSettings(Settings):
    """Everything that `export` can be told, besides the model."""

    formats: Annotated[tuple[ExportFormat, ...], Field(min_length=1, json_schema_extra=RUNTIME)] = ("csv",)
    out: Annotated[Path, Field(json_schema_extra=RUNTIME)] = Path("export")
    threshold: Annotated[float | None, Field(gt=0.0, lt=1.0, json_schema_extra=CONTENT)] = None


class ReportSettings(Settings):
    """Everything that `report` can be told, besides the model."""

    out: Annotated[Path, Field(json_schema_extra=RUNTIME)] = Path("report.html")
    threshold: Annotated[float | None, Field(gt=0.0, lt=1.0, json_schema_extra=CONTENT)] = None


class RunSettings(Settings):
    """What `run` tells, and where; besides the settings of its stages."""

    log_file: Annotated[Path | None, Field(json_schema_extra=RUNTIME)] = None
    metrics: Annotated[Path | None, Field(json_schema_extra=RUNTIME)] = None
    summary: Annotated[Path | None, Field(json_schema_extra=RUNTIME)] = None


_Kind = TypeVar("_Kind", bound=Settings)


def build(kind: type[_Kind], **values: Any) -> _Kind:
    """Settings of a kind from the command line's values; those that are None keep their default.

    Raises:
        UsageError: a value is out of range; names the option as it is typed.
    """
    try:
        return kind(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        # Of an option that may be repeated, the place in its list is of no use.
        option = "--" + "-".join(part for part in first["loc"] if isinstance(part, str)).replace("_px", "")
        option = {"--size": "--tile-size", "--formats": "--format"}.get(option, option.replace("_", "-"))
        raise UsageError(option, f"{first['input']!r}: {first['msg'].lower()}", "see --help") from error
