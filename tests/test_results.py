"""A result is read only where it is current, and its areas and regions are those of its tiles."""

import numpy as np
import pytest

from wsi_idc.errors import ModelError, UsageError
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.results import Absent, Choice, Result, choose_model, look, require
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import open_store


@pytest.fixture
def store(scored):
    return scored


def test_the_only_model_is_meant_and_of_several_one_must_be_named(store, bundle, make, recorder, tmp_path):
    assert choose_model(store, None).model == "mean"
    assert choose_model(store, str(bundle)).needs
    other = make.write_bundle(tmp_path / "other", name="other")
    with pytest.raises(UsageError, match="no maps by other"):
        choose_model(store, str(other))
    infer(store.address, read_bundle(other), InferSettings(), listener=recorder)
    with pytest.raises(UsageError, match="maps by mean, other"):
        choose_model(store, None)
    with pytest.raises(ModelError, match=r"no bundle\.json"):
        choose_model(store, str(tmp_path))


def test_a_map_by_another_version_of_the_bundle_is_stale(store, bundle, make):
    make.write_bundle(bundle, threshold=0.25)
    found = look(store, choose_model(store, str(bundle)), "a")
    assert isinstance(found, Absent) and found.kind == "stale" and "threshold" in found.why
    with pytest.raises(UsageError, match="a: its map by mean is stale"):
        require(found, "mean")
    assert isinstance(look(store, choose_model(store, "mean"), "a"), Result)


def test_what_is_missing_is_said(store):
    found = look(store, Choice("other"), "a")
    assert isinstance(found, Absent) and str(found) == "no map"
    found = look(store, Choice("mean"), "broken")
    assert isinstance(found, Absent) and found.kind == "not extracted" and found.why


class Made(Result):
    """A result of a slide whose probabilities the test gives."""

    def __init__(self, slide, probability, threshold=0.5):
        super().__init__(slide, None, "made", threshold)
        self.__dict__["probability"] = np.asarray(probability, np.float32)


def test_regions_are_tiles_that_share_edges(store):
    slide = store.slide("a")
    cells = slide.cell
    first, last = cells.min(0), cells.max(0)
    corner = (cells == first).all(1)
    edge = (cells == last).all(1) | (cells == last - [0, 1]).all(1)
    result = Made(slide, np.where(corner, 0.9, np.where(edge, 0.7, 0.1)))
    big, small = result.regions
    assert sorted(big.tiles) == sorted(np.flatnonzero(edge)) and list(small.tiles) == list(np.flatnonzero(corner))
    assert big.mean == pytest.approx(0.7) and big.area_mm2 == pytest.approx(0.08)
    assert big.bounds == (50 * (last[1] - 1), 50 * last[0], 100, 50)
    assert result.measures.positive == 3
    tissue = slide.tissue
    assert result.measures.idc_mm2 == pytest.approx(0.04 * float(tissue[corner | edge].sum()))
    assert big.tissue_mm2 == pytest.approx(0.04 * float(tissue[edge].sum()))


def test_tiles_that_touch_at_a_corner_are_two_regions(store):
    slide = store.slide("a")
    first = slide.cell.min(0)
    diagonal = (slide.cell == first).all(1) | (slide.cell == first + 1).all(1)
    assert len(Made(slide, np.where(diagonal, 0.9, 0.1)).regions) == 2
    assert Made(slide, np.zeros(slide.count)).regions == []


def test_squares_share_their_edges_and_end_with_the_slide(tmp_path, make, recorder):
    make.tissue_slide(tmp_path / "odd.tif", 530, 410, margin=0, mpp=3.7)
    (tmp_path / "manifest.csv").write_text("path\nodd.tif\n")
    extract(read_manifest(tmp_path / "manifest.csv"), tmp_path / "t.zarr", ExtractSettings(), listener=recorder)
    slide = open_store(tmp_path / "t.zarr").slide("odd")
    squares = Made(slide, np.ones(slide.count)).squares(np.arange(slide.count))
    assert squares[:, 2].max() == 530 and squares[:, 3].max() == 410
    by_cell = {tuple(cell): square for cell, square in zip(slide.cell.tolist(), squares.tolist(), strict=True)}
    for (row, column), square in by_cell.items():
        if (row, column + 1) in by_cell:
            assert by_cell[row, column + 1][0] == square[2]
