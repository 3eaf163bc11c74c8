"""Each Python block of the pages for programs runs, in order, on a store as they say it; napari is a stand-in."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import xarray

from tests.conftest import tissue_slide
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import open_store

DOCS = Path(__file__).parent.parent / "docs"


class Silent:
    """Takes what a listener is told."""

    def __call__(self, slides):
        return self

    def __getattr__(self, name):
        return lambda *_: None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `slide-1.tif`, and `tiles.zarr` with its tiles and its map by the model that ships."""
    folder = tmp_path_factory.mktemp("docs")
    tissue_slide(folder / "slide-1.tif", 610, 540)
    (folder / "manifest.csv").write_text("path,patient_id\nslide-1.tif,p1\n")
    extract(read_manifest(folder / "manifest.csv"), folder / "tiles.zarr", ExtractSettings(), listener=Silent())
    infer(folder / "tiles.zarr", read_bundle(SHIPPED), InferSettings(), listener=Silent())
    return folder


@pytest.fixture
def viewer(monkeypatch):
    """What napari would be given: the layers, each its data and its settings."""
    layers = []

    class Viewer:
        def __init__(self):
            self.scale_bar = SimpleNamespace()

        def add_image(
            self, data, *, name, scale, translate, rgb=None, contrast_limits=None, colormap=None, opacity=1.0
        ):
            settings = {"scale": scale, "translate": translate, "rgb": rgb, "contrast_limits": contrast_limits}
            layers.append((data, settings | {"name": name, "colormap": colormap, "opacity": opacity}))

    napari = ModuleType("napari")
    napari.Viewer, napari.run = Viewer, lambda: layers.append("run")
    monkeypatch.setitem(sys.modules, "napari", napari)
    return layers


def run_page(name, place, monkeypatch):
    """The page's blocks run one after the other; gives what they leave behind, and how many there were."""
    monkeypatch.chdir(place)
    text = (DOCS / name).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    names: dict[str, object] = {}
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(DOCS / name), "exec"), names)
    assert text.count("```python") == len(blocks)
    return SimpleNamespace(**{key: value for key, value in names.items() if key != "__builtins__"}), len(blocks)


def test_the_pages_for_zarr_xarray_and_napari_run(place, viewer, monkeypatch, capsys):
    left, count = run_page("python.md", place, monkeypatch)
    assert count == 6 and viewer[-1] == "run"
    stored = open_store(place / "tiles.zarr")
    slide, found = stored.slide("slide-1"), stored.map("idc-resnet50", "slide-1")
    pixels = np.concatenate(list(slide.read_tiles()))
    assert left.brightness == pytest.approx(pixels.mean((1, 2, 3)))
    assert left.labelled.values == pytest.approx(pixels[:8].mean((1, 2)))
    assert np.array_equal(left.position, slide.position)
    assert left.tissue_part == pytest.approx(slide.tissue_mask.mean())
    said = capsys.readouterr().out
    positive = found.record.complete["positive"]
    assert f"{positive} of {slide.count} tiles are at or above" in said
    assert f"slide-1 {slide.count} {positive}" in said


def test_the_map_has_each_tile_where_it_lies_in_xarray(place, viewer, monkeypatch):
    left, _ = run_page("python.md", place, monkeypatch)
    slide = open_store(place / "tiles.zarr").slide("slide-1")
    values = open_store(place / "tiles.zarr").map("idc-resnet50", "slide-1").read("probability")
    # A tile's centre from the centre of the first pixel: 25 px of 4 um, less half a pixel.
    for (x, y), value in zip(slide.position.tolist(), values, strict=True):
        there = left.image.sel(y=4.0 * y + 98.0, x=4.0 * x + 98.0, method="nearest", tolerance=2.0)
        assert float(there) == value


def test_napari_is_given_slide_and_map_that_lie_on_each_other(place, viewer, monkeypatch):
    run_page("python.md", place, monkeypatch)
    (thumbnail, of_slide), (image, of_map) = viewer[:2]
    slide = open_store(place / "tiles.zarr").slide("slide-1")
    assert of_slide["rgb"] is True and of_map["contrast_limits"] == (0, 1)

    def edges(data, settings, axis):
        """Where the layer begins and ends, in um from the centre of the slide's first pixel."""
        pitch, start = settings["scale"][axis], settings["translate"][axis]
        return start - pitch / 2, start + (data.shape[axis] - 0.5) * pitch

    width, height = slide.grid.size
    for axis, length in ((0, height), (1, width)):
        begin, end = edges(thumbnail, of_slide, axis)
        assert (begin, end) == pytest.approx((-2.0, 4.0 * length - 2.0))
        begin, end = edges(image, of_map, axis)
        assert begin == pytest.approx(-2.0) and end == pytest.approx(200.0 * image.shape[axis] - 2.0)
    # A tile of the map and the thumbnail under it: each of its four corners is the same place in both.
    for (x, y), (row, column) in zip(slide.position.tolist(), slide.cell.tolist(), strict=True):
        for axis, cell, level0 in ((0, row, y), (1, column, x)):
            assert edges(image, of_map, axis)[0] + cell * of_map["scale"][axis] == pytest.approx(4.0 * level0 - 2.0)
    assert np.isnan(image[0, 0]) and (thumbnail[0, 0] > 230).all()


def test_the_page_of_the_api_runs_and_says_what_is_so(place, monkeypatch, capsys):
    left, count = run_page("api.md", place, monkeypatch)
    assert count == 5
    values = open_store(place / "tiles.zarr").map("idc-resnet50", "slide-1").read("probability")
    assert np.array_equal(left.scored.probability, values)
    assert left.pixels.shape == (256, 256, 3) and left.probability.shape == (3,)
    assert "no-such-slide.svs: not found; check the path" in capsys.readouterr().out


def test_the_page_of_the_api_names_every_public_function_and_no_other():
    import wsi_idc

    named = re.findall(r"^::: wsi_idc\.api\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    import wsi_idc.api

    assert sorted(named) == sorted(wsi_idc.api.__all__)
    assert {name for name in wsi_idc.__all__ if name not in ("USE", "__version__")} <= set(named)


def test_xarray_opens_every_group_of_a_store(place):
    slide = xarray.open_zarr(place / "tiles.zarr", group="slides/slide-1", consolidated=False)
    assert slide["tiles"].dims == ("tile", "y", "x", "c")
    assert slide["thumbnail"].dims == ("thumbnail_y", "thumbnail_x", "c")
    assert slide["tissue_mask"].dims == ("thumbnail_y", "thumbnail_x")
    assert not {"y", "x"} & set(slide["thumbnail"].dims)
    found = xarray.open_zarr(place / "tiles.zarr", group="maps/idc-resnet50/slide-1", consolidated=False)
    assert found["0"].dims == ("y", "x") and found["probability"].dims == ("tile",)
    whole = xarray.open_datatree(place / "tiles.zarr", engine="zarr", consolidated=False)
    assert set(whole["slides/slide-1"].data_vars) == set(slide.data_vars)
