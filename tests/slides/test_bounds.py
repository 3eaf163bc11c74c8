"""Where a file says that only a part of it is the slide, that part is the slide: MIRAX, Leica."""

import numpy as np
import pytest
import tifffile

from wsi_idc.grid import Grid
from wsi_idc.reader import read_tiles
from wsi_idc.settings import TileSpec
from wsi_idc.slides import open_slide


@pytest.fixture
def bounded(tmp_path, make, monkeypatch):
    """Gives a slide of 1024 x 768 px and levels of 1 and 4 whose properties have the bounds given, and its pixels."""
    import openslide

    levels = [make.texture(1024, 768), make.texture(256, 192, seed=1)]
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as out:
        for number, pixels in enumerate(levels):
            out.write(
                pixels,
                tile=(128, 128),
                photometric="rgb",
                compression="adobe_deflate",
                subfiletype=int(bool(number)),
                resolution=(2e4 / 4**number,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    plain = openslide.OpenSlide.properties

    def bind(x, y, width, height):
        names = ("x", "y", "width", "height")
        added = {
            f"openslide.bounds-{name}": str(value) for name, value in zip(names, (x, y, width, height), strict=True)
        }
        monkeypatch.setattr(
            openslide.OpenSlide, "properties", property(lambda self: {**plain.__get__(self, type(self)), **added})
        )
        return path

    return bind, levels


@pytest.mark.parametrize("reader", ["auto", "openslide"])
def test_the_bounds_are_the_slide_at_every_level(bounded, reader):
    bind, levels = bounded
    with open_slide(bind(200, 101, 600, 401), reader=reader) as slide:
        assert (slide.origin, slide.size) == ((200, 101), (600, 401))
        assert [level.size for level in slide.levels] == [(600, 401), (150, 100)]
        assert [level.downsample for level in slide.levels] == [(1.0, 1.0), (4.0, 4.0)]
        assert np.array_equal(slide.read(0, 0, 0, 600, 401), levels[0][101:502, 200:800])
        # The level begins at the whole pixel nearest to the corner, so that its stored pixels are given.
        assert np.array_equal(slide.read(1, 10, 20, 100, 50), levels[1][45:95, 60:160])
        assert (slide.read(0, 590, 390, 20, 20)[11:] == 255).all()


def test_tiles_and_positions_count_from_the_bounds(bounded):
    bind, levels = bounded
    path = bind(200, 101, 600, 401)
    with open_slide(path) as slide:
        grid = Grid(TileSpec(size_px=64, mpp=0.5, last="drop"), slide.size, slide.mpp)
    tiles = np.concatenate(list(read_tiles(lambda: open_slide(path), grid, grid.cells(), batch=8)))
    for (x, y), tile in zip(grid.position(grid.cells()).tolist(), tiles, strict=True):
        assert np.array_equal(tile, levels[0][101 + y : 165 + y, 200 + x : 264 + x])


def test_tiatoolbox_reads_the_same_part(bounded):
    bind, levels = bounded
    path = bind(200, 101, 600, 401)
    path = path.rename(path.with_suffix(".svs"))
    with open_slide(path) as slide:
        expected = slide.read(0, 0, 0, 600, 401)
    with open_slide(path, reader="tiatoolbox") as slide:
        assert (slide.description.reader, slide.origin) == ("tiatoolbox OpenSlide", (200, 101))
        assert np.array_equal(slide.read(0, 0, 0, 600, 401), expected)
        assert np.array_equal(slide.read(1, 10, 20, 100, 50), levels[1][45:95, 60:160])


@pytest.mark.parametrize("bounds", [(0, 0, 1024, 768), (900, 700, -5, 3), (2000, 0, 10, 10), ("a", 0, 1, 1)])
def test_bounds_that_say_nothing_leave_the_file_as_it_is(bounded, bounds):
    bind, _ = bounded
    with open_slide(bind(*bounds)) as slide:
        assert (slide.origin, slide.size) == ((0, 0), (1024, 768))


def test_bounds_beyond_the_file_end_with_it(bounded):
    bind, _ = bounded
    with open_slide(bind(1000, -10, 500, 800)) as slide:
        assert (slide.origin, slide.size) == ((1000, 0), (24, 768))
        assert slide.levels[1].size == (6, 192)
