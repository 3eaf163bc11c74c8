"""A slide's ICC profile is told of, and applied where that is asked for."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from wsi_idc.errors import SlideError
from wsi_idc.extract import extract, plan_slides
from wsi_idc.flags import flags
from wsi_idc.infer import infer
from wsi_idc.info import describe_slide, info_lines
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.slides import open_slide
from wsi_idc.store import open_store
from wsi_idc.store.slide import identity

ICC = ExtractSettings(icc=True)


def swapping_profile():
    """sRGB's profile with the colours of red and blue changed about: what it calls red is blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    places = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, blue = places[b"rXYZ"], places[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.fixture
def slide(tmp_path, make):
    """A slide at 4.0 um/px with a profile that changes red and blue about, and its manifest."""
    path = make.tissue_slide(tmp_path / "a.tif", iccprofile=swapping_profile())
    (tmp_path / "manifest.csv").write_text("path\na.tif\n")
    return path


def run(slide, recorder, settings=None):
    address = slide.parent / "tiles.zarr"
    rows = read_manifest(slide.parent / "manifest.csv")
    return extract(rows, address, settings or ExtractSettings(), listener=recorder), open_store(address)


@pytest.mark.parametrize("reader", ["auto", "tiatoolbox"])
def test_a_profile_is_applied_to_every_pixel_and_only_where_that_is_asked_for(slide, reader):
    with open_slide(slide, reader=reader) as plain, open_slide(slide, reader=reader, icc=True) as applied:
        assert plain.icc == applied.icc == "sRGB built-in"
        assert (plain.icc_applied, applied.icc_applied) == (False, True)
        raw, pixels = (opened.read(0, -20, 80, 200, 150) for opened in (plain, applied))
        assert abs(raw[..., ::-1].astype(int) - pixels).max() <= 1
        assert (pixels[:, :20] == pixels[0, 0]).all()  # beyond the slide: background, in the same colours
        assert abs(plain.thumbnail(8.0)[0][..., ::-1].astype(int) - applied.thumbnail(8.0)[0]).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_pictures_profile_is_found_too(tmp_path, make, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(make.texture(300, 200)).save(path, icc_profile=swapping_profile())
    with open_slide(path, 4.0) as plain, open_slide(path, 4.0, icc=True) as applied:
        raw, pixels = plain.read(0, 0, 0, 300, 200), applied.read(0, 0, 0, 300, 200)
        assert abs(raw[..., ::-1].astype(int) - pixels).max() <= 1


def test_a_slide_without_a_profile_is_read_as_it_is(tmp_path, make):
    path = make.tissue_slide(tmp_path / "a.tif")
    with open_slide(path) as plain, open_slide(path, icc=True) as asked:
        assert asked.icc is None and not asked.icc_applied
        assert np.array_equal(plain.read(0, 0, 0, 500, 400), asked.read(0, 0, 0, 500, 400))


@pytest.mark.parametrize("content", [b"x" * 200, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_a_profile_that_cannot_be_applied_fails_only_where_it_is_asked_for(tmp_path, make, content):
    path = make.tissue_slide(tmp_path / "a.tif", iccprofile=content)
    with open_slide(path) as opened:
        assert opened.icc
    with pytest.raises(SlideError, match=r"its ICC profile \(.*\) cannot be applied .*; leave --icc out"):
        open_slide(path, icc=True)


def test_extract_applies_it_to_tiles_and_thumbnail_and_says_so(slide, recorder, make):
    summary, store = run(slide, recorder)
    assert summary.notes == ("1 slide: an ICC profile is there and was not applied (--icc applies it)",)
    assert recorder.outcomes["a"].warnings == ()
    before = store.slide("a")
    raw, thumbnail = make.pixels_of(before), before.thumbnail
    assert before.attributes["icc"] == {"profile": "sRGB built-in", "applied": False}
    (flag,) = [flag for flag in flags(before) if flag.kind == "ICC profile"]
    assert "was not applied" in flag.reason
    summary, store = run(slide, recorder, ICC)
    assert summary.plans["a"].reason == "icc changed" and summary.notes == ()
    after = store.slide("a")
    assert after.attributes["icc"]["applied"] and after.identity != before.identity
    assert abs(raw[..., ::-1].astype(int) - make.pixels_of(after)).max() <= 1
    assert abs(thumbnail[..., ::-1].astype(int) - after.thumbnail).max() <= 1
    assert run(slide, recorder, ICC)[0].skipped == 1
    assert run(slide, recorder)[0].plans["a"].reason == "icc changed"


def test_a_store_from_before_that_setting_stays_as_it_is(slide, recorder):
    _, store = run(slide, recorder)
    path = Path(store.address) / "slides" / "a" / "zarr.json"
    document = json.loads(path.read_text())
    del document["attributes"]["complete"]["made_from"]["icc"]
    path.write_text(json.dumps(document))
    rows = read_manifest(slide.parent / "manifest.csv")
    for settings, reason in ((ExtractSettings(), "already done"), (ICC, "icc changed")):
        assert [slide.plan.reason for slide in plan_slides(rows, store, settings.cut(), force=False)] == [reason]


def test_without_pixels_infer_applies_it_and_a_slides_identity_says_so(slide, recorder, bundle):
    def scored(settings):
        _, store = run(slide, recorder, settings)
        infer(store.address, read_bundle(bundle), InferSettings(), listener=recorder)
        return store.slide("a"), store.map("mean", "a").read("probability")

    _, expected = scored(ICC)
    applied, probability = scored(ExtractSettings(icc=True, pixels=False))
    assert np.array_equal(probability, expected)
    plain, _ = scored(ExtractSettings(pixels=False))
    source = {"source": plain.made_from["source"], "reader": "auto"}
    cells = plain.attributes["complete"]["checksums"]["cell"]
    assert plain.identity == identity(plain.spec, plain.mpp, cells, source) != applied.identity


def test_info_names_the_profile(slide, tmp_path, make):
    fields = describe_slide(slide, None, ExtractSettings(), None)
    assert fields["icc"] == "sRGB built-in"
    assert "ICC         sRGB built-in (extract --icc applies it)" in info_lines(fields)
    other = describe_slide(make.tissue_slide(tmp_path / "b.tif"), None, ExtractSettings(), None)
    assert "ICC         none" in info_lines(other)


def test_a_dicom_slides_profile_is_read_by_both_readers(tmp_path, shared_data):
    import pydicom

    path = shared_data / "slides" / "dicom" / "wsi2dcm" / "wsi2dcm_jpeg.dcm"
    dataset = pydicom.dcmread(path)
    optical_path = pydicom.Dataset()
    optical_path.OpticalPathIdentifier, optical_path.ICCProfile = "0", swapping_profile()
    dataset.OpticalPathSequence = [optical_path]
    dataset.save_as(tmp_path / "a.dcm")
    for reader in ("openslide", "tiatoolbox"):
        with open_slide(tmp_path / "a.dcm", reader=reader) as plain:
            raw = plain.read(0, 100, 100, 300, 300)
            assert plain.icc == "sRGB built-in", reader
        with open_slide(tmp_path / "a.dcm", reader=reader, icc=True) as applied:
            assert abs(raw[..., ::-1].astype(int) - applied.read(0, 100, 100, 300, 300)).max() <= 1
