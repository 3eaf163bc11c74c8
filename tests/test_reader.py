"""Tiles are exact, whatever is read with them."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsi_idc import reader
from wsi_idc.errors import RegionError, SlideError
from wsi_idc.grid import Grid
from wsi_idc.reader import SlidePool, check_fit, choose_source, read_tiles
from wsi_idc.settings import TileSpec
from wsi_idc.slides import open_slide


def read_all(path, spec, cells=None, mpp=None, **options):
    def opener():
        return open_slide(path, mpp)

    with opener() as slide:
        grid = Grid(spec, slide.size, slide.mpp)
    cells = grid.cells() if cells is None else cells
    parts = list(read_tiles(opener, grid, cells, **{"batch": 16, **options}))
    side = spec.size_px
    return grid, np.concatenate([np.empty((0, side, side, 3), np.uint8), *parts])


def test_at_a_stored_resolution_tiles_are_the_stored_pixels(tmp_path, make):
    pixels = make.texture(330, 270)
    grid, tiles = read_all(make.write_tiff(tmp_path / "a.tif", pixels), TileSpec())
    padded = np.full((300, 350, 3), 255, np.uint8)
    padded[:270, :330] = pixels
    for (row, column), tile in zip(grid.cells().tolist(), tiles, strict=True):
        assert np.array_equal(tile, padded[row * 50 : row * 50 + 50, column * 50 : column * 50 + 50])


def test_the_coarsest_level_that_is_fine_enough_is_read(tmp_path, make):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(2048, 1024), mpp=0.5, downs=(1, 4, 16))
    with open_slide(path) as slide:
        for mpp, level, stored in ((0.5, 0, True), (1.0, 0, False), (2.0, 1, True), (4.0, 1, False), (8.0, 2, True)):
            source = choose_source(slide, Grid(TileSpec(mpp=mpp), slide.size, slide.mpp))
            assert (source.level, source.stored) == (level, stored)


@pytest.mark.parametrize(
    ("tile", "block"), [((256, 240), (256, 240)), ((64, 1024), (192, 1024)), ((96, 512), (192, 512))]
)
def test_where_stored_tiles_are_decoded_one_by_one_a_block_is_hardly_more_than_one(tmp_path, make, tile, block):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(1200, 1100), compression="jpeg", tile=tile[::-1])
    with open_slide(path) as slide:
        assert slide.levels[0].block == tile
        assert choose_source(slide, Grid(TileSpec(), slide.size, slide.mpp)).block == block
        whole = slide.read(0, 0, 0, 1200, 1100)
    grid, tiles = read_all(path, TileSpec(last="drop"), threads=2)
    for (row, column), pixels in zip(grid.cells().tolist(), tiles, strict=True):
        assert np.array_equal(pixels, whole[row * 50 : row * 50 + 50, column * 50 : column * 50 + 50])


def test_a_level_within_a_percent_counts_as_fine_enough(tmp_path, make):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(640, 640), mpp=1.009, downs=(1, 4))
    with open_slide(path) as slide:
        assert choose_source(slide, Grid(TileSpec(mpp=4.0), slide.size, slide.mpp)).level == 1
        assert choose_source(slide, Grid(TileSpec(mpp=3.9), slide.size, slide.mpp)).level == 0


def test_resampling_is_antialiased(tmp_path, make):
    """A checkerboard of single pixels averages to grey: taking every fourth pixel would give black or white."""
    pixels = np.zeros((800, 800, 3), np.uint8)
    pixels[::2, ::2] = pixels[1::2, 1::2] = 255
    _, tiles = read_all(make.write_tiff(tmp_path / "a.tif", pixels, mpp=1.0), TileSpec())
    assert np.abs(tiles.astype(int) - 127.5).max() <= 1


def test_resampled_tiles_have_no_seam(tmp_path, make):
    """Tiles side by side are what resampling the whole slide at once gives."""
    pixels = make.texture(800, 600, seed=4)
    grid, tiles = read_all(make.write_tiff(tmp_path / "a.tif", pixels, mpp=1.0), TileSpec())
    whole = np.asarray(Image.fromarray(pixels).resize((200, 150), Image.Resampling.BILINEAR))
    rows, columns = grid.shape
    mosaic = tiles.reshape(rows, columns, 50, 50, 3).swapaxes(1, 2).reshape(rows * 50, columns * 50, 3)
    assert np.abs(mosaic.astype(int) - whole).max() <= 1


@settings(max_examples=40)
@given(data=st.data())
def test_tiles_at_half_the_size_are_pillows_to_the_bit(data):
    """Whole pixels or not, at the source's edge or within it, of noise or of the extremes."""
    size, left, top = (data.draw(st.integers(low, 9)) for low in (1, 0, 0))
    right, bottom = (data.draw(st.integers(0, 4)) for _ in range(2))
    part = data.draw(st.sampled_from([0.0, 0.25, 0.5]))
    shape = (top + 2 * size + bottom + 1, left + 2 * size + right + 1, 3)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = rng.choice(data.draw(st.sampled_from([np.arange(256), np.array([0, 255])])), shape).astype(np.uint8)
    box = (left + part, top + part, left + part + 2 * size, top + part + 2 * size)
    tile = np.empty((size, size, 3), np.uint8)
    reader._resample(pixels, box, tile)
    pillows = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=box)
    assert np.array_equal(tile, np.asarray(pillows))


def test_no_tile_at_half_the_size_is_left_to_pillow_but_at_the_edge(tmp_path, make, monkeypatch):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(1000, 800), mpp=2.0)
    expected = read_all(path, TileSpec(last="drop"))[1]
    slow, plain = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: slow.append(k["box"]) or plain(self, *a, **k))
    grid, tiles = read_all(path, TileSpec(last="drop"), threads=3)
    assert np.array_equal(tiles, expected)
    rows, columns = grid.shape
    assert len(slow) == len(grid) - (rows - 2) * (columns - 2)


@pytest.fixture(scope="module")
def odd_slide(tmp_path_factory, make):
    """A slide whose resolution fits nothing evenly, with a second level of an uneven downsample."""
    folder = tmp_path_factory.mktemp("odd")
    return make.write_tiff(folder / "odd.tif", make.texture(1500, 1203), mpp=0.737, downs=(1, 4))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_pixels_of_a_tile_do_not_depend_on_what_is_read_with_it(odd_slide, data):
    spec = TileSpec(size_px=data.draw(st.sampled_from([32, 50])), mpp=data.draw(st.sampled_from([0.737, 1.9, 3.1])))
    grid, tiles = read_all(odd_slide, spec)
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(len(grid))
    order = order[: data.draw(st.integers(1, 20))]
    _, some = read_all(
        odd_slide,
        spec,
        grid.cells()[order],
        batch=data.draw(st.integers(1, 40)),
        threads=data.draw(st.integers(1, 3)),
    )
    assert np.array_equal(some, tiles[order])


def test_the_size_of_blocks_does_not_show(odd_slide, monkeypatch):
    _, before = read_all(odd_slide, TileSpec(mpp=1.9))
    monkeypatch.setattr(reader, "BLOCK", 200)
    assert np.array_equal(read_all(odd_slide, TileSpec(mpp=1.9))[1], before)


def test_each_block_is_decoded_once_and_few_are_held(tmp_path, make, monkeypatch):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(2000, 2000))
    monkeypatch.setattr(reader, "BLOCK", 128)
    reads, lock = [], threading.Lock()
    with open_slide(path) as probe:
        cls = type(probe)
    plain = cls.read

    def counting(self, level, x, y, width, height):
        with lock:
            reads.append((level, x, y))
        return plain(self, level, x, y, width, height)

    monkeypatch.setattr(cls, "read", counting)
    held = []
    plain_request = reader._Blocks.request

    def watching(self, rectangles):
        needed = plain_request(self, rectangles)
        held.append(len(self._held))
        return needed

    monkeypatch.setattr(reader._Blocks, "request", watching)
    read_all(path, TileSpec(), threads=2)
    assert len(reads) == len(set(reads)) == 16 * 16
    assert max(held) <= 2 * 16 + 2 * 2


def test_overlapping_tiles_are_the_same_pixels(tmp_path, make):
    pixels = make.texture(300, 300)
    grid, tiles = read_all(make.write_tiff(tmp_path / "a.tif", pixels), TileSpec(stride_px=20, last="drop"))
    for (row, column), tile in zip(grid.cells().tolist(), tiles, strict=True):
        assert np.array_equal(tile, pixels[row * 20 : row * 20 + 50, column * 20 : column * 20 + 50])


def test_a_broken_region_is_named_by_its_level_0_coordinates(tmp_path, make):
    path = make.damage(make.write_tiff(tmp_path / "a.tif", make.texture(1024, 1024)))
    with pytest.raises(RegionError, match=r"region at x \d+, y \d+ \(\d+ x \d+ px of level 0, level 0\)"):
        read_all(path, TileSpec())


def test_other_tiles_of_a_broken_slide_can_still_be_read(tmp_path, make):
    pixels = make.texture(2048, 2048)
    path = make.damage(make.write_tiff(tmp_path / "a.tif", pixels))
    _, tiles = read_all(path, TileSpec(), np.array([[0, 0]]))
    assert np.array_equal(tiles[0], pixels[:50, :50])


def test_a_slide_too_coarse_for_the_tiles_is_refused(tmp_path, make):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(200, 200), mpp=9.0)
    with open_slide(path) as slide, pytest.raises(SlideError, match="too coarse"):
        check_fit(slide, Grid(TileSpec(), slide.size, slide.mpp))


@pytest.mark.parametrize(("mpp", "told"), [(4.0, []), (4.03, []), (6.0, ["upsampled 1.5 times"])])
def test_a_slide_somewhat_too_coarse_is_used_with_a_warning(tmp_path, make, mpp, told):
    path = make.write_tiff(tmp_path / "a.tif", make.texture(200, 200), mpp=mpp)
    with open_slide(path) as slide:
        warnings = check_fit(slide, Grid(TileSpec(), slide.size, slide.mpp))
    assert [line.split(" are ")[-1] for line in warnings] == told


def count_openings(monkeypatch, module, name):
    opened, plain = [], getattr(module, name)

    def counting(path):
        opened.append(path)
        return plain(path)

    monkeypatch.setattr(module, name, counting)
    return opened


@pytest.mark.parametrize("suffix", [".png", ".jp2"])
def test_a_picture_is_decoded_once_for_all_threads(tmp_path, make, monkeypatch, suffix):
    from wsi_idc import slides

    pixels = make.texture(1500, 1400)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
    opened = count_openings(monkeypatch, slides, "open_picture")
    with open_slide(tmp_path / f"a{suffix}", 4.0) as slide:
        grid = Grid(TileSpec(), slide.size, slide.mpp)
    opened.clear()
    tiles = list(read_tiles(lambda: open_slide(tmp_path / f"a{suffix}", 4.0), grid, grid.cells(), batch=9, threads=4))
    assert len(opened) == 1
    assert len(np.concatenate(tiles)) == len(grid)


def test_a_slide_that_openslide_reads_is_opened_once_for_all_threads(tmp_path, make, monkeypatch):
    from wsi_idc import slides

    pixels = make.texture(1500, 1400)
    path = make.write_tiff(tmp_path / "a.tif", pixels)
    opened = count_openings(monkeypatch, slides, "open_without_ome")
    _, tiles = read_all(path, TileSpec(last="drop"), threads=4)
    assert len(opened) == 2  # one to make the grid
    assert np.array_equal(tiles[31], pixels[50:100, 50:100])


def test_a_folder_of_patches_is_scanned_once_for_all_threads(tmp_path, make, monkeypatch):
    from wsi_idc import slides

    (tmp_path / "p" / "0").mkdir(parents=True)
    for column in range(40):
        picture = Image.fromarray(make.texture(50, 50, seed=column))
        picture.save(tmp_path / "p" / "0" / f"p_idx5_x{column * 50 + 1}_y1_class0.png")
    scanned, plain = [], slides.PatchFolder.__init__
    monkeypatch.setattr(
        slides.PatchFolder, "__init__", lambda self, folder: scanned.append(folder) or plain(self, folder)
    )
    _, tiles = read_all_shared(tmp_path / "p")
    assert len(scanned) == 1
    for column, tile in enumerate(tiles):
        assert np.array_equal(tile, make.texture(50, 50, seed=column))


def read_all_shared(path):
    """All tiles of a patch folder, by four threads, its grid taken without opening it."""
    grid = Grid(TileSpec(), (2000, 50), (4.0, 4.0))
    return grid, np.concatenate(list(read_tiles(lambda: open_slide(path), grid, grid.cells(), batch=7, threads=4)))


def test_a_folder_of_patches_gives_its_own_tiles_alone(tmp_path, make):
    (tmp_path / "p" / "1").mkdir(parents=True)
    Image.fromarray(make.texture(50, 50)).save(tmp_path / "p" / "1" / "p_idx5_x1_y1_class1.png")
    (tmp_path / "p" / "1" / "notes.txt").write_text("x")
    with open_slide(tmp_path / "p") as slide:
        grid = Grid(TileSpec(), slide.size, slide.mpp)
        assert check_fit(slide, grid) == ["1 file left out: another name than <patient>_idx5_x.._y.._class...png"]
        with pytest.raises(SlideError, match="ready-cut"):
            check_fit(slide, Grid(TileSpec(size_px=64), slide.size, slide.mpp))


def test_a_pool_opens_what_cannot_be_shared_once_a_thread():
    barrier, got = threading.Barrier(3), []
    pool = SlidePool(lambda: SimpleNamespace(shared=False, close=lambda: None))

    def take():
        barrier.wait()
        got.extend([pool.get(), pool.get()])

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(slide) for slide in got}) == 3
    pool.close()


@pytest.mark.parametrize("patient", ["8863", "8867", "14082"])
def test_tiles_of_the_real_slides_are_the_data_sets_patches(idc_slide, patient):
    place = idc_slide(patient)
    with open_slide(place / patient) as folder:
        cells, labels = folder.patches.ready_cells()
        originals = [np.asarray(Image.open(folder.patches.cells[tuple(cell)].path)) for cell in cells.tolist()]
    for path in (place / f"idc-{patient}.tif", place / patient):
        _, tiles = read_all(path, TileSpec(), cells)
        assert np.array_equal(tiles, np.stack(originals))
    assert 0 < labels.sum() < len(labels)
