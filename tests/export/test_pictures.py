"""Pictures show the slide, the probabilities in their places, and what they may be used for, of any slide."""

import numpy as np
import pytest
from PIL import Image

from wsi_idc.colours import table
from wsi_idc.errors import UsageError
from wsi_idc.export import pictures
from wsi_idc.export.export import export
from wsi_idc.export.pictures import draw_preview, draw_result, overlay
from wsi_idc.extract import extract
from wsi_idc.grid import Grid
from wsi_idc.infer import infer
from wsi_idc.info import describe_slide
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.results import Choice, look
from wsi_idc.settings import ExportSettings, ExtractSettings, InferSettings, TileSpec
from wsi_idc.store import open_store

TISSUE = (170, 90, 150)


@pytest.fixture
def said(monkeypatch):
    """The words of the pictures that are drawn."""
    words = []
    plain = pictures._Sheet.text

    def text(self, left, line, **options):
        words.append(line)
        plain(self, left, line, **options)

    monkeypatch.setattr(pictures._Sheet, "text", text)
    return words


@pytest.fixture
def results_of(tmp_path, bundle, recorder):
    """Gives the results of slides in the folder, by the lines of a manifest."""

    def results(*lines, header="path"):
        (tmp_path / "manifest.csv").write_text("\n".join([header, *lines]) + "\n")
        store = tmp_path / "t.zarr"
        extract(read_manifest(tmp_path / "manifest.csv"), store, ExtractSettings(), listener=recorder)
        infer(store, read_bundle(bundle), InferSettings(), listener=recorder)
        return [look(open_store(store), Choice("mean"), name) for name in open_store(store).slide_ids()]

    return results


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def share(picture, colour, within=30):
    return float((np.abs(picture - colour).max(axis=2) < within).mean())


def test_a_map_is_drawn_beside_and_over_its_slide(store, tmp_path, said):
    result = look(store, Choice("mean"), "a")
    draw_result(result, tmp_path / "a.png")
    picture = pixels(tmp_path / "a.png")
    third = picture.shape[1] // 3
    slide, map_, both = picture[:, :third], picture[:, third : 2 * third], picture[:, 2 * third :]
    colour = table()[round(255 * float(np.median(result.probability)))]
    mixed = pictures.OVER * colour + (1 - pictures.OVER) * np.array(TISSUE)
    assert share(slide, TISSUE) > 0.1 and share(map_, colour) > 0.1 and share(both, mixed) > 0.1
    for other, own in ((map_, TISSUE), (both, TISSUE), (both, colour)):
        assert share(other, own, 12) < 0.02
    words = "\n".join(said)
    for expected in ("a\n", "P(IDC) by mean", "current when drawn", "threshold 0.5", "Research use only", "500 um"):
        assert expected in words
    assert f"{result.measures.positive} of {result.measures.tiles} tiles at or above the threshold" in words
    assert "annotat" not in words
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Disclaimer"].startswith("Research use only")


def test_every_slide_with_a_map_gets_a_picture_by_export(store, tmp_path, recorder):
    summary = export(store.address, None, ExportSettings(formats=("png",), out=tmp_path / "out"), listener=recorder)
    assert summary.done == 2 and sorted(path.name for path in (tmp_path / "out/png").iterdir()) == ["a.png", "b.png"]
    first = (tmp_path / "out/png/a.png").read_bytes()
    export(store.address, None, ExportSettings(formats=("png",), out=tmp_path / "again"), listener=recorder)
    assert (tmp_path / "again/png/a.png").read_bytes() == first


def test_an_annotation_is_outlined_by_the_tiles_that_it_covers(tmp_path, make, results_of, said):
    make.tissue_slide(tmp_path / "a.tif")
    (tmp_path / "a.geojson").write_text(
        '{"type": "Polygon", "coordinates": [[[100, 100], [250, 100], [250, 220], [100, 220], [100, 100]]]}'
    )
    (result,) = results_of("a.tif,a.geojson", header="path,annotation")
    draw_result(result, tmp_path / "a.png")
    assert any(line.startswith("annotation, by tiles: 6 of which at least half is annotated") for line in said)
    assert share(pixels(tmp_path / "a.png"), (213, 94, 0)) > 0.0005


def test_a_slide_without_tissue_says_so(tmp_path, make, results_of, said):
    make.write_tiff(tmp_path / "a.tif", np.full((300, 400, 3), 244, np.uint8))
    (result,) = results_of("a.tif")
    draw_result(result, tmp_path / "a.png")
    assert any("No tissue was found" in line for line in said)
    assert pixels(tmp_path / "a.png").shape[0] > 600


@pytest.mark.parametrize(
    ("width", "height", "least"), [(50, 50, 600), (2000, 200, 200), (200, 2000, 1300)], ids=["tiny", "wide", "tall"]
)
def test_slides_of_any_shape_are_large_enough_to_see(tmp_path, make, results_of, width, height, least):
    make.tissue_slide(tmp_path / "a.tif", width, height, margin=0)
    (result,) = results_of("a.tif")
    draw_result(result, tmp_path / "a.png")
    picture = pixels(tmp_path / "a.png")
    assert max(picture.shape[:2]) < 2600
    rows = (np.abs(picture - TISSUE).max(axis=2) < 40).any(axis=1)
    assert rows.sum() >= least


def test_names_are_shown_as_text_whatever_is_in_them(tmp_path, make, results_of, said, recwarn):
    name = "$\\frac{1}$ _^{x 中 " + "W" * 90
    make.tissue_slide(tmp_path / "a.tif")
    (result,) = results_of(f"a.tif,{name.replace(chr(92), '')}", header="path,slide_id")
    draw_result(result, tmp_path / "a.png")
    assert said[0].startswith("$frac{1}$ _^{x \\u4e2d") and len(said[1]) > 10
    grid = Grid(TileSpec(), (500, 400), (4.0, 4.0))
    mask, thumbnail = np.zeros((200, 250), bool), np.full((200, 250, 3), 244, np.uint8)
    draw_preview(name, ["$x^"], thumbnail, mask, grid, np.empty((0, 2), np.int32), tmp_path / "b.png")
    assert not [warning for warning in recwarn if "font" in str(warning.message).casefold()]


def test_the_colours_of_a_map_fit_a_picture_of_any_size(store):
    result = look(store, Choice("mean"), "a")
    small = overlay(result)
    assert small.shape == (*result.slide.grid.shape, 4) and small.dtype == np.uint8
    tile = tuple(result.cell[3])
    assert small[tile][3] == 255 and small[0, 0][3] == 0
    assert (small[tile][:3] == table()[round(255 * float(result.probability[3]))]).all()
    width, height = result.slide.grid.size
    large = overlay(result, 0.5, (height, width))
    assert large.shape == (height, width, 4) and set(np.unique(large[..., 3])) == {0, 128}
    x, y = result.slide.position[3]
    assert (large[y : y + 50, x : x + 50, :3] == small[tile][:3]).all()
    assert large[y, x - 1, 3] == (128 if (result.cell == tile - np.array([0, 1])).all(1).any() else 0)
    tiny = overlay(result, 1.0, (8, 10))
    assert np.array_equal(tiny, small) if small.shape[:2] == (8, 10) else tiny.shape == (8, 10, 4)


def test_where_tiles_do_not_reach_the_picture_is_clear(tmp_path, make, bundle, recorder):
    make.tissue_slide(tmp_path / "a.tif", 270, 220, margin=0)
    (tmp_path / "manifest.csv").write_text("path\na.tif\n")
    extract(
        read_manifest(tmp_path / "manifest.csv"),
        tmp_path / "t",
        ExtractSettings(tile=TileSpec(last="drop")),
        listener=recorder,
    )
    infer(tmp_path / "t", read_bundle(bundle), InferSettings(), listener=recorder)
    clear = overlay(look(open_store(tmp_path / "t"), Choice("mean"), "a"), 1.0, (220, 270))[..., 3] == 0
    assert clear[200:].all() and clear[:, 250:].all() and not clear[:200, :250].any()


def test_a_preview_has_title_legend_and_scale_bar(tmp_path, make, said):
    path = make.tissue_slide(tmp_path / "a.tif")
    fields = describe_slide(path, None, ExtractSettings(), tmp_path / "p.png")
    assert fields["preview"] == str(tmp_path / "p.png")
    words = "\n".join(said)
    for expected in (
        "a.tif\n",
        "500 x 400 px at 4 x 4 um/px",
        "kept tiles: 24",
        "tissue mask",
        "500 um",
        "Research use",
    ):
        assert expected in words
    picture = pixels(tmp_path / "p.png")
    assert share(picture, TISSUE) > 0.1 and share(picture, (0, 114, 178), 60) > 0.0005
    with pytest.raises(UsageError, match="cannot be written"):
        describe_slide(path, None, ExtractSettings(), tmp_path / "none" / "p.png")
    with pytest.raises(UsageError, match="cannot be written"):
        describe_slide(path, None, ExtractSettings(), tmp_path / "p.xyz")


def test_a_preview_outlines_the_mask_where_it_is(tmp_path):
    grid = Grid(TileSpec(), (400, 400), (4.0, 4.0))
    mask, thumbnail = np.zeros((100, 100), bool), np.full((200, 200, 3), 244, np.uint8)
    mask[10:40, 10:40] = True
    draw_preview("a", [], thumbnail, mask, grid, np.array([[6, 6]], np.int32), tmp_path / "p.png")
    picture = pixels(tmp_path / "p.png")
    glass = (picture == 244).all(axis=2)
    (top, bottom), (left, right) = (np.flatnonzero(glass.mean(axis=axis) > 0.3)[[0, -1]] for axis in (1, 0))
    scale = (right - left + 1) / 400
    black, blue = (picture.max(axis=2) < 60), (np.abs(picture - (0, 114, 178)).max(axis=2) < 90)

    def at(found):
        rows, columns = np.nonzero(found[top : bottom + 1, left : right + 1])
        return [value / scale for value in (columns.min(), rows.min(), columns.max(), rows.max())]

    assert at(black) == pytest.approx([40, 40, 160, 160], abs=4)
    assert at(blue) == pytest.approx([300, 300, 350, 350], abs=4)
