"""Exports are what the store has: written once, again where a reason is, and never from a map that is not current."""

import csv
import json

import numpy as np
import pytest
from filelock import FileLock

from wsi_idc.errors import StoreBusyError, UsageError
from wsi_idc.export.export import FORMATS, export, format_of
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExportSettings, ExtractSettings, InferSettings
from wsi_idc.store import hold_store


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(store, out, recorder):
    def run(*formats, **options):
        threshold = options.pop("threshold", None)
        settings = ExportSettings(formats=formats or ("csv",), out=out, threshold=threshold)
        return export(store.address, options.pop("model", None), settings, listener=recorder, **options)

    return run


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_tile_is_a_row_and_wsinfers_columns_come_first(store, run, out):
    summary = run("csv")
    assert summary.done == 2 and not summary.failures
    found = rows(out / "csv" / "a.csv")
    assert list(found[0])[:5] == ["minx", "miny", "width", "height", "prob_IDC"]
    slide, probability = store.slide("a"), store.map("mean", "a").read("probability")
    assert [(int(row["minx"]), int(row["miny"])) for row in found] == [tuple(p) for p in slide.position.tolist()]
    assert {(row["width"], row["height"]) for row in found} == {("50", "50")}
    assert (np.array([row["prob_IDC"] for row in found], np.float32) == probability).all()
    assert {row["label"] for row in found} == {""}


def test_a_slide_is_a_row_and_so_is_one_without_a_result(store, run, out):
    summary = run("csv", threshold=0.5)
    found = {row["slide_id"]: row for row in rows(out / "slides.csv")}
    assert set(found) == {"a", "b", "broken"}
    assert found["a"]["state"] == "current" and found["a"]["patient_id"] == "p1"
    slide, probability = store.slide("a"), store.map("mean", "a").read("probability")
    tissue = slide.tissue.sum(dtype=np.float64) * 0.04
    assert float(found["a"]["tissue_mm2"]) == pytest.approx(tissue)
    assert float(found["a"]["idc_mm2"]) == pytest.approx(slide.tissue[probability >= 0.5].sum() * 0.04)
    assert float(found["a"]["maximum"]) == pytest.approx(probability.max())
    assert found["broken"]["state"] == "not extracted" and found["broken"]["why"] and not found["broken"]["mean"]
    assert any("1 slide without complete tiles" in note for note in summary.notes)


def test_parquet_has_the_columns_of_the_csv(run, out):
    from pyarrow import parquet

    run("csv", "parquet")
    table = parquet.read_table(out / "parquet" / "a.parquet")
    found = rows(out / "csv" / "a.csv")
    assert table.column_names == list(found[0])
    assert table["prob_IDC"].to_numpy().tolist() == [np.float32(row["prob_IDC"]) for row in found]
    assert b"Research use only" in table.schema.metadata[b"use"]
    assert parquet.read_table(out / "slides.parquet")["slide_id"].to_pylist() == ["a", "b", "broken"]


def test_a_second_run_writes_nothing_and_a_lost_file_is_written_again(run, out):
    run("csv")
    before = (out / "csv" / "a.csv").stat().st_mtime_ns
    summary = run("csv")
    assert summary.skipped == 2 and not summary.outcomes
    assert (out / "csv" / "a.csv").stat().st_mtime_ns == before
    (out / "csv" / "a.csv").write_text("half")
    summary = run("csv")
    assert list(summary.outcomes) == ["a"] and len(rows(out / "csv" / "a.csv")) == summary.tiles


def test_another_threshold_is_a_reason(run, out):
    run("csv")
    summary = run("csv", threshold=0.99)
    assert summary.done == 2 and summary.plans["a"].reason == "threshold changed"
    assert {row["positive"] for row in rows(out / "csv" / "a.csv")} == {"0"}


def test_a_stale_map_is_named_and_not_exported(store, run, out):
    run("csv")
    document = store.backing.folder / "maps/mean/a/zarr.json"
    contents = json.loads(document.read_text())
    contents["attributes"]["complete"]["made_from"]["tiles"] = "others"
    document.write_text(json.dumps(contents))
    summary = run("csv")
    assert summary.failures == {"a": "stale (tiles changed); what csv have of it is of an older map"}
    assert {row["slide_id"]: row["state"] for row in rows(out / "slides.csv")}["a"] == "stale"
    with pytest.raises(UsageError, match="no such slide"):
        run("csv", only=["c"])


def test_looking_leaves_the_store_as_it_was(store, run):
    def contents():
        return {path: path.stat().st_mtime_ns for path in store.backing.folder.rglob("*")}

    before = contents()
    run(*FORMATS)
    assert contents() == before


def test_what_hinders_is_one_line(store, run, out, tmp_path, recorder):
    with pytest.raises(UsageError, match="no maps by 'other'"):
        run("csv", model="other")
    out.mkdir(exist_ok=True)
    with FileLock(out / ".lock"), pytest.raises(StoreBusyError, match="another run writes there"):
        run("csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        export(store.address, None, ExportSettings(out=tmp_path / "file"), listener=recorder)


def test_names_that_a_spreadsheet_would_run_are_text():
    from wsi_idc.csvs import safe_cell

    assert safe_cell("=1+1") == "'=1+1" and safe_cell("a\x1b[2Jb") == "a\\x1b[2Jb" and safe_cell("p1") == "p1"


def test_every_format_names_its_suffix_and_version():
    for name in FORMATS:
        module = format_of(name)
        assert module.SUFFIX.startswith(".") and module.VERSION >= 1


def test_files_that_no_current_map_stands_behind_are_named(store, run, out, slides):
    run("csv", "parquet")
    slides.write_text("path,patient_id,site\na.tif,p1,north\n")
    with hold_store(store.address) as held:
        held.backing.delete("slides/b")
    summary = run("csv")
    assert "2 files there are of no current map, or of other settings (csv/b.csv, parquet/b.parquet)" in " ".join(
        summary.notes
    )
    summary = run("csv", threshold=0.9)
    assert any("3 files" in note and "parquet/a.parquet" in note for note in summary.notes)
    for path in ("csv/b.csv", "parquet/b.parquet"):
        (out / path).unlink()
    assert not any("no current map" in note for note in run("csv", "parquet", threshold=0.9).notes)


def test_what_was_done_before_an_interrupt_is_not_done_again(run, out, recorder, monkeypatch):
    from wsi_idc.export import export as module

    monkeypatch.setattr(module, "WRITE_S", -1.0)
    write = module._write_one

    def interrupted(result, *arguments):
        if result.slide_id == "b":
            raise KeyboardInterrupt
        return write(result, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_one", interrupted)
        # Killed: nothing is put in order at the end.
        patched.setattr(module._Index, "write", lambda index: None)
        with pytest.raises(KeyboardInterrupt):
            run("csv")
    assert not (out / "exported.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_one", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("csv")
    assert json.loads((out / "exported.json").read_text()).keys() == {"a"}
    assert list(run("csv").outcomes) == ["b"]


def test_a_refused_export_leaves_nothing(run, out):
    with pytest.raises(UsageError, match="no such slide"):
        run("csv", only=["zz"])
    assert not out.exists()


def test_a_model_without_a_positive_class_is_left_out_and_fails_no_night(slides, make, tmp_path, recorder, out):
    bundle = make.write_bundle(tmp_path / "several", name="several", outputs=3, classes=["x", "y", "z"])
    path = tmp_path / "other.zarr"
    extract(read_manifest(slides), path, ExtractSettings(), listener=recorder)
    infer(path, read_bundle(bundle), InferSettings(), listener=recorder)
    summary = export(path, None, ExportSettings(out=out), listener=recorder)
    assert not summary.failures and any("none of them positive: 2 slides left out" in note for note in summary.notes)
