"""Settings say which of them change a result."""

import pytest

from wsi_idc import settings
from wsi_idc.errors import UsageError
from wsi_idc.settings import (
    CutSettings,
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


def kinds(cls):
    return {
        name: (field.json_schema_extra or {}).get("kind") if isinstance(field.json_schema_extra, dict) else None
        for name, field in cls.model_fields.items()
    }


@pytest.mark.parametrize("cls", [TileSpec, ExtractSettings, InferSettings, ExportSettings, ReportSettings, RunSettings])
def test_every_field_is_content_or_runtime(cls):
    assert set(kinds(cls).values()) <= {"content", "runtime"}


def test_no_settings_class_is_left_out_of_that_test():
    found = {value for value in vars(settings).values() if isinstance(value, type) and issubclass(value, Settings)} - {
        Settings
    }
    assert found == {
        TileSpec,
        CutSettings,
        PlaceSettings,
        StageSettings,
        ExtractSettings,
        InferSettings,
        ExportSettings,
        ReportSettings,
        RunSettings,
    }


def test_runtime_settings_leave_the_hash_alone_and_content_changes_it():
    plain = ExtractSettings()
    assert ExtractSettings(workers=7, threads=3).content_hash() == plain.content_hash()
    for change in ({"min_tissue": 0.2}, {"tissue": "otsu"}, {"pixels": False}, {"tile": TileSpec(size_px=64)}):
        assert ExtractSettings(**change).content_hash() != plain.content_hash()


def test_the_stride_defaults_to_the_tile_size():
    assert TileSpec(size_px=64).stride_px == 64
    assert TileSpec(size_px=64, stride_px=32).stride_px == 32


def test_the_spec_reads_as_a_person_would_say_it():
    assert str(TileSpec()) == "50 px at 4 um/px"
    assert str(TileSpec(stride_px=25)) == "50 px at 4 um/px, stride 25 px"


@pytest.mark.parametrize(
    ("kind", "values", "option"),
    [
        (TileSpec, {"size_px": 3}, "--tile-size"),
        (TileSpec, {"mpp": 0.0}, "--mpp"),
        (TileSpec, {"mpp": float("nan")}, "--mpp"),
        (TileSpec, {"stride_px": -4}, "--stride"),
        (TileSpec, {"last": "shift"}, "--last"),
        (ExtractSettings, {"min_tissue": 1.5}, "--min-tissue"),
        (ExtractSettings, {"tissue": "magic"}, "--tissue"),
        (InferSettings, {"batch_size": 0}, "--batch-size"),
        (InferSettings, {"gpus": -1}, "--gpus"),
        (InferSettings, {"stage_gb": 0.0}, "--stage-gb"),
        (ExportSettings, {"formats": ["csv", "geojsn"]}, "--format"),
    ],
)
def test_a_value_out_of_range_is_one_line_with_the_option_as_typed(kind, values, option):
    with pytest.raises(UsageError) as caught:
        build(kind, **values)
    assert str(caught.value).startswith(option + ": ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_none_keeps_the_default():
    assert build(TileSpec, size_px=None, mpp=None) == TileSpec()
