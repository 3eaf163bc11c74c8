"""A store in which slides are of every kind, and a page of it."""

import json

import numpy as np
import pytest

from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.report import write
from wsi_idc.settings import ExtractSettings, InferSettings

PATIENT = '<script>document.title="run"</script>'
LABEL = "a \"quoted\" 'label' & <b>more</b>"
RED = "\x1b[31mred\u202e"
"""What colours a terminal, and turns a line around."""


def _quoted(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.fixture(scope="session")
def kinds(make, tmp_path_factory):
    """A folder with `tiles.zarr`: a (labelled), b, c' (done), broken, glass (empty), old (stale), new (no map)."""
    folder = tmp_path_factory.mktemp("kinds")
    make.tissue_slide(folder / "a.tif", seed=1)
    make.tissue_slide(folder / "b.tif", 600, 500, seed=2)
    make.tissue_slide(folder / "c'.tif", 300, 300, 50, seed=3)
    make.damage(make.tissue_slide(folder / "broken.tif", seed=4))
    make.write_tiff(folder / "glass.tif", np.full((300, 400, 3), 244, np.uint8))
    make.tissue_slide(folder / "old.tif", seed=5)
    make.tissue_slide(folder / "new.tif", seed=6)
    square = [[[100, 100], [250, 100], [250, 300], [100, 300], [100, 100]]]
    feature = {
        "geometry": {"type": "Polygon", "coordinates": square},
        "properties": {"classification": {"name": "IDC"}},
    }
    (folder / "a.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature", **feature}]})
    )
    lines = {
        "a": "a.tif,p1,,a.geojson",
        "b": f"b.tif,{_quoted(PATIENT)},{_quoted(LABEL)},",
        "c": "c'.tif,p3,,",
        "broken": f"broken.tif,{RED},,",
        "glass": "glass.tif,p5,,",
        "old": "old.tif,p6,,",
        "new": "new.tif,p7,,",
    }
    manifest = folder / "manifest.csv"

    def cut(names, **settings):
        manifest.write_text("\n".join(["path,patient_id,label,annotation", *(lines[name] for name in names)]) + "\n")
        extract(read_manifest(manifest), folder / "tiles.zarr", ExtractSettings(**settings), listener=make.recorder())

    cut(["a", "b", "c", "broken", "glass", "old"])
    bundle = make.write_bundle(folder / "bundle", threshold=0.55, title="The <i>mean</i>")
    (bundle / "CARD.md").write_text(
        "# A card\n\n<script>document.title='run'</script>\n\n| side | tiles |\n|---|---|\n| train | 12 |\n\n"
        "[a link](https://elsewhere.example) ![a picture](https://elsewhere.example/x.png)\n"
    )
    infer(folder / "tiles.zarr", read_bundle(bundle), InferSettings(), listener=make.recorder())
    make.tissue_slide(folder / "old.tif", seed=7)
    cut(["old", "new"])
    return folder


@pytest.fixture(scope="session")
def page(kinds, tmp_path_factory):
    """The page of that store, by its bundle."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    write(kinds / "tiles.zarr", str(kinds / "bundle"), out)
    return out
