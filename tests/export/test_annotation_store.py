"""tiatoolbox opens the database, finds tiles where they are, and draws them."""

import sqlite3

import numpy as np
import pytest

from wsi_idc.export import annotation_store
from wsi_idc.export.annotation_store import read_options
from wsi_idc.results import choose_model, look
from wsi_idc.slides.toolbox import without_log_handlers


@pytest.fixture
def storage(monkeypatch):
    """tiatoolbox's module, on a Python without loadable extensions too."""
    with without_log_handlers():
        from tiatoolbox.annotation import storage

    if not hasattr(sqlite3.Connection, "enable_load_extension"):
        monkeypatch.setattr(storage.SQLiteStore, "compile_options", staticmethod(read_options))
    return storage


@pytest.fixture
def result(store):
    choice = choose_model(store, None)
    half = float(np.median(look(store, choice, "a").probability))
    return look(store, choice, "a", half)


def test_a_tile_is_a_square_with_its_probability_and_class(result, storage, tmp_path):
    from shapely import box

    annotation_store.write(result, tmp_path / "a.db")
    database = storage.SQLiteStore(tmp_path / "a.db")
    assert len(database) == result.slide.count
    for number in (0, 7, 23):
        (x, y), (row, column) = result.slide.position[number].tolist(), result.cell[number].tolist()
        (found,) = database.query(box(x + 20, y + 20, x + 30, y + 30)).values()
        assert found.geometry.bounds == (x, y, x + 50, y + 50)
        assert found.properties["prob_IDC"] == result.probability[number]
        assert (found.properties["row"], found.properties["column"]) == (row, column)
        assert found.properties["type"] == ("IDC" if result.called[number] else "not IDC")
    assert set(database.pquery("props['type']")) == {"IDC", "not IDC"}
    assert len(database.query(where="props['type'] == 'IDC'")) == result.called.sum() > 0
    # No annotation: the label is not known, and a NaN would be no JSON.
    assert not database.pquery("props['label']") - {None}
    database.close()


def test_coordinates_count_from_the_files_own_corner(result, storage, tmp_path, monkeypatch):
    annotation_store.write(result, tmp_path / "a.db")
    monkeypatch.setattr(type(result), "origin", (1000, 2000))
    annotation_store.write(result, tmp_path / "b.db")
    squares = []
    for name in "ab":
        database = storage.SQLiteStore(tmp_path / f"{name}.db")
        squares.append(np.array([found.geometry.bounds for found in database.values()]))
        database.close()
    assert (squares[1] - squares[0] == (1000, 2000, 1000, 2000)).all()


@pytest.mark.slow  # Importing the renderer takes 20 s of CPU.
def test_visualizes_renderer_draws_the_tiles_in_their_places(result, storage, tmp_path):
    from matplotlib import colormaps

    with without_log_handlers():
        from tiatoolbox.tools.pyramid import AnnotationTileGenerator
        from tiatoolbox.utils.visualization import AnnotationRenderer
        from tiatoolbox.wsicore.wsireader import WSIMeta

    annotation_store.write(result, tmp_path / "a.db")
    database = storage.SQLiteStore(tmp_path / "a.db")
    renderer = AnnotationRenderer(score_prop="prob_IDC", mapper=colormaps["viridis"], edge_thickness=0)
    info = WSIMeta(slide_dimensions=(500, 400), axes="YXS", mpp=(4.0, 4.0))
    generator = AnnotationTileGenerator(info, database, renderer, tile_size=512)
    drawn = np.asarray(generator.get_tile(generator.level_count - 1, 0, 0))
    database.close()
    image = np.zeros((400, 500), bool)
    for x0, y0, x1, y1 in result.squares(np.arange(result.slide.count)).tolist():
        image[y0:y1, x0:x1] = True
    opaque = drawn[:400, :500, 3] > 0
    inner = np.zeros_like(image)
    inner[3:-3, 3:-3] = image[6:, 6:] & image[:-6, :-6]
    assert opaque[inner].all() and not opaque[:95].any() and image.sum() == 24 * 2500


def test_a_slide_without_tiles_is_an_empty_database(result, storage, tmp_path, monkeypatch):
    empty = np.zeros((0, 2), np.int32)
    monkeypatch.setattr(type(result.slide), "count", 0)
    for name in ("position", "idc", "blur", "pen"):
        values = empty if name == "position" else np.zeros(0, np.float32)
        monkeypatch.setattr(type(result.slide), name, values)
    result.cell, result.tissue = empty, np.zeros(0, np.float32)
    result.probability, result.alone = np.zeros(0, np.float32), None
    annotation_store.write(result, tmp_path / "a.db")
    assert len(storage.SQLiteStore(tmp_path / "a.db")) == 0
