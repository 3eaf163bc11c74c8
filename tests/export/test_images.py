"""Maps as images: every reader at hand finds the same values at the same place."""

import json
import warnings

import numpy as np
import pytest
import tifffile
import zarr

from wsi_idc.export.export import export, format_of
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.results import choose_model, look
from wsi_idc.settings import ExportSettings, ExtractSettings, InferSettings, TileSpec
from wsi_idc.store import open_store

NGFF = ["ngff", "ngff-0.4"]


def result_of(store, slide_id="a"):
    return look(store, choose_model(store, None), slide_id)


@pytest.fixture
def written(store, tmp_path):
    """Writes slide a's map in a format; gives where it lies."""

    def write(kind, result=None):
        module = format_of(kind)
        path = tmp_path / f"a{module.SUFFIX}"
        assert module.write(result or result_of(store), path) == []
        return path

    return write


def ome_of(path):
    (image,) = (tifffile.xml2dict(tifffile.TiffFile(path).ome_metadata)["OME"]["Image"],)
    return image


def test_an_ome_tiff_has_the_map_its_size_and_its_place(store, written):
    path = written("ome-tiff")
    assert np.array_equal(tifffile.imread(path), result_of(store).image, equal_nan=True)
    image = ome_of(path)
    pixels = image["Pixels"]
    assert (pixels["Type"], pixels["SizeX"], pixels["SizeY"]) == ("float", 10, 8)
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeY"], pixels["PhysicalSizeXUnit"]) == (200, 200, "µm")
    assert (pixels["Plane"]["PositionX"], pixels["Plane"]["PositionY"]) == (98, 98)
    assert pixels["Channel"]["Name"] == "P(IDC)"
    assert "Research use only" in image["Description"]


def test_a_large_ome_tiff_has_coarser_levels_that_pass_over_what_has_no_value(store, written):
    result = result_of(store)
    image = np.full((601, 300), np.nan, np.float32)
    image[:3, :2] = [[0.2, 0.4], [np.nan, 0.6], [1.0, np.nan]]
    result.image = image
    with tifffile.TiffFile(written("ome-tiff", result)) as tif:
        levels = [level.asarray() for level in tif.series[0].levels]
    assert [level.shape for level in levels] == [(601, 300), (301, 150), (151, 75)]
    assert levels[1][0, 0] == pytest.approx(0.4) and levels[1][1, 0] == 1
    assert levels[2][0, 0] == pytest.approx(0.7)
    assert np.isnan(levels[1]).sum() == 301 * 150 - 2


def test_names_that_xml_would_misread_are_text(store, written, monkeypatch):
    result = result_of(store)
    result.model = '<b a="1">&\''
    assert ome_of(written("ome-tiff", result))["Name"] == 'P(IDC) <b a="1">&\''


@pytest.mark.parametrize("kind", NGFF)
def test_an_ome_zarr_is_valid_and_has_the_map(store, written, kind):
    from yaozarrs import validate_zarr_store

    path = written(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate_zarr_store(str(path))
    group = zarr.open_group(path, mode="r")
    assert group.metadata.zarr_format == (3 if kind == "ngff" else 2)
    assert np.array_equal(group["0"][:], result_of(store).image, equal_nan=True)
    assert "Research use only" in group.attrs["use"] and "patient_id" not in str(dict(group.attrs))


@pytest.mark.parametrize("kind", NGFF)
def test_ome_zarrs_reader_finds_values_place_and_limits(store, written, kind):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    (node,) = Reader(parse_url(written(kind)))()
    assert np.array_equal(node.data[0].compute(), result_of(store).image, equal_nan=True)
    assert node.metadata["coordinateTransformations"] == [
        [{"type": "scale", "scale": [200.0, 200.0]}, {"type": "translation", "translation": [98.0, 98.0]}]
    ]
    assert node.metadata["contrast_limits"] == [[0.0, 1.0]] and node.metadata["channel_names"] == ["P(IDC)"]


def test_the_store_and_the_export_say_the_same(store, written):
    exported = zarr.open_group(written("ngff"), mode="r").attrs["ome"]
    assert exported == store.map("mean", "a").attributes["ome"]
    older = json.loads((written_04 := written("ngff-0.4") / ".zattrs").read_text())
    (image,) = exported["multiscales"]
    assert older["multiscales"] == [{"version": "0.4", **image}], written_04
    assert older["omero"]["channels"] == exported["omero"]["channels"]


def test_ome_zarr_models_knows_them_where_it_is_installed(written, store):
    models = pytest.importorskip("ome_zarr_models.v05.image")
    for place in (written("ngff"), store.backing.folder / store.map_node("mean", "a").path):
        image = models.Image.from_zarr(zarr.open_group(place, mode="r"))
        assert image.ome_attributes.multiscales[0].datasets[0].path == "0"


def test_a_map_without_tissue_has_limits_all_the_same(make, slides, bundle, recorder, tmp_path):
    make.write_tiff(slides.parent / "a.tif", np.full((400, 500, 3), 244, np.uint8))
    extract(read_manifest(slides)[:1], tmp_path / "s.zarr", ExtractSettings(), listener=recorder)
    infer(tmp_path / "s.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
    summary = export(
        tmp_path / "s.zarr", None, ExportSettings(formats=("ome-tiff", *NGFF), out=tmp_path / "o"), listener=recorder
    )
    assert summary.done == 1
    assert np.isnan(tifffile.imread(tmp_path / "o/ome-tiff/a.ome.tif")).all()
    for found in (
        zarr.open_group(tmp_path / "o/ngff/a.ome.zarr", mode="r").attrs["ome"],
        open_store(tmp_path / "s.zarr").map("mean", "a").attributes["ome"],
    ):
        (channel,) = found["omero"]["channels"]
        assert channel["window"] == {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0}
        assert channel["active"] is True and len(channel["color"]) == 6


def test_of_several_classes_the_positive_one_is_exported(make, slides, recorder, tmp_path):
    bundle = make.write_bundle(tmp_path / "three", outputs=3, classes=["stroma", "fat", "tumour"], positive="fat")
    extract(read_manifest(slides)[:1], tmp_path / "s.zarr", ExtractSettings(), listener=recorder)
    infer(tmp_path / "s.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
    found = open_store(tmp_path / "s.zarr").map("mean", "a")
    labels = [channel["label"] for channel in found.attributes["ome"]["omero"]["channels"]]
    assert labels == ["P(stroma)", "P(fat)", "P(tumour)"]
    export(tmp_path / "s.zarr", None, ExportSettings(formats=("ngff",), out=tmp_path / "o"), listener=recorder)
    group = zarr.open_group(tmp_path / "o/ngff/a.ome.zarr", mode="r")
    assert np.array_equal(group["0"][:], found.read("0")[1], equal_nan=True)
    assert [channel["label"] for channel in group.attrs["ome"]["omero"]["channels"]] == ["P(fat)"]


def test_where_tiles_overlap_a_pixel_is_the_stride_and_lies_at_its_tiles_centre(slides, bundle, recorder, tmp_path):
    settings = ExtractSettings(tile=TileSpec(stride_px=25))
    extract(read_manifest(slides)[:1], tmp_path / "s.zarr", settings, listener=recorder)
    infer(tmp_path / "s.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
    export(tmp_path / "s.zarr", None, ExportSettings(formats=("ome-tiff",), out=tmp_path / "o"), listener=recorder)
    pixels = ome_of(tmp_path / "o/ome-tiff/a.ome.tif")["Pixels"]
    assert (pixels["PhysicalSizeX"], pixels["Plane"]["PositionX"]) == (100, 98)
