"""A slide that is cut short never passes for a whole one."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from wsi_idc.errors import DamageError, RegionError, SlideError, WsiIdcError
from wsi_idc.grid import Grid
from wsi_idc.reader import read_tiles
from wsi_idc.settings import TileSpec
from wsi_idc.slides import open_slide

CUTS = [0.02, 0.1, 0.35, 0.6, 0.8, 0.97, -1000, -100, -10, -2, -1]
"""What is left of a file: a part of it, or all but so many bytes."""


def cut(content, left):
    return content[: int(len(content) * left)] if left > 0 else content[:left]


def outcome(path, mpp=0.5):
    """ "failed", or the warnings that a slide comes with where all of it can be read."""

    def opener():
        return open_slide(path, mpp)

    try:
        with opener() as slide:
            grid = Grid(TileSpec(size_px=224, mpp=mpp), slide.size, slide.mpp)
            warnings = [line for line in slide.warnings if "given" not in line]
        for _ in read_tiles(opener, grid, grid.cells(), batch=64):
            pass
    except WsiIdcError:
        return "failed"
    return warnings


def write_pyramid(path, pixels, compression="jpeg", big=False):
    with tifffile.TiffWriter(path, bigtiff=big) as out:
        for down in (1, 2, 4):
            out.write(
                np.ascontiguousarray(pixels[::down, ::down]),
                tile=(256, 256),
                photometric="rgb",
                compression=compression,
                subfiletype=int(down > 1),
                resolution=(2e4 / down,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def write_ome(path, pixels):
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    metadata |= {"PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg"}
    with tifffile.TiffWriter(path, ome=True) as out:
        out.write(pixels, subifds=1, metadata=metadata, **options)
        out.write(np.ascontiguousarray(pixels[::2, ::2]), subfiletype=1, **options)
    return path


def write_picture(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


MADE = {
    "jpeg.tif": write_pyramid,
    "deflate.tif": lambda path, pixels: write_pyramid(path, pixels, "adobe_deflate", big=True),
    "plain.tif": lambda path, pixels: write_pyramid(path, pixels, None),
    "jpeg2000.tif": lambda path, pixels: write_pyramid(path, pixels, "jpeg2000", big=True),
    "a.ome.tif": write_ome,
    **{f"a.{suffix}": write_picture for suffix in ("png", "jpg", "jp2", "webp", "bmp", "tiff")},
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_left_of_a_slide_fails_or_is_told_of(tmp_path, make, name):
    path = MADE[name](tmp_path / name, make.texture(700, 600))
    assert outcome(path) == []
    content = path.read_bytes()
    for left in CUTS:
        path.write_bytes(cut(content, left))
        assert outcome(path) != [], left


@pytest.mark.parametrize(
    "name",
    [
        "CMU-1-Small-Region.svs",
        "CMU-1-Small-Region.jpeg.tiff",
        "CMU-1-Small-Region.webp.tiff",
        "fluorescence-387.ndpi",
        "dicom/CMU-1-Small-Region",
        "dicom/wsi2dcm",
    ],
)
def test_what_is_left_of_a_real_slide_fails_or_is_told_of(tmp_path, shared_data, name):
    source = shared_data / "slides" / name
    assert outcome(source) == []
    path = tmp_path / source.name
    whole = source
    if source.is_dir():
        path.mkdir()
        for file in source.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        whole = max(source.iterdir(), key=lambda file: file.stat().st_size)
    content = whole.read_bytes()
    for left in CUTS:
        (path / whole.name if source.is_dir() else path).write_bytes(cut(content, left))
        assert outcome(path) != [], left


def test_a_slide_cut_to_a_kilobyte_is_damaged(tmp_path, shared_data):
    for name in ("CMU-1-Small-Region.jpeg.tiff", "CMU-1-Small-Region.webp.tiff"):
        path = tmp_path / name
        path.write_bytes((shared_data / "slides" / name).read_bytes()[:1024])
        with pytest.raises(DamageError, match=r"cut short at byte 1,024: .*; copy or scan it again"):
            open_slide(path, 0.5)


def test_a_file_that_openslide_knows_and_cannot_open_is_read_by_no_other(tmp_path, make, monkeypatch):
    import openslide

    path = write_pyramid(tmp_path / "a.tif", make.texture(300, 300), "adobe_deflate", big=True)

    def broken(_):
        raise openslide.OpenSlideError("Cannot read TIFF directory 1")

    monkeypatch.setattr(openslide, "OpenSlide", type("Broken", (), {"__new__": lambda _, path: broken(path)}))
    openslide.OpenSlide.detect_format = staticmethod(lambda _: "generic-tiff")
    with pytest.raises(DamageError, match="knows it as generic-tiff and cannot open it: Cannot read TIFF directory 1"):
        open_slide(path)


def test_tiles_that_were_never_stored_are_told_of(tmp_path, make):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(512, 512))
    with tifffile.TiffFile(path) as tif:
        tags = [tif.pages[0].tags[name] for name in ("TileOffsets", "TileByteCounts")]
        places = [(tag.valueoffset, {3: 2, 4: 4, 16: 8}[int(tag.dtype)]) for tag in tags]
    content = bytearray(path.read_bytes())
    for place, width in places:
        content[place : place + 3 * width] = bytes(3 * width)
    path.write_bytes(content)
    with open_slide(path) as slide:
        assert slide.warnings == ["3 of the 16 stored tiles of page 0 are absent: not scanned?"]


def test_a_label_beyond_the_end_is_a_warning(tmp_path, make):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as out:
        place = {"photometric": "rgb", "metadata": None, "resolution": (2500, 2500), "resolutionunit": "CENTIMETER"}
        out.write(make.texture(300, 300), tile=(128, 128), **place)
        out.write(make.texture(60, 40), **place)
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[1].tags["StripOffsets"].valueoffset
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = struct.pack("<I", len(content) - 5)
    path.write_bytes(content)
    with open_slide(path) as slide:
        assert slide.warnings == ["the file is cut short: its picture on page 1 lies beyond its end"]
        assert slide.read(0, 0, 0, 300, 300).shape == (300, 300, 3)


def write_ngff(path, pixels, levels=1):
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.create_array("0", data=np.moveaxis(pixels, -1, 0), chunks=(3, 128, 128))
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "cyx"]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    datasets = [{"path": str(level), "coordinateTransformations": scale} for level in range(levels)]
    group.attrs.put({"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}})
    return path


def test_chunks_and_levels_that_are_missing_from_a_folder_are_told_of(tmp_path, make):
    path = write_ngff(tmp_path / "a.zarr", make.texture(300, 300))
    with open_slide(path) as slide:
        assert slide.warnings == []
    (path / "0" / "c" / "0" / "1" / "1").unlink()
    with open_slide(path) as slide:
        assert slide.warnings == ["1 of the 9 chunks of level 0 are not stored: they are read as 0"]
    with pytest.raises(DamageError, match="level '1' is missing"):
        open_slide(write_ngff(tmp_path / "b.zarr", make.texture(300, 300), levels=2))


# --- claims -------------------------------------------------------------------------------------------------------


def huge_tiff(path, side=1_000_000, tile=32_768):
    """A TIFF that claims a picture of `side` pixels, all of whose tiles are one and the same few bytes."""
    data = zlib.compress(bytes(2**20))
    count = (-(-side // tile)) ** 2
    tags = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 3, 8),
        (259, 3, 1, 8),
        (262, 3, 1, 2),
        (277, 3, 1, 3),
        (282, 5, 1, 0),
        (283, 5, 1, 0),
        (296, 3, 1, 3),
        (322, 4, 1, tile),
        (323, 4, 1, tile),
        (324, 4, count, 0),
        (325, 4, count, 0),
    ]
    table = 8 + 2 + 12 * len(tags) + 4
    bits, resolution = table, table + 6
    offsets = resolution + 8
    counts = offsets + 4 * count
    place = counts + 4 * count
    out = bytearray(b"II*\0" + struct.pack("<IH", 8, len(tags)))
    where = {258: bits, 282: resolution, 283: resolution, 324: offsets, 325: counts}
    for code, kind, number, value in tags:
        out += struct.pack("<HHII", code, kind, number, where.get(code, value))
    out += struct.pack("<I3HII", 0, 8, 8, 8, 20_000, 1)
    out += struct.pack(f"<{count}I", *[place] * count) + struct.pack(f"<{count}I", *[len(data)] * count) + data
    path.write_bytes(out)
    return path


def test_a_small_file_that_claims_a_huge_picture_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    path = huge_tiff(tmp_path / "a.tif", tile=4096)
    asked = []
    with open_slide(path, 0.5) as slide:
        assert slide.size == (1_000_000, 1_000_000)
        monkeypatch.setattr(type(slide), "read", lambda *arguments: asked.append(arguments))
        with pytest.raises(SlideError, match="would be 500 x 500 mm, larger than any slide; give the true um/px"):
            slide.thumbnail(8.0)
    assert asked == []


def test_a_tile_too_large_to_be_decoded_is_refused(tmp_path):
    with pytest.raises(SlideError, match="stores tiles of 32768 x 32768 px"):
        open_slide(huge_tiff(tmp_path / "a.tif", side=100_000), 0.5)


def test_what_a_thumbnail_reads_at_once_is_bounded(tmp_path, make, monkeypatch):
    path = huge_tiff(tmp_path / "a.tif", side=60_000, tile=1024)
    asked = []
    with open_slide(path, 0.5) as slide:

        def watching(self, level, x, y, width, height):
            asked.append(width * height)
            return np.zeros((height, width, 3), np.uint8)

        monkeypatch.setattr(type(slide), "read", watching)
        thumbnail, mpp = slide.thumbnail(8.0)
    assert (thumbnail.shape, mpp) == ((3750, 3750, 3), 8.0)
    assert max(asked) <= 1024 * 8192
    assert sum(asked) == 60_000**2


def test_more_pages_or_levels_than_a_slide_has_are_refused(tmp_path, make):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as out:
        for _ in range(4100):
            out.write(np.zeros((16, 16, 3), np.uint8), tile=(16, 16), photometric="rgb", metadata=None)
    with pytest.raises(SlideError, match="more than 4096 pages"):
        open_slide(path, 0.5)
    with pytest.raises(SlideError, match="names 100,000 levels, more than 64"):
        open_slide(write_ngff(tmp_path / "a.zarr", make.texture(300, 300), levels=100_000))


def test_pages_that_lead_in_a_circle_come_to_an_end(tmp_path, make):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as out:
        place = {"resolution": (2500, 2500), "resolutionunit": "CENTIMETER"}
        out.write(make.texture(300, 300), tile=(128, 128), photometric="rgb", metadata=None, **place)
    with tifffile.TiffFile(path) as tif:
        first, count = tif.pages[0].offset, len(tif.pages[0].tags)
    content = bytearray(path.read_bytes())
    content[first + 2 + 12 * count : first + 6 + 12 * count] = struct.pack("<I", first)
    path.write_bytes(content)
    try:
        with open_slide(path) as slide:
            assert slide.size == (300, 300)
    except SlideError as error:
        assert not isinstance(error, RegionError)
