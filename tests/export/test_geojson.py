"""QuPath reads what is written for it: the rules below are its own reader's, and what it would drop is a fault."""

import gzip
import json
import tracemalloc
import uuid
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
import shapely

from wsi_idc.annotations import idc_fraction, read_regions
from wsi_idc.errors import AnnotationError
from wsi_idc.export import geojson
from wsi_idc.export.export import export
from wsi_idc.extract import extract
from wsi_idc.grid import Grid
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.results import Choice, Result, look
from wsi_idc.settings import ExportSettings, ExtractSettings, InferSettings, TileSpec
from wsi_idc.store import open_store


def as_qupath_reads(text):
    """The objects of a GeoJSON text; fails where QuPath would throw or pass something over (see geojson.py)."""

    def refuse(word):
        raise AssertionError(f"{word} in measurements makes QuPath throw")

    content = json.loads(text, parse_constant=refuse)
    assert content["type"] == "FeatureCollection"
    objects = []
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        geometry, properties = feature["geometry"], feature["properties"]
        assert geometry["type"] in ("Polygon", "MultiPolygon")
        polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
        for ring in (ring for polygon in polygons for ring in polygon):
            assert ring[0] == ring[-1] and len(ring) >= 4
        assert properties["objectType"] in ("tile", "annotation")
        classification = properties["classification"]
        assert isinstance(classification, dict) and len(classification["color"]) == 3
        assert all(type(part) is int and 0 <= part <= 255 for part in classification["color"])
        name = classification["name"]
        assert name.strip() == name != "" and not set(name) & set(":\n\r")
        assert properties["isLocked"] is True
        assert all(isinstance(value, int | float) for value in properties["measurements"].values())
        assert all(isinstance(value, str) for value in properties.get("metadata", {}).values())
        objects.append(
            SimpleNamespace(id=feature["id"], shape=shapely.from_geojson(json.dumps(geometry)), **properties)
        )
    return objects


def result_of(store, slide_id="a", threshold=None, model="mean"):
    result = look(store, Choice(model), slide_id, threshold)
    assert isinstance(result, Result)
    return result


@pytest.fixture
def result(store):
    """Of slide a, with about half of the tiles above the threshold, in regions with holes or without."""
    return result_of(store, threshold=float(np.median(result_of(store).probability)))


def test_every_tile_is_a_detection_with_its_probability_and_class(result):
    objects = as_qupath_reads("".join(geojson.pieces(result)))
    tiles = [one for one in objects if one.objectType == "tile"]
    assert [one.shape.bounds for one in tiles] == [tuple(s) for s in result.squares(np.arange(len(tiles))).tolist()]
    assert np.array_equal(np.float32([one.measurements["P(IDC)"] for one in tiles]), result.probability)
    names = [one.classification["name"] for one in tiles]
    assert names == ["IDC" if called else "non-IDC" for called in result.called]
    assert "Annotated" not in tiles[0].measurements


def test_regions_are_annotations_with_area_and_mean_strongest_first(result):
    objects = as_qupath_reads("".join(geojson.pieces(result)))
    found = [one for one in objects if one.objectType == "annotation"]
    assert objects[: len(found)] == found and len(found) == len(result.regions) > 1
    for number, (one, region) in enumerate(zip(found, result.regions, strict=True), start=1):
        assert one.name == f"IDC {number}" and one.classification["name"] == "IDC"
        assert one.measurements["Area mm^2"] == pytest.approx(region.area_mm2)
        assert one.measurements["Mean P(IDC)"] == pytest.approx(region.mean, abs=1e-6)
        assert one.shape.is_valid and one.shape.area * 16e-6 == pytest.approx(region.area_mm2)
        assert one.metadata["model"] == "mean" and "Research use only" in one.metadata["use"]


def test_our_own_reader_finds_the_regions_again_holes_too(result, tmp_path):
    cells = result.cell
    hole = (cells == cells.min(0) + 1).all(1)
    result.__dict__["probability"] = np.where(hole, 0.0, 1.0).astype(np.float32)
    path = tmp_path / "a.geojson"
    geojson.write(result, path)
    with pytest.raises(AnnotationError, match="judged by its own answers"):
        read_regions(path)
    # As QuPath exports them when a person has unlocked them.
    path.write_text(path.read_text().replace('"isLocked": true', '"isLocked": false'))
    first = read_regions(path)[0]
    assert first.classes == ("IDC",) and first.name == "IDC 1" and len(first.polygons[0].interiors) == 1
    assert first.polygons[0].equals(result.outline(np.flatnonzero(~hole)))
    # Between two points that a straight edge needs there is none.
    assert shapely.get_num_coordinates(first.polygons[0]) == 10
    fraction, warnings = idc_fraction(path, "idc", result.slide.grid, cells)
    assert not warnings and np.array_equal(fraction, np.where(hole, 0, 1))


@pytest.mark.parametrize("seed", range(4))
def test_outlines_of_any_tiles_are_valid_and_as_large(store, seed):
    result = result_of(store, "b")
    tiles = np.flatnonzero(np.random.default_rng(seed).random(result.slide.count) < 0.6)
    outline = result.outline(tiles)
    x0, y0, x1, y1 = result.squares(tiles).T
    assert outline.is_valid and outline.area == ((x1 - x0) * (y1 - y0)).sum()


def test_two_exports_are_equal_and_ids_are_of_slide_model_and_cell(store, result, bundle, make, recorder, tmp_path):
    text = "".join(geojson.pieces(result))
    assert text == "".join(geojson.pieces(result_of(store, threshold=result.threshold)))
    ids = {one.id for one in as_qupath_reads(text)}
    assert len(ids) == len(as_qupath_reads(text))
    other = make.write_bundle(tmp_path / "other", name="other")
    infer(store.address, read_bundle(other), InferSettings(), listener=recorder)
    for another in (result_of(store, "b"), result_of(store, model="other")):
        assert not ids & {one.id for one in as_qupath_reads("".join(geojson.pieces(another)))}
    tiles = {one.id for one in as_qupath_reads(text) if one.objectType == "tile"}
    assert tiles < {one.id for one in as_qupath_reads("".join(geojson.pieces(result_of(store, threshold=0.1))))}


def test_positions_count_from_the_slides_origin_as_qupath_crops(tmp_path, make, bundle, recorder, monkeypatch):
    make.tissue_slide(tmp_path / "a.tif", 700, 600, margin=50)
    (tmp_path / "manifest.csv").write_text("path\na.tif\n")
    plain = openslide.OpenSlide.properties
    bounds = {"x": 120, "y": 75, "width": 500, "height": 400}
    added = {f"openslide.bounds-{name}": str(value) for name, value in bounds.items()}
    monkeypatch.setattr(
        openslide.OpenSlide, "properties", property(lambda self: {**plain.__get__(self, type(self)), **added})
    )
    store = tmp_path / "t.zarr"
    extract(read_manifest(tmp_path / "manifest.csv"), store, ExtractSettings(), listener=recorder)
    infer(store, read_bundle(bundle), InferSettings(), listener=recorder)
    export(store, None, ExportSettings(formats=("geojson", "csv"), out=tmp_path / "out"), listener=recorder)
    result = result_of(open_store(store))
    assert result.origin == (120, 75)
    first = next(
        one for one in as_qupath_reads((tmp_path / "out/geojson/a.geojson").read_text()) if one.objectType == "tile"
    )
    assert first.shape.bounds[:2] == tuple(result.slide.position[0]) == (0, 0)
    assert (tmp_path / "out/csv/a.csv").read_text().splitlines()[1].startswith("120,75,50,50,")


def test_a_large_file_is_compressed_and_takes_the_place_of_the_small_one(store, tmp_path, recorder, monkeypatch):
    out = tmp_path / "out"

    def run(**options):
        return export(store.address, None, ExportSettings(formats=("geojson",), out=out), listener=recorder, **options)

    run()
    small = (out / "geojson/a.geojson").read_bytes()
    monkeypatch.setattr(geojson, "LARGE", 10)
    run(force=True)
    assert sorted(path.name for path in (out / "geojson").iterdir()) == ["a.geojson.gz", "b.geojson.gz"]
    packed = (out / "geojson/a.geojson.gz").read_bytes()
    assert gzip.decompress(packed) == small
    assert run().skipped == 2
    run(force=True)
    assert (out / "geojson/a.geojson.gz").read_bytes() == packed


def test_class_names_are_other_peoples(slides, make, recorder, tmp_path):
    names = ["a\n<b>", "IDC: high\x1b[2J", "c\u202e"]
    bundle = make.write_bundle(
        tmp_path / "three", name="three", outputs=3, classes=names, positive=names[1], threshold=0.3
    )
    store = tmp_path / "t.zarr"
    extract(read_manifest(slides), store, ExtractSettings(), listener=recorder)
    infer(store, read_bundle(bundle), InferSettings(), listener=recorder)
    result = result_of(open_store(store), model="three", threshold=0.99)
    text = "".join(geojson.pieces(result))
    assert text.isascii() and "\x1b" not in text
    objects = as_qupath_reads(text)
    # None reaches the threshold: the most probable of the others is each tile's class (red, the first of three).
    assert {one.classification["name"] for one in objects} == {"a <b>"}
    assert list(objects[0].measurements)[:3] == ["P(IDC - high\\x1b[2J)", "P(a <b>)", "P(c\\u202e)"]
    assert sum(list(objects[0].measurements.values())[:3]) == pytest.approx(1, abs=1e-5)


def test_an_empty_slide_has_no_object():
    result = made(0)
    assert as_qupath_reads("".join(geojson.pieces(result))) == []


def test_a_file_is_never_held_in_memory():
    list(geojson.pieces(made(1)))  # what is imported then is not counted
    result = made(8_000)
    length = 0
    tracemalloc.start()
    try:
        for piece in geojson.pieces(result):
            length += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert length > 2.5e6 and peak < length / 2


def made(count):
    """A result of so many tiles, a hundred a row, every third row of which is positive."""
    cell = np.stack(np.divmod(np.arange(count, dtype=np.int32), 100), axis=1).astype(np.int32)
    rows = max(1, -(-count // 100))
    slide = SimpleNamespace(
        slide_id="made",
        cell=cell,
        count=count,
        spec=TileSpec(),
        tissue=np.ones(count, np.float32),
        idc=np.zeros(count, np.float32),
        attributes={},
        grid=Grid(TileSpec(), (5000, 50 * rows), (4.0, 4.0)),
    )
    found = SimpleNamespace(
        attributes={"model": {"classes": ["non-IDC", "IDC"]}},
        has=lambda name: False,
        record=SimpleNamespace(made_from={"positive class": "IDC"}),
        read=lambda name: np.where(cell[:, 0] % 3 == 0, 0.9, 0.1).astype(np.float32),
    )
    return Result(slide, found, "made", 0.5)
