"""Every format opens with the um/px that it really has, or is refused with one line that says why."""

import json
import struct

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from wsi_idc.errors import RegionError, ResolutionError, SlideError
from wsi_idc.slides import detect, open_slide


def test_reading_beyond_the_edge_gives_background(tmp_path, make):
    pixels = make.texture(200, 150)
    with open_slide(make.write_tiff(tmp_path / "a.tif", pixels)) as slide:
        region = slide.read(0, -10, 100, 60, 100)
        assert np.array_equal(region[:50, 10:], pixels[100:, :50])
        assert (region[:, :10] == 255).all() and (region[50:] == 255).all()
        assert (slide.read(0, 500, 500, 5, 4) == 255).all()


def test_transparent_regions_are_background(tmp_path):
    pixels = np.zeros((60, 60, 4), np.uint8)
    pixels[:30, :, 0], pixels[:30, :, 3] = 200, 255
    pixels[30:45, :, 3] = 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", 4.0) as slide:
        region = slide.read(0, 0, 0, 60, 60)
    assert region.shape == (60, 60, 3)
    assert (region[:30] == (200, 0, 0)).all()
    assert (region[30:45] == 127).all()
    assert (region[45:] == 255).all()


def test_the_manifests_resolution_wins_with_a_warning(tmp_path, make):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(200, 200), mpp=4.0)
    with open_slide(path, 4.1) as slide:
        assert (slide.mpp, slide.mpp_source, slide.warnings) == ((4.1, 4.1), "given", [])
    with open_slide(path, 4.5) as slide:
        assert slide.warnings == ["um/px 4.5 given, the file says 4 (TIFF resolution tag)"]


@pytest.mark.parametrize("mpp", [None, 0.001, 400.0])
def test_a_resolution_that_is_absent_or_impossible_is_an_error(tmp_path, make, mpp):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(200, 200), mpp=mpp)
    with pytest.raises(ResolutionError, match="--mpp"):
        open_slide(path)
    with open_slide(path, 0.5) as slide:
        assert slide.mpp == (0.5, 0.5)


def test_the_thumbnail_is_area_averaged_and_its_resolution_is_told(tmp_path, make):
    pixels = make.texture(640, 320)
    with open_slide(make.write_tiff(tmp_path / "a.tif", pixels, mpp=1.0)) as slide:
        thumbnail, mpp = slide.thumbnail(8.0)
    assert (thumbnail.shape, mpp) == ((40, 80, 3), 8.0)
    averaged = pixels.reshape(40, 8, 80, 8, 3).mean((1, 3))
    assert np.abs(thumbnail - averaged).max() <= 1


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_thumbnails_pixels_are_pillows_reduction_to_the_last_bit(tmp_path, make, factor):
    pixels = np.random.default_rng(0).integers(0, 256, (103, 205, 3), dtype=np.uint8)
    with open_slide(make.write_tiff(tmp_path / "a.tif", pixels, mpp=8.0 / factor)) as slide:
        thumbnail, mpp = slide.thumbnail(8.0)
        stored = slide.read(0, 0, 0, 205, 103)
    assert mpp == 8.0
    assert np.array_equal(thumbnail, np.asarray(Image.fromarray(stored).reduce(factor)))


def test_the_thumbnail_of_a_slide_without_levels_is_read_strip_by_strip(tmp_path, make, monkeypatch):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(128, 2600), mpp=4.0)
    heights = []
    with open_slide(path) as slide:
        plain = type(slide).read

        def watching(self, level, x, y, width, height):
            heights.append(height)
            return plain(self, level, x, y, width, height)

        monkeypatch.setattr(type(slide), "read", watching)
        thumbnail, _ = slide.thumbnail(8.0)
    assert thumbnail.shape == (1300, 64, 3)
    assert max(heights) <= 1024 and sum(heights) == 2600


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_needs_a_resolution_and_then_is_a_slide(tmp_path, make, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(make.texture(120, 90)).save(path)
    assert detect(path) == "slide"
    with pytest.raises(ResolutionError, match="no um/px"):
        open_slide(path)
    with open_slide(path, 8.0) as slide:
        assert (slide.size, slide.mpp) == ((120, 90), (8.0, 8.0))


def test_a_picture_too_large_to_hold_is_refused_before_it_is_decoded(tmp_path, make, monkeypatch):
    from wsi_idc.slides import arrays

    monkeypatch.setattr(arrays, "MAX_PICTURE_PIXELS", 1000)
    Image.fromarray(make.texture(120, 90)).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match="without levels of 120 x 90 pixels"):
        open_slide(tmp_path / "a.png", 4.0)


@pytest.mark.parametrize("guard", [89_478_485, None])
def test_pillows_guard_stays_as_it_is_and_is_not_needed(tmp_path, make, monkeypatch, guard):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", guard)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    Image.fromarray(make.texture(20, 20)).save(tmp_path / "b.png")
    with pytest.raises(SlideError, match=r"a picture without levels of .*more than 170 million"):
        open_slide(tmp_path / "a.png", 4.0)
    open_slide(tmp_path / "b.png", 4.0).close()
    assert guard == Image.MAX_IMAGE_PIXELS


def test_a_jpeg_2000_picture_has_the_resolution_of_its_box(tmp_path, make):
    pixels = make.texture(64, 48)
    path = tmp_path / "a.jp2"
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    # 'res ' with 'resc' in it: 500,000 pixels a metre, at the end of the header box 'jp2h'.
    capture = struct.pack(">I4sHHHHbb", 18, b"resc", 5, 1, 5, 1, 5, 5)
    box = struct.pack(">I4s", 8 + len(capture), b"res ") + capture
    place = content.index(b"jp2h") - 4
    length = struct.unpack(">I", content[place : place + 4])[0]
    path.write_bytes(
        content[:place]
        + struct.pack(">I", length + len(box))
        + content[place + 4 : place + length]
        + box
        + content[place + length :]
    )
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((2.0, 2.0))
        assert slide.mpp_source == "JPEG 2000 resolution box"
        assert np.array_equal(slide.read(0, 0, 0, 64, 48), pixels)


def test_16_bit_pictures_are_refused_and_not_clipped(tmp_path):
    Image.fromarray(np.full((20, 20), 999, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match="pixels are uint16 with 1 channel"):
        open_slide(tmp_path / "a.png", 4.0)


def test_a_plain_pyramidal_jpeg_tiff_is_read_by_regions_with_its_resolution(tmp_path, make):
    """Not Big, tiled, JPEG: tiatoolbox alone would load it whole, without um/px."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as out:
        for down in (1, 4):
            level = make.texture(1024 // down, 768 // down)
            out.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                subfiletype=int(down > 1),
                resolution=(1e4 / 0.5 / down,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    with open_slide(path) as slide:
        assert slide.description.reader == "OpenSlide"
        assert [level.size for level in slide.levels] == [(1024, 768), (256, 192)]
        assert slide.mpp == pytest.approx((0.5, 0.5), rel=1e-6)


@pytest.mark.parametrize("compression", ["webp", "jpeg2000"])
def test_tiffs_that_openslide_cannot_read_go_to_tiatoolbox(tmp_path, make, compression):
    pixels = make.texture(300, 260)
    options = {"level": 100} if compression == "webp" else {"reversible": True, "level": 0}
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        pixels,
        bigtiff=True,
        tile=(128, 128),
        photometric="rgb",
        compression=compression,
        metadata=None,
        compressionargs={"lossless": True} if compression == "webp" else options,
        resolution=(5000.0, 5000.0),
        resolutionunit="CENTIMETER",
    )
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((2.0, 2.0))
        assert np.array_equal(slide.read(0, 30, 40, 200, 150), pixels[40:190, 30:230])


def test_an_ome_tiff_has_the_resolution_of_its_xml(tmp_path, make):
    pixels = make.texture(300, 260)
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    metadata |= {"PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", metadata=metadata, ome=True, compression="lzw")
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5))
        assert np.array_equal(slide.read(0, 0, 0, 300, 260), pixels)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("axes", ["cyx", "tczyx"])
def test_ome_ngff_of_both_versions(tmp_path, make, zarr_format, axes):
    pixels = make.texture(300, 260)
    path = tmp_path / "a.ome.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    planes = np.moveaxis(pixels, -1, 0)
    lead = len(axes) - 3
    shaped = planes.reshape((1, 3, 1, *planes.shape[1:])) if lead else planes
    group.create_array("0", data=shaped, chunks=(*shaped.shape[:-2], 128, 128))
    scale = [1.0] * (len(axes) - 2) + [0.5, 0.25]
    named = [{"name": name, "type": "space", "unit": "micrometer"} for name in axes]
    transforms = [{"type": "scale", "scale": scale}]
    image = {"axes": named, "datasets": [{"path": "0", "coordinateTransformations": transforms}]}
    group.attrs.put(
        {"multiscales": [image]} if zarr_format == 2 else {"ome": {"version": "0.5", "multiscales": [image]}}
    )
    assert detect(path) == "folder-slide"
    with open_slide(path) as slide:
        assert slide.mpp == (0.25, 0.5)
        assert np.array_equal(slide.read(0, 10, 20, 100, 90), pixels[20:110, 10:110])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.svs", b""),
        ("text.svs", b"not a slide at all"),
        ("a.mrxs", b"\xff\xd8\xff"),
        ("a.dcm", b"\0" * 128 + b"DICM"),
        ("a.png", b"\x89PNG\r\n"),
        ("a.jp2", b"\0"),
        ("a.xyz", b"?"),
    ],
)
def test_what_is_no_slide_is_refused_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SlideError) as caught:
        open_slide(path, 0.5)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_slide_and_an_empty_folder(tmp_path):
    with pytest.raises(SlideError, match="not found"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(SlideError, match="not a slide"):
        open_slide(tmp_path)
    assert detect(tmp_path) is None


def test_pixels_that_are_not_8_bit_rgb_are_refused(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    group.create_array("0", data=np.zeros((2, 64, 64), np.uint16), chunks=(1, 64, 64))
    axes = [{"name": name} for name in "cyx"]
    group.attrs.put({"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}})
    with pytest.raises(SlideError, match="uint16 with 2 channel"):
        open_slide(tmp_path / "a.zarr", 0.5)


REAL = {
    "CMU-1-Small-Region.svs": ((2220, 2967), 0.499),
    "CMU-1-Small-Region.jpeg.tiff": "um/px 0.00499",
    "CMU-1-Small-Region.webp.tiff": "um/px 0.00499",
    "dicom/CMU-1-Small-Region": ((2220, 2967), 0.499),
    "dicom/wsi2dcm": ((957, 715), 16.783),
    "fluorescence-387.ndpi": ((3968, 4864), 0.22818),
    "bad/broken.svs": "cannot be opened",
    "bad/unopenable.tiff": "compression",
    "bad/pathml_small_dicom.dcm": "cannot be opened",
    "bad/CMU-1-Saved-1_16.mrxs": "cannot be opened",
}


@pytest.mark.parametrize("name", REAL)
def test_real_slides_open_with_their_resolution_or_say_why_not(shared_data, name):
    path = shared_data / "slides" / name
    if isinstance(REAL[name], str):
        with pytest.raises(SlideError, match=REAL[name]) as caught:
            open_slide(path)
        assert "\n" not in str(caught.value)
        return
    size, mpp = REAL[name]
    with open_slide(path) as slide:
        assert slide.size == size
        assert slide.mpp == pytest.approx((mpp, mpp), rel=1e-3)
        assert slide.read(0, 0, 0, 64, 64).shape == (64, 64, 3)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.jpeg.tiff", "CMU-1-Small-Region.webp.tiff"])
def test_a_real_slide_with_a_wrong_resolution_opens_with_the_manifests(shared_data, name):
    with open_slide(shared_data / "slides" / name, 0.499) as slide:
        assert slide.size == (2220, 2967)
        assert slide.read(0, 1000, 1000, 64, 64).std() > 1


def test_the_same_real_slide_has_the_same_pixels_in_svs_and_dicom(shared_data):
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as svs:
        expected = svs.read(0, 700, 800, 300, 300)
    with open_slide(shared_data / "slides" / "dicom" / "CMU-1-Small-Region") as dicom:
        assert np.abs(dicom.read(0, 700, 800, 300, 300).astype(int) - expected).max() <= 2


def test_a_real_slide_that_breaks_on_reading_fails_with_coordinates(shared_data):
    with open_slide(shared_data / "slides" / "bad" / "unreadable.svs") as slide:
        for _ in range(2):
            with pytest.raises(RegionError, match="region at x 0, y 0"):
                slide.read(0, 0, 0, 16, 16)


def test_descriptions_can_be_shown_as_json(shared_data):
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        about = slide.description
    assert json.loads(json.dumps([about.format, about.objective, about.associated])) == [
        "aperio",
        20.0,
        ["label", "macro", "thumbnail"],
    ]
