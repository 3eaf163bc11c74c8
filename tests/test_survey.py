"""What a folder's slides are and would take is told without a store."""

import numpy as np
import pytest

from wsi_idc import survey as module
from wsi_idc.extract import extract
from wsi_idc.manifest import read_manifest
from wsi_idc.settings import ExtractSettings
from wsi_idc.survey import Reading, Scoring, Survey, Surveyed, duration, size, survey


class Heard(dict):
    def __call__(self, slide_id, found):
        self[slide_id] = found


@pytest.fixture
def rows(slides, make):
    """Two good slides, one that breaks on reading, one without um/px, one without tissue."""
    make.write_tiff(slides.parent / "bare.tif", make.texture(200, 200), mpp=None)
    make.write_tiff(slides.parent / "glass.tif", np.full((200, 200, 3), 244, np.uint8))
    slides.write_text("path\na.tif\nb.tif\nbroken.tif\nbare.tif\nglass.tif\n")
    return read_manifest(slides)


def test_every_slide_is_what_extract_would_make_of_it(rows, slides, recorder):
    heard = Heard()
    found = survey(rows, heard)
    assert list(heard) == [row.slide_id for row in rows]
    summary = extract(rows, slides.parent / "tiles.zarr", ExtractSettings(), listener=recorder)
    assert {slide.row.slide_id: slide.tiles for slide in found.slides} == {"a": 24, "b": 48, "glass": 0}
    assert {name: outcome.tiles for name, outcome in recorder.outcomes.items() if outcome.status == "done"} == {
        slide.row.slide_id: slide.tiles for slide in found.slides
    }
    assert found.failures == summary.failures
    assert heard["a"].line == "500 x 400 px, 4 um/px, 1 level, 24 tiles"
    assert "no um/px" in heard["bare"]
    assert found.lines()[0] == "3 slides can be cut into 72 tiles (50 px at 4 um/px), 2 cannot"
    assert [line.split(":")[0] for line in found.lines()[1:3]] == ["extract", "infer"]


@pytest.fixture
def without_model(monkeypatch):
    """Spares the loading of a model where only tiles are asked for."""
    monkeypatch.setattr(module, "_score_some", lambda *_: Scoring(1.0, 0.1, 0.5))


@pytest.mark.usefixtures("without_model")
def test_what_the_store_will_hold_is_about_what_is_said(rows, slides, recorder):
    found = survey(rows[:2], Heard())
    address = slides.parent / "tiles.zarr"
    extract(rows[:2], address, ExtractSettings(), listener=recorder)
    held = sum(path.stat().st_size for path in (address / "slides").rglob("*") if path.is_file())
    said = sum(slide.packed + slide.tiles * found.reading[slide.kind].packed for slide in found.slides)
    assert said == pytest.approx(held, rel=0.2)


@pytest.mark.usefixtures("without_model")
def test_of_a_slide_that_would_take_long_to_look_through_the_grid_is_counted(rows, monkeypatch):
    monkeypatch.setattr(module, "CHEAP_PIXELS", 10)
    heard = Heard()
    found = survey(rows[:1], heard)
    assert heard["a"].line.endswith("1 level, at most 80 tiles")
    assert found.lines()[0].startswith("1 slide can be cut into at most 80 tiles")
    assert found.lines()[1].startswith("extract: at most about ")


def test_the_estimate_is_the_sum_of_its_parts(rows):
    slide = Surveyed(rows[0], (500, 400), (4.0, 4.0), "", 1, 1000, True, ("tiff", 4.0), 10**6, 2.0)
    found = Survey([slide, slide], {}, {("tiff", 4.0): Reading(0.05, 7000.0)}, Scoring(5.0, 0.1, 30.0))
    assert found.lines()[1] == "extract: about 2 min and 16 MB in the store"
    assert found.lines()[2].startswith("infer: about 4 min on this CPU")


def test_of_slides_without_any_tile_nothing_is_estimated(rows):
    found = survey(rows[4:], Heard())
    assert found.lines() == ["1 slide can be cut into 0 tiles (50 px at 4 um/px), 0 cannot"]


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")])
def test_times_read_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(2.4e6, "2 MB"), (3.26e9, "3.3 GB")])
def test_sizes_read_as_a_person_says_them(count, text):
    assert size(count) == text


def test_the_command_names_what_cannot_be_opened_and_exits_1(wsi_idc, slides):
    folder = slides.parent
    done = wsi_idc("manifest", ".", "--check", "-o", "new.csv", cwd=folder)
    assert done.returncode == 1
    assert "failed broken: cannot read the region" in done.stderr
    assert "a: 500 x 400 px" in done.stdout and "path,slide_id" not in done.stdout
    assert (folder / "new.csv").read_text().startswith("path,slide_id")
    for path in ("a.tif", "b.tif", "new.csv"):
        (folder / path).unlink()
    done = wsi_idc("manifest", ".", "--check", cwd=folder)
    assert done.returncode == 1 and done.stdout.startswith("0 slides can be cut")
    assert {path.name for path in folder.iterdir()} == {"broken.tif", "manifest.csv"}
