"""The part of each tile that is IDC, against known areas, brute force and the real slides."""

import errno
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from wsi_idc.annotations import classes, idc_fraction, read_regions
from wsi_idc.errors import AnnotationError
from wsi_idc.grid import Grid
from wsi_idc.settings import TileSpec

SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30], [10, 10]]
"""Over tiles of 20 px: a quarter of each of the four at the origin."""

# 4 x 3 tiles of 20 px, the last column half beyond the slide.
GRID = Grid(TileSpec(size_px=20, mpp=1.0), (70, 60), (1.0, 1.0))


def polygon(*rings: Any) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


def feature(geometry: Any, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def idc(geometry: Any) -> dict[str, Any]:
    return feature(geometry, classification={"name": "IDC", "color": [200, 0, 0]})


def save(folder: Path, content: Any, name: str = "a.geojson") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def fraction(path: Path, class_name: str = "IDC", grid: Grid = GRID) -> NDArray[np.float32]:
    found, _ = idc_fraction(path, class_name, grid, grid.cells())
    assert found.dtype == np.float32
    assert found.shape == (len(grid),)
    return found.reshape(grid.shape)


def square_map(value: float = 0.25) -> NDArray[np.float32]:
    expected = np.zeros(GRID.shape, dtype=np.float32)
    expected[:2, :2] = value
    return expected


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [idc(polygon(SQUARE))]},
        [idc(polygon(SQUARE))],
        idc(polygon(SQUARE)),
        polygon(SQUARE),
        polygon(SQUARE[:-1]),
        feature(polygon(SQUARE)),
        feature(polygon(SQUARE), name="IDC"),
        feature(polygon(SQUARE), name="Annotation 1", classification=None),
        feature(polygon(SQUARE), classification="idc "),
        feature(polygon(SQUARE), classification={"names": ["IDC"]}),
        {"type": "MultiPolygon", "coordinates": [[SQUARE], []]},
        {"type": "GeometryCollection", "geometries": [polygon(SQUARE), {"type": "Point", "coordinates": [1, 1]}]},
        idc(polygon([[*point, 7.5] for point in SQUARE])),
        [idc(polygon(SQUARE)), idc(polygon(SQUARE)), idc(None), idc({"type": "LineString", "coordinates": [[0, 0]]})],
        [idc(polygon(SQUARE)), feature(polygon([[0, 0], [60, 0], [60, 60], [0, 60]]), classification={"name": "DCIS"})],
        [idc(polygon(SQUARE)), feature(polygon([[0, 0], [60, 0], [60, 60], [0, 60]]))],
    ],
)
def test_each_form_of_geojson_gives_the_same_part(tmp_path: Path, content: Any) -> None:
    np.testing.assert_array_equal(fraction(save(tmp_path, content)), square_map())


def test_a_compressed_file_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "A.GeoJSON.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(polygon(SQUARE)).encode()))
    np.testing.assert_array_equal(fraction(path), square_map())


@pytest.mark.parametrize("kind", ["tile", "detection", "cell"])
def test_what_a_program_detected_is_no_annotation(tmp_path: Path, kind: str) -> None:
    found = idc(polygon([[0, 0], [70, 0], [70, 60], [0, 60], [0, 0]]))
    found["properties"]["objectType"] = kind
    drawn = idc(polygon(SQUARE))
    drawn["properties"]["objectType"] = "annotation"
    content = {"type": "FeatureCollection", "features": [found, drawn]}
    np.testing.assert_allclose(fraction(save(tmp_path, content)), square_map())


def test_holes_are_not_idc(tmp_path: Path) -> None:
    hole = [[15, 15], [25, 15], [25, 25], [15, 25], [15, 15]]
    np.testing.assert_allclose(fraction(save(tmp_path, idc(polygon(SQUARE, hole)))), square_map(75 / 400))


def test_a_polygon_that_crosses_itself_is_repaired(tmp_path: Path) -> None:
    bowtie = [[0, 0], [20, 20], [20, 0], [0, 20], [0, 0]]
    assert fraction(save(tmp_path, idc(polygon(bowtie)))).ravel()[0] == pytest.approx(0.5)


def test_overlapping_polygons_count_once(tmp_path: Path) -> None:
    shapes = [[[x, 0], [x + 12, 0], [x + 12, 20], [x, 20]] for x in (0, 4, 8)]
    assert fraction(save(tmp_path, [idc(polygon(ring)) for ring in shapes])).ravel()[0] == 1.0
    assert fraction(save(tmp_path, [idc(polygon(ring)) for ring in shapes[:2]])).ravel()[0] == pytest.approx(0.8)


def test_what_lies_beyond_the_slide_counts_as_annotated(tmp_path: Path) -> None:
    everything = [[-9, -9], [99, -9], [99, 99], [-9, 99]]
    np.testing.assert_array_equal(fraction(save(tmp_path, polygon(everything))), np.ones(GRID.shape, dtype=np.float32))


def told(path: Path, class_name: str = "IDC", **options: Any) -> list[str]:
    return idc_fraction(path, class_name, GRID, GRID.cells(), **options)[1]


def test_another_class_alone_is_no_idc_and_the_classes_are_told(tmp_path: Path) -> None:
    other = feature(polygon(SQUARE), classification={"name": "Necrosis"})
    path = save(tmp_path, [other, other, feature(polygon(SQUARE), name="IDC")])
    assert classes(path) == {"Necrosis": 2}
    assert not fraction(path).any()
    assert told(path) == [
        "the annotation has no area of class 'IDC': no tile is positive; it has Necrosis 2, unclassified 1"
    ]
    np.testing.assert_array_equal(fraction(path, "necrosis"), square_map())
    assert told(path, "necrosis") == []
    many = save(tmp_path, [feature(polygon(SQUARE), classification={"name": f"c{n}"}) for n in range(11)])
    assert told(many)[0].endswith("c7 1 and 3 more classes")


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": []},
        [],
        [idc(polygon([[1, 1], [2, 2]])), idc(polygon([[1, 1], [2, 2], [1, 1]]))],
        idc({"type": "Point", "coordinates": [1, 1]}),
    ],
)
def test_an_annotation_without_areas_says_nothing_of_its_tiles(tmp_path: Path, content: Any) -> None:
    path = save(tmp_path, content)
    assert np.isnan(fraction(path)).all()
    assert told(path) == ["the annotation marks no area: its tiles are taken to be unknown (--empty-annotation)"]
    found, warnings = idc_fraction(path, "IDC", GRID, GRID.cells(), empty="negative")
    assert not found.any()
    assert len(warnings) == 1
    assert classes(path) == {}


def test_no_cells_give_no_parts(tmp_path: Path) -> None:
    assert idc_fraction(save(tmp_path, polygon(SQUARE)), "IDC", GRID, np.empty((0, 2), dtype=np.int32))[0].shape == (0,)


# --- ASAP ---------------------------------------------------------------------------------------------------------


def asap(*annotations: str, groups: str = "") -> str:
    return (
        '<?xml version="1.0"?><ASAP_Annotations><Annotations>'
        + "".join(annotations)
        + f"</Annotations><AnnotationGroups>{groups}</AnnotationGroups></ASAP_Annotations>"
    )


def asap_square(group: str, kind: str = "Polygon", name: str = "Annotation 0") -> str:
    points = "".join(f'<Coordinate Order="{i}" X="{x}.0" Y="{y}" />' for i, (x, y) in enumerate(SQUARE[:4]))
    head = f'<Annotation Name="{name}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>'
    # The file's order is not the polygon's.
    parts = points.split(" />")
    return head + " />".join([parts[1], parts[0], *parts[2:]]) + "</Coordinates></Annotation>"


@pytest.mark.parametrize("kind", ["Polygon", "Spline", "Rectangle"])
def test_asap_polygons_of_the_class_are_idc(tmp_path: Path, kind: str) -> None:
    text = asap(asap_square("idc", kind), asap_square("idc", "Dot"), asap_square("other"))
    path = save(tmp_path, text, "a.xml")
    np.testing.assert_array_equal(fraction(path), square_map())
    assert classes(path) == {"idc": 1, "other": 1}


def test_asap_groups_belong_to_the_groups_above_them(tmp_path: Path) -> None:
    groups = '<Group Name="grade 3" PartOfGroup="IDC" /><Group Name="IDC" PartOfGroup="grade 3" />'
    np.testing.assert_array_equal(
        fraction(save(tmp_path, asap(asap_square("grade 3"), groups=groups), "a.xml")), square_map()
    )


def test_asap_without_groups_is_all_idc(tmp_path: Path) -> None:
    np.testing.assert_array_equal(fraction(save(tmp_path, asap(asap_square("None")), "a.xml")), square_map())
    assert not fraction(save(tmp_path, asap(asap_square("None"), asap_square("other")), "a.xml")).any()


def test_asap_counts_from_the_files_origin_and_qupath_from_the_slides(tmp_path: Path) -> None:
    far = [[x + 1000, y + 500] for x, y in SQUARE]
    xml = asap(asap_square("IDC"))
    for x, y in SQUARE[:4]:
        xml = xml.replace(f'X="{x}.0" Y="{y}"', f'X="{x + 1000}.0" Y="{y + 500}"')
    path = save(tmp_path, xml, "a.xml")
    found, _ = idc_fraction(path, "IDC", GRID, GRID.cells(), origin=(1000, 500))
    np.testing.assert_array_equal(found.reshape(GRID.shape), square_map())
    with pytest.raises(AnnotationError, match="wholly outside"):
        fraction(path)
    found, _ = idc_fraction(save(tmp_path, polygon(SQUARE)), "IDC", GRID, GRID.cells(), origin=(1000, 500))
    np.testing.assert_array_equal(found.reshape(GRID.shape), square_map())
    with pytest.raises(AnnotationError, match="wholly outside"):
        idc_fraction(save(tmp_path, polygon(far)), "IDC", GRID, GRID.cells(), origin=(1000, 500))


# --- mask pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "jpg"])
@pytest.mark.parametrize("factor", [1, 8])
def test_a_mask_picture_of_any_size_is_weighted_by_area(tmp_path: Path, suffix: str, factor: int) -> None:
    mask = np.zeros((60, 70), dtype=np.uint8)
    mask[10:30, 10:30] = 255
    path = tmp_path / f"m.{suffix}"
    Image.fromarray(mask.repeat(factor, 0).repeat(factor, 1)).save(path)
    np.testing.assert_allclose(fraction(path), square_map(), atol=0.02 if (suffix, factor) == ("jpg", 1) else 1e-6)
    assert classes(path) == {}


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I", "F", "RGB", "RGBA", "LA"])
def test_every_colour_but_black_or_clear_is_idc(tmp_path: Path, mode: str) -> None:
    picture = Image.new(mode, (7, 6))
    if mode == "P":
        picture.putpalette([0, 0, 0, 0, 0, 1])
    picture.paste({"RGB": (0, 0, 1), "RGBA": (0, 0, 1, 255), "LA": (1, 255)}.get(mode, 1), (1, 1, 3, 3))
    path = tmp_path / "m.tif"
    picture.save(path)
    np.testing.assert_allclose(fraction(path), square_map(), atol=1e-6)


def test_of_a_palette_the_colours_count_and_not_their_indices(tmp_path: Path) -> None:
    picture = Image.new("P", (7, 6), 1)
    picture.putpalette([255, 255, 255, 0, 0, 0] + [0] * 762)
    picture.paste(0, (1, 1, 3, 3))
    picture.save(tmp_path / "m.png")
    np.testing.assert_allclose(fraction(tmp_path / "m.png"), square_map(), atol=1e-6)


def test_a_black_picture_is_no_idc_and_told_of(tmp_path: Path) -> None:
    Image.new("L", (7, 6)).save(tmp_path / "m.png")
    assert not fraction(tmp_path / "m.png").any()
    assert told(tmp_path / "m.png") == ["the annotation is all black: no tile is positive"]


@pytest.mark.parametrize("guard", [89_478_485, None])
def test_pillows_guard_stays_as_it_is_and_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guard: int | None
) -> None:
    """wsidicom lifts the guard, and by two threads at once for good."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", guard)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "m.png")
    with pytest.raises(AnnotationError, match=r"more than 67 million.*; save it smaller"):
        fraction(tmp_path / "m.png", grid=Grid(TileSpec(), (20_000, 20_000), (1.0, 1.0)))
    assert guard == Image.MAX_IMAGE_PIXELS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz", "a.xml", "a.png"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(AnnotationError, match=r"cannot be read \(is not a file or folder\)"):
        fraction(tmp_path / name)


@pytest.mark.parametrize(("name", "opened"), [("a.geojson", Path), ("a.png", None)])
def test_what_may_not_be_read_is_told_in_the_systems_words(
    tmp_path: Path, name: str, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"{}")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(opened or Image, "open", refuse)
    with pytest.raises(AnnotationError, match=r"cannot be read \(Permission denied\); check the rights"):
        fraction(tmp_path / name)


def test_a_clear_picture_is_no_idc(tmp_path: Path) -> None:
    Image.new("RGBA", (7, 6), (255, 255, 255, 0)).save(tmp_path / "m.png")
    assert not fraction(tmp_path / "m.png").any()


# --- against brute force ------------------------------------------------------------------------------------------


def rasterised(rings: list[NDArray[np.float64]], grid: Grid, fine: int = 40) -> NDArray[np.float64]:
    """Part of each tile inside any ring by the even-odd rule, from fine x fine points a tile."""
    steps = (np.arange(fine) + 0.5) / fine
    corner = grid.position(grid.cells())[:, :, None]
    x, y = np.moveaxis(corner + np.multiply.outer(grid.extent, steps), 1, 0)  # (n, fine) each
    parts = np.zeros((len(grid), fine, fine), dtype=bool)
    for ring in rings:
        odd = np.zeros_like(parts)
        for (ax, ay), (bx, by) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            tile, row = np.nonzero((ay > y) != (by > y))
            crossing = (bx - ax) * (y[tile, row] - ay) / (by - ay) + ax
            odd[tile, row] ^= x[tile] < crossing[:, None]
        parts |= odd
    return parts.mean(axis=(1, 2)).reshape(grid.shape)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([12, 300]), st.sampled_from([10, 20, 33]))
def test_parts_equal_those_counted_point_by_point(
    tmp_path_factory: pytest.TempPathFactory, seed: int, vertices: int, stride: int
) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid(TileSpec(size_px=20, mpp=1.0, stride_px=stride), (150, 110), (0.77, 0.81))
    rings = []
    for _ in range(5):
        angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
        radius = rng.uniform(10, 60) * (1 + 0.3 * np.sin(angle * rng.integers(2, 9)) + 0.02 * rng.normal(size=vertices))
        rings.append(rng.uniform(0, 120, 2) + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))
    folder = tmp_path_factory.mktemp("rings")
    path = save(folder, [idc(polygon(ring.tolist())) for ring in rings])
    np.testing.assert_allclose(fraction(path, grid=grid), rasterised(rings, grid), atol=0.02)


def test_a_polygon_of_many_vertices_is_exact(tmp_path: Path) -> None:
    grid = Grid(TileSpec(size_px=50, mpp=0.5), (4000, 3000), (0.5, 0.5))
    angle = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    disc = np.stack([2000 + 1300 * np.cos(angle), 1500 + 1300 * np.sin(angle)], axis=1)
    hole = np.stack([2100 + 700 * np.cos(angle), 1400 + 700 * np.sin(angle)], axis=1)
    parts = fraction(save(tmp_path, idc(polygon(disc.tolist(), hole.tolist()))), grid=grid)
    assert parts.sum(dtype=np.float64) * 50 * 50 == pytest.approx(np.pi * (1300**2 - 700**2), rel=1e-6)
    assert parts.max() == 1.0
    assert parts.min() == 0.0


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.geojson", "{", "is not JSON"),
        ("a.geojson", "", "is not JSON"),
        ("a.geojson", "[" * 100_000, "nested too deeply"),
        ("a.geojson", "3", "no 'type'"),
        ("a.geojson", '{"type": "FeatureCollection"}', "without a list 'features'"),
        ("a.geojson", '{"type": "Topology"}', "'Topology'"),
        ("a.geojson", '[{"type": "Feature", "geometry": 3}]', "type None"),
        ("a.geojson", '{"type": "Polygon"}', "without its list of coordinates"),
        ("a.geojson", '{"type": "Polygon", "coordinates": [3]}', "not a list"),
        ("a.geojson", '{"type": "MultiPolygon", "coordinates": [3]}', "list of rings"),
        ("a.geojson", json.dumps(polygon([[0, 0], [1, "1"], [1, 0]])), 'not numbers: [1, "1"]'),
        ("a.geojson", json.dumps(polygon([[0, 0], [1], [1, 0]])), "not numbers: [1]"),
        ("a.geojson", json.dumps(polygon([[0, 0], [1, None], [1, 0]])), "not numbers: [1, null]"),
        ("a.geojson", '{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [1, 0]]]}', "not numbers: [NaN, 1]"),
        ("a.geojson", '{"type": "Polygon", "coordinates": [[[0, 0], [1e300, 1], [1, 0]]]}', "more than 1e9"),
        ("a.geojson", json.dumps(polygon([[71, 0], [90, 0], [90, 50]])), "wholly outside the slide"),
        ("a.xml", "<ASAP_Annotations>", "is not XML"),
        ("a.xml", "<Annotations/>", "its root is 'Annotations'"),
        ("a.xml", '<!DOCTYPE x [<!ENTITY a "aaaa">]><ASAP_Annotations>&a;</ASAP_Annotations>', "DOCTYPE"),
        ("a.xml", asap('<Annotation Type="Polygon"><Coordinate Order="0" X="one" Y="2"/></Annotation>'), "not numbers"),
        ("a.xml", '<?xml version="1.0" encoding="klingon"?><a/>', "is not XML"),
        ("a.geojson.gz", "{}", "cannot be read"),
        ("a.png", "no picture", "cannot be read"),
        ("a.kml", "", "known: .geojson"),
        ("a", "", "known: .geojson"),
    ],
)
def test_each_fault_is_one_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = save(tmp_path, content, name)
    with pytest.raises(AnnotationError) as caught:
        fraction(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_doctype_is_refused_in_one_line_after_tiatoolbox_was_imported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiatoolbox puts defusedxml's parser in the place of the standard library's, for the whole process."""
    defused = pytest.importorskip("defusedxml.ElementTree")
    monkeypatch.setattr("xml.etree.ElementTree.XMLParser", defused.XMLParser)
    path = save(tmp_path, '<!DOCTYPE x [<!ENTITY a "aaaa">]><ASAP_Annotations>&a;</ASAP_Annotations>', "a.xml")
    with pytest.raises(AnnotationError, match="has a DOCTYPE, which no annotation needs"):
        fraction(path)
    np.testing.assert_array_equal(fraction(save(tmp_path, asap(asap_square("IDC")), "b.xml")), square_map())


def test_a_file_that_is_not_there_is_an_annotation_error(tmp_path: Path) -> None:
    for name in ("gone.geojson", "gone.xml", "gone.png"):
        with pytest.raises(AnnotationError, match="cannot be read"):
            fraction(tmp_path / name)


def test_a_picture_of_another_shape_or_too_large_is_refused(tmp_path: Path) -> None:
    Image.new("L", (70, 70)).save(tmp_path / "m.png")
    with pytest.raises(AnnotationError, match="aspect ratio"):
        fraction(tmp_path / "m.png")
    for size in ((8_500, 8_500), (20_000, 20_000)):
        Image.new("1", size).save(tmp_path / "m.png")
        with pytest.raises(AnnotationError, match="save it smaller"):
            fraction(tmp_path / "m.png")


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["Polygon", "Feature", "IDC"]),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["type", "features", "geometry", "coordinates", "properties", "classification", "name"]
                ),
                inner,
            )
        ),
    )
    | st.lists(st.lists(st.lists(st.floats(-99, 99), min_size=2, max_size=2), max_size=5), max_size=3).map(
        lambda rings: polygon(*rings)
    )
)
def test_any_json_gives_parts_or_an_annotation_error(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = save(tmp_path_factory.mktemp("json"), content)
    try:
        parts = fraction(path)
    except AnnotationError:
        return
    assert ((parts >= 0) & (parts <= 1)).all() or (np.isnan(parts).all() and not read_regions(path))
    assert all(shape.is_valid for region in read_regions(path) for shape in region.polygons)


# --- real slides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patient", "positive"), [("8863", 207), ("8867", 162)])
def test_tiles_of_the_real_slides_are_wholly_idc_or_not_at_all(
    idc_slide: Callable[[str], Path], patient: str, positive: int
) -> None:
    place = idc_slide(patient)
    with Image.open(place / f"idc-{patient}.tif") as picture:
        grid = Grid(TileSpec(), picture.size, (4.0, 4.0))
    path = place / f"idc-{patient}.geojson"
    parts = fraction(path, grid=grid)
    assert set(np.unique(parts)) == {0.0, 1.0}
    assert parts.sum() == positive
    assert set(classes(path)) == {"IDC"}
