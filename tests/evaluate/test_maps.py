"""The slides that the page shows are the worst and the best, and each pixel of their maps is its tile's."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from wsi_idc.colours import table
from wsi_idc.evaluate.gather import gather
from wsi_idc.evaluate.maps import NOTHING, OUTLINE, SHOWN, chosen, draw_slides
from wsi_idc.evaluate.metrics import evaluate
from wsi_idc.evaluate.predictions import predictions
from wsi_idc.evaluate.report import write_report
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import open_store

SQUARE = [[100, 100], [250, 100], [250, 250], [100, 250], [100, 100]]


@pytest.fixture
def gathered(tmp_path, make, recorder, bundle):
    """Two annotated slides of test patients, scored by the mean of their pixels."""
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}}
    feature["properties"] = {"classification": {"name": "IDC"}}
    (tmp_path / "idc.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    for index in range(2):
        make.tissue_slide(tmp_path / f"s{index}.tif", seed=index)
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,patient_id,annotation,split\n" + "s0.tif,p0,idc.geojson,test\ns1.tif,p1,idc.geojson,test")
    extract(read_manifest(manifest), tmp_path / "tiles.zarr", ExtractSettings(), listener=recorder)
    infer(tmp_path / "tiles.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
    store = open_store(tmp_path / "tiles.zarr")
    return gather(store, [read_bundle(bundle)], "test", positive_from=0.5, trained_on=False)


def test_worst_come_first_and_a_slide_without_idc_is_no_best():
    def slide(name, gap, truth=(0, 1)):
        return [(name, abs(part - gap), part) for part in truth]

    tiles = [
        *slide("bad", 0.9),
        *slide("good", 0.1),
        *slide("fair", 0.3),
        *slide("poor", 0.6),
        *slide("fine", 0.2),
        *slide("so-so", 0.4),
        *slide("empty", 0.0, (0, 0)),
        *slide("worse", 0.8),
    ]
    names, probability, truth = zip(*tiles, strict=True)
    data = predictions("m", probability, truth, names, names, threshold=0.5)
    found = chosen(evaluate([data], resamples=5))
    assert found == [
        *(("worst", name) for name in ("bad", "worse", "poor")),
        *(("best", name) for name in ("fair", "fine", "good")),
    ]
    few = predictions("m", probability[:4], truth[:4], names[:4], names[:4], threshold=0.5)
    assert chosen(evaluate([few], resamples=5)) == [("worst", "bad"), ("worst", "good")]
    assert SHOWN == 3


def test_each_pixel_of_a_map_is_its_tiles(gathered):
    shown = draw_slides(evaluate(gathered.models, resamples=5), gathered.slides)
    assert len(shown) == 2
    for slide, drawn in zip(gathered.slides, sorted(shown, key=lambda one: one.heading), strict=True):
        assert drawn.heading.startswith(f"{slide.slide_id}, patient {slide.patient_id}: worst, Brier score 0.")
        assert [panel.title for panel in drawn.panels] == ["Slide", "Labels", "mean"]
        thumbnail, labels, probability = (
            np.asarray(Image.open(io.BytesIO(panel.content)).convert("RGB")).astype(int) for panel in drawn.panels
        )
        assert thumbnail.shape == labels.shape == probability.shape == (480, 600, 3)
        start = 24 * gathered.slides.index(slide)
        values = gathered.models[0].probability[start : start + 24]
        # At 500 x 400 px the picture is 1.2 times the slide, so that a tile of 50 px is 60 pixels of it.
        middle = slide.cell * 60 + 30
        for (y, x), part, value in zip(middle.tolist(), slide.idc, values, strict=True):
            assert np.abs(labels[y, x] - table()[round(float(part) * 255)]).max() <= 2
            assert np.abs(probability[y, x] - table()[round(float(value) * 255)]).max() <= 2
        assert (labels[30, 30] == NOTHING).all() and (probability[30, 30] == NOTHING).all()
        # The outline runs outside the square of 150 px that is labelled, which begins at (100, 100).
        assert (probability[200, 118] == OUTLINE).all() and (probability[200, 122] != OUTLINE).any()


def test_the_page_shows_them_beside_the_labels(gathered, tmp_path):
    write_report(tmp_path / "out", gathered.models, slides=gathered.slides, resamples=5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure>") == 6 and page.count("data:image/jpeg") == 2
    assert "found 9 of 9 IDC tiles" in page or "of 9 IDC tiles" in page
    write_report(tmp_path / "without", gathered.models, resamples=5)
    assert "<figure>" not in (tmp_path / "without" / "report.html").read_text()


def test_only_tiles_that_are_judged_are_shown(gathered):
    # One tile of the first slide has no probability: it is left out of the figures, and of the map.
    whole = gathered.models[0]
    kept = np.arange(1, len(whole))
    part = predictions(
        "m",
        np.where(np.arange(len(whole)) == 0, np.nan, whole.probability),
        whole.truth,
        whole.slide,
        whole.patient,
        threshold=0.5,
    )
    assert part.tile.tolist() == kept.tolist()
    first = next(s for s in draw_slides(evaluate([part], resamples=5), gathered.slides) if s.heading.startswith("s0"))
    drawn = np.asarray(Image.open(io.BytesIO(first.panels[2].content)).convert("RGB"))
    row, column = gathered.slides[0].cell[0].tolist()
    assert tuple(drawn[row * 60 + 30, column * 60 + 30].tolist()) == NOTHING
