"""Every sample manifest is one that extract takes, with slides of the kinds that it names."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_idc.extract import extract
from wsi_idc.manifest import read_manifest
from wsi_idc.settings import ExtractSettings
from wsi_idc.store import open_store

SAMPLES = Path(__file__).parent.parent / "sample_manifests"
SQUARE = [(100, 100), (200, 100), (200, 200), (100, 200), (100, 100)]


def minimal(folder, make):
    for name in ("slide-1", "slide-2"):
        make.tissue_slide(folder / f"{name}.tif")


def annotated(folder, make):
    for name in ("slide-1", "slide-2", "slide-3"):
        make.tissue_slide(folder / f"{name}.tif")
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}}
    feature["properties"] = {"classification": {"name": "IDC"}}
    (folder / "slide-1.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    corners = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in enumerate(SQUARE[:4]))
    (folder / "slide-2.xml").write_text(
        f'<ASAP_Annotations><Annotations><Annotation Name="1" Type="Polygon" PartOfGroup="IDC"><Coordinates>{corners}'
        '</Coordinates></Annotation></Annotations><AnnotationGroups><Group Name="IDC" PartOfGroup="None"/>'
        "</AnnotationGroups></ASAP_Annotations>"
    )
    mask = np.zeros((400, 500), np.uint8)
    mask[100:200, 100:200] = 255
    Image.fromarray(mask).save(folder / "slide-3-mask.png")


def pictures(folder, make):
    pixels = np.full((300, 300, 3), 244, np.uint8)
    pixels[60:240, 60:240] = make.texture(180, 180)
    Image.fromarray(pixels).save(folder / "thumbnail-1.png")
    make.tissue_slide(folder / "scan-2.tif", 2000, 2000, mpp=0.005)
    Image.new("L", (200, 200), 255).save(folder / "scan-2-tissue.png")


def idc_patches(folder, make):
    for patient in ("8863", "8865"):
        place = folder / patient / "1"
        place.mkdir(parents=True)
        Image.fromarray(make.texture(50, 50)).save(place / f"{patient}_idx5_x51_y1_class1.png")


MAKERS = {"minimal": minimal, "annotated": annotated, "pictures": pictures, "idc-patches": idc_patches}


def test_each_sample_has_its_test():
    assert {path.stem for path in SAMPLES.glob("*.csv")} == set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_the_sample_is_extracted(name, tmp_path, make, recorder):
    MAKERS[name](tmp_path, make)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text((SAMPLES / f"{name}.csv").read_text())
    rows = read_manifest(manifest)
    summary = extract(rows, tmp_path / "tiles.zarr", ExtractSettings(), listener=recorder)
    assert summary.failures == {}
    store = open_store(tmp_path / "tiles.zarr")
    assert all(store.slide(row.slide_id).count > 0 for row in rows)
    if name == "annotated":
        for row in rows:
            slide = store.slide(row.slide_id)
            inside = ((slide.cell >= 2) & (slide.cell < 4)).all(axis=1)
            assert np.array_equal(slide.idc, inside.astype(np.float32))
            assert (slide.patient_id, slide.split) == (row.patient_id, row.split)


def test_a_slide_that_misses_a_file_fails_alone(tmp_path, make, recorder):
    annotated(tmp_path, make)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text((SAMPLES / "annotated.csv").read_text())
    (tmp_path / "slide-1.geojson").unlink()
    (tmp_path / "slide-2.tif").unlink()
    summary = extract(read_manifest(manifest), tmp_path / "tiles.zarr", ExtractSettings(), listener=recorder)
    assert sorted(summary.failures) == ["case-1a", "case-2a"]
    assert "annotation 'slide-1.geojson': no such file" in summary.failures["case-1a"]
    assert "no such file or folder (looked for" in summary.failures["case-2a"]
    assert open_store(tmp_path / "tiles.zarr").slide_ids() == ["case-3a"]
