"""The readers give the same pixels, and tiatoolbox's own tiles, on every real slide that they can open.

Where tiles are stored pixels all are equal to the last bit. Where they are resampled our readers still are, since
`reader.py` does it for all of them; tiatoolbox's own `read_rect` then differs: it reads whole pixels and shrinks them
by areas (OpenCV), where ours weights a real-valued rectangle by a triangle (Pillow).
"""

from typing import NamedTuple

import numpy as np
import pytest

from wsi_idc.errors import SlideError
from wsi_idc.grid import Grid
from wsi_idc.reader import choose_source, read_tiles
from wsi_idc.settings import TileSpec
from wsi_idc.slides import open_slide

SIDE = 128
MEAN_LEVELS, MOST_LEVELS = 2.5, 60
"""Grey levels by which resampled tiles may differ from tiatoolbox's; measured: mean 0.3 to 2.3, most 53."""


class Real(NamedTuple):
    mpp: float | None
    readers: tuple[str, ...]
    """What opens it, in the words of the description: auto, openslide, tiatoolbox; "" where it is refused."""


REAL = {
    "CMU-1-Small-Region.svs": Real(None, ("OpenSlide", "OpenSlide", "tiatoolbox OpenSlide")),
    "CMU-1-Small-Region.jpeg.tiff": Real(0.499, ("OpenSlide", "OpenSlide", "tiatoolbox TIFF")),
    "CMU-1-Small-Region.webp.tiff": Real(0.499, ("tiatoolbox TIFF", "", "tiatoolbox TIFF")),
    "dicom/CMU-1-Small-Region": Real(None, ("tiatoolbox DICOM (wsidicom)", "", "tiatoolbox DICOM (wsidicom)")),
    "dicom/wsi2dcm": Real(None, ("OpenSlide", "OpenSlide", "tiatoolbox DICOM (wsidicom)")),
    "fluorescence-387.ndpi": Real(None, ("OpenSlide", "OpenSlide", "tiatoolbox OpenSlide")),
}
READERS = ("auto", "openslide", "tiatoolbox")


def some_tiles(path, real, reader, factor):
    """Every third tile at level-0 um/px times a factor, where each lies, and whether they are stored pixels."""

    def opener():
        return open_slide(path, real.mpp, reader)

    with opener() as slide:
        grid = Grid(TileSpec(size_px=SIDE, mpp=slide.mpp[0] * factor, last="drop"), slide.size, slide.mpp)
        stored = choose_source(slide, grid).stored
    cells = grid.cells()[::3]
    tiles = np.concatenate(list(read_tiles(opener, grid, cells, batch=64, threads=2)))
    return tiles, grid.position(cells), stored


@pytest.mark.parametrize("name", REAL)
def test_each_reader_names_itself_or_refuses(shared_data, name):
    for reader, expected in zip(READERS, REAL[name].readers, strict=True):
        if not expected:
            with pytest.raises(SlideError, match="Unsupported"):
                open_slide(shared_data / "slides" / name, REAL[name].mpp, reader)
            continue
        with open_slide(shared_data / "slides" / name, REAL[name].mpp, reader) as slide:
            assert slide.description.reader == expected


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.3])
def test_all_readers_give_the_same_tiles(shared_data, name, factor):
    path, real = shared_data / "slides" / name, REAL[name]
    first, _, _ = some_tiles(path, real, "auto", factor)
    for reader, opens in zip(READERS[1:], real.readers[1:], strict=True):
        if opens:
            assert np.array_equal(some_tiles(path, real, reader, factor)[0], first)


def own_reader(path):
    """tiatoolbox's reader as a user of tiatoolbox gets it."""
    from wsi_idc.slides.toolbox import toolbox

    readers = toolbox()
    return readers.DICOMWSIReader(path) if path.is_dir() else readers.WSIReader.open(path)


# tiatoolbox refuses dicom/wsi2dcm, which has no Manufacturer tag.
@pytest.mark.parametrize("name", [name for name in REAL if name != "dicom/wsi2dcm"])
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.3])
def test_tiles_are_tiatoolboxs_own_to_the_bit_where_stored_and_nearly_where_resampled(shared_data, name, factor):
    path = shared_data / "slides" / name
    tiles, positions, stored = some_tiles(path, REAL[name], "auto", factor)
    own = own_reader(path)
    theirs = np.stack(
        [
            own.read_rect(tuple(place), (SIDE, SIDE), resolution=1 / factor, units="baseline")
            for place in positions.tolist()
        ]
    )
    differences = np.abs(tiles.astype(int) - theirs)
    if stored:
        assert not differences.any()
    else:
        assert differences.mean() <= MEAN_LEVELS
        assert differences.max() <= MOST_LEVELS


def test_tiles_are_those_of_tiatoolboxs_patch_extractor(shared_data):
    from tiatoolbox.tools.patchextraction import SlidingWindowPatchExtractor

    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    extractor = SlidingWindowPatchExtractor(
        own_reader(path), patch_size=(SIDE, SIDE), resolution=0, units="level", within_bound=True
    )
    with open_slide(path) as slide:
        grid = Grid(TileSpec(size_px=SIDE, mpp=slide.mpp[0], last="drop"), slide.size, slide.mpp)
    cells = grid.cells()
    tiles = np.concatenate(list(read_tiles(lambda: open_slide(path), grid, cells, batch=64)))
    theirs = {tuple(bounds[:2]): number for number, bounds in enumerate(extractor.coordinate_list.tolist())}
    assert len(theirs) == len(tiles)
    for place, tile in list(zip(grid.position(cells).tolist(), tiles, strict=True))[::5]:
        assert np.array_equal(tile, extractor[theirs[tuple(place)]])


# --- formats without a real slide ---------------------------------------------------------------------------------


def test_a_plain_pyramidal_tiff_is_not_held_whole_by_tiatoolbox(tmp_path, make):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(600, 500), mpp=0.5, downs=(1, 4))
    plain = make_plain(tmp_path / "b.tif", path)
    for file in (path, plain):
        with open_slide(file, reader="tiatoolbox") as mine, open_slide(file) as auto:
            assert mine.description.reader == ("tiatoolbox TIFF" if file is path else "tiatoolbox OpenSlide")
            assert mine.mpp == pytest.approx((0.5, 0.5))
            assert [level.size for level in mine.levels] == [(600, 500), (150, 125)]
            for level in (0, 1):
                assert np.array_equal(mine.read(level, 7, 9, 90, 80), auto.read(level, 7, 9, 90, 80))


def make_plain(path, source):
    """The same levels as a TIFF that is not Big."""
    import tifffile

    with tifffile.TiffFile(source) as tif, tifffile.TiffWriter(path) as out:
        for number, page in enumerate(tif.pages):
            place = {"resolution": page.resolution, "resolutionunit": "CENTIMETER", "metadata": None}
            options = {"tile": (128, 128), "photometric": "rgb", "compression": "adobe_deflate"}
            out.write(page.asarray(), subfiletype=int(number > 0), **options, **place)
    return path


@pytest.mark.parametrize("sizes", [((1500, 1203), (375, 300)), ((1501, 1203), (500, 401))])
def test_levels_of_an_uneven_downsample_are_read_at_their_own_pixels(tmp_path, make, sizes):
    """tiatoolbox's TIFF reader takes them as they are; OpenSlide blends neighbours by the part of a pixel left over."""
    import tifffile

    path, levels = tmp_path / "a.tif", [make.texture(*size, seed=n) for n, size in enumerate(sizes)]
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for number, pixels in enumerate(levels):
            out.write(pixels, tile=(128, 128), photometric="rgb", subfiletype=number, metadata=None)
    with open_slide(path, 0.5, "tiatoolbox") as slide:
        for x, y in ((0, 0), (100, 77), (131, 200), (300, 250)):
            assert np.array_equal(slide.read(1, x, y, 50, 50), levels[1][y : y + 50, x : x + 50])
    with open_slide(path, 0.5, "openslide") as slide:
        for x, y in ((0, 0), (100, 77), (131, 200), (300, 250)):
            difference = slide.read(1, x, y, 50, 50).astype(int) - levels[1][y : y + 50, x : x + 50]
            assert np.abs(difference).mean() <= 4


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_pictures_are_the_same_by_tiatoolbox(tmp_path, make, name):
    from PIL import Image

    Image.fromarray(make.texture(200, 150)).save(tmp_path / name)
    with (
        open_slide(tmp_path / name, 4.0) as auto,
        open_slide(tmp_path / name, 4.0, "tiatoolbox") as mine,
    ):
        assert mine.description.reader == "tiatoolbox virtual"
        assert mine.shared
        assert np.array_equal(mine.read(0, 3, 5, 190, 140), auto.read(0, 3, 5, 190, 140))


@pytest.mark.parametrize("reader", ["openslide", "tiatoolbox"])
def test_a_reader_that_does_not_know_the_format_says_so(tmp_path, make, reader):
    from PIL import Image

    place = tmp_path / "8863" / "0"
    place.mkdir(parents=True)
    Image.fromarray(make.texture(50, 50)).save(place / "8863_idx5_x1_y1_class0.png")
    with pytest.raises(SlideError, match=f"{reader} reads no folder of patches; leave --reader out"):
        open_slide(tmp_path / "8863", reader=reader)
    Image.fromarray(make.texture(50, 50)).save(tmp_path / "a.png")
    (tmp_path / "a.svs").write_bytes(b"none")
    with pytest.raises(SlideError, match="cannot be opened as a slide"):
        open_slide(tmp_path / ("a.png" if reader == "openslide" else "a.svs"), 4.0, reader)
