"""Stored JPEG tiles that are decoded directly are OpenSlide's to the bit, or are left to it."""

import os

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile

from wsi_idc.errors import RegionError
from wsi_idc.slides import open_slide
from wsi_idc.slides.backends import OpenSlideBackend

SIZE = (700, 530)
APERIO = "Aperio Image Library v11.2.1 \r\n700x530 [0,0 700x530] (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"


def smooth(width, height, seed=0):
    """Noise that JPEG keeps something of: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(4, 0).repeat(4, 1)[:height, :width])


def write(path, sizes=(SIZE,), tile=(256, 256), subsampling=(2, 2), kind="YCBCR", description=None):
    """A tiled JPEG TIFF of levels of the sizes, (width, height) each."""
    with tifffile.TiffWriter(path) as out:
        for number, (width, height) in enumerate(sizes):
            out.write(
                smooth(width, height, number),
                tile=tile,
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 80, "outcolorspace": kind},
                subsampling=subsampling,
                subfiletype=int(number > 0),
                description=description if number == 0 else None,
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def rewrite(path, change, **options):
    """The same first level, each stored tile as `change(number, tile)` gives it."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        tiles = []
        for place, length in zip(page.dataoffsets, page.databytecounts, strict=True):
            tif.filehandle.seek(place)
            tiles.append(tif.filehandle.read(length))
    with tifffile.TiffWriter(path) as out:
        out.write(
            iter([change(number, tile) for number, tile in enumerate(tiles)]),
            shape=(SIZE[1], SIZE[0], 3),
            dtype=np.uint8,
            tile=(256, 256),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            metadata=None,
            **options,
        )
    return path


def regions(width, height):
    """(x, y, width, height): over tiles, at the edges, single pixels."""
    yield 0, 0, width, height
    yield 100, 37, min(400, width - 100), min(300, height - 37)
    yield width - 1, height - 1, 1, 1
    yield width // 2, 0, width - width // 2, 5
    yield 0, height // 2, 3, height - height // 2


def check(path):
    """Hold every level against OpenSlide; gives the numbers of those that are decoded directly."""
    backend, direct = OpenSlideBackend(path), set()
    with openslide.OpenSlide(path) as handle:
        for number, level in enumerate(backend.description.levels):
            for x, y, width, height in regions(*level.size):
                place = (round(x * level.downsample[0]), round(y * level.downsample[1]))
                theirs = np.asarray(handle.read_region(place, number, (width, height)))
                assert np.array_equal(backend.read(number, x, y, width, height)[..., :3], theirs[..., :3])
                if backend._stored is not None and backend._stored.read(number, x, y, width, height) is not None:
                    direct.add(number)
    backend.close()
    return direct


@pytest.mark.parametrize(
    ("kind", "subsampling"), [("YCBCR", (1, 1)), ("YCBCR", (2, 1)), ("YCBCR", (2, 2)), ("RGB", (1, 1))]
)
@pytest.mark.parametrize("tile", [(256, 256), (128, 240)])
def test_the_pixels_are_openslides(tmp_path, kind, subsampling, tile):
    assert check(write(tmp_path / "a.tif", tile=tile, subsampling=subsampling, kind=kind)) == {0}


def test_an_aperio_slide_is_read_so(tmp_path):
    path = write(tmp_path / "a.svs", description=APERIO)
    assert check(path) == {0}
    with open_slide(path) as slide:
        assert (slide.description.format, slide.description.reader) == ("aperio", "OpenSlide")


def test_tables_that_tiles_share_are_read_with_each(tmp_path):
    path = write(tmp_path / "a.tif")
    tables = []

    def without(number, tile):
        """A tile less its tables of quantisation and Huffman codes."""
        kept, shared, at = bytearray(tile[:2]), bytearray(tile[:2]), 2
        while tile[at + 1] != 0xDA:
            length = 2 + int.from_bytes(tile[at + 2 : at + 4], "big")
            (shared if tile[at + 1] in (0xDB, 0xC4) else kept).extend(tile[at : at + length])
            at += length
        tables.append(bytes(shared + b"\xff\xd9"))
        return bytes(kept + tile[at:])

    rewrite(path, without)
    assert check(rewrite(path, lambda number, tile: tile, jpegtables=tables[0])) == {0}


def test_a_level_of_an_uneven_downsample_is_openslides(tmp_path):
    assert check(write(tmp_path / "a.tif", sizes=(SIZE, (350, 265), (174, 132)))) == {0, 1}


def test_two_pages_of_one_size_are_openslides(tmp_path):
    assert check(write(tmp_path / "a.tif", sizes=(SIZE, (350, 265), (350, 265)))) == {0}


def test_tiles_so_large_that_openslide_had_better_keep_them_are_openslides(tmp_path):
    assert check(write(tmp_path / "a.tif", tile=(1040, 1040))) == set()


@pytest.mark.parametrize("description", [None, APERIO])
def test_a_file_with_absent_tiles_is_openslides(tmp_path, description):
    path = write(tmp_path / "a.tif", sizes=(SIZE, (350, 265)), description=description)
    with tifffile.TiffFile(path) as tif:
        place = tif.pages[0].tags["TileByteCounts"].valueoffset
    with path.open("r+b") as stream:
        stream.seek(place + 4)
        stream.write(bytes(4))
    backend = OpenSlideBackend(path)
    assert backend._stored is None
    backend.close()


def test_other_compressions_and_formats_are_openslides(tmp_path, make, shared_data):
    for path in (
        make.write_tiff(tmp_path / "a.tif", make.texture(300, 300)),
        shared_data / "slides" / "fluorescence-387.ndpi",
    ):
        backend = OpenSlideBackend(path)
        assert backend._stored is None
        backend.close()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "CMU-1-Small-Region.jpeg.tiff"])
def test_real_slides_are_read_so(shared_data, name):
    assert check(shared_data / "slides" / name) == {0}


def test_a_tile_of_another_kind_is_openslides(tmp_path):
    """One stored tile has other subsampling than the rest."""
    other = simplejpeg.encode_jpeg(smooth(256, 256, 9), quality=20, colorsubsampling="444")
    path = rewrite(write(tmp_path / "a.tif"), lambda number, tile: other if number == 4 else tile)
    backend = OpenSlideBackend(path)
    assert backend._stored.read(0, 0, 0, 256, 256) is not None
    assert backend._stored.read(0, 256, 256, 256, 256) is None
    assert backend.read(0, 256, 256, 256, 256).shape == (256, 256, 4)
    backend.close()


@pytest.mark.parametrize("where", [700, -2])
def test_what_libjpeg_warns_of_fails_as_in_openslide(tmp_path, where):
    """A tile that is broken within, and one without its end; their neighbours are read."""

    def broken(number, tile):
        if number != 4:
            return tile
        return tile[:where] + b"\xff" * 64 + tile[where + 64 :] if where > 0 else tile[:where]

    path = rewrite(write(tmp_path / "a.tif"), broken)
    with openslide.OpenSlide(path) as handle:
        try:
            theirs = np.asarray(handle.read_region((256, 256), 0, (256, 256)))[..., :3]
        except openslide.OpenSlideError:
            theirs = None
    with open_slide(path, 0.5) as slide:
        assert slide.read(0, 0, 0, 256, 256).shape == (256, 256, 3)
        if theirs is None:
            with pytest.raises(RegionError, match="region at x 256, y 256"):
                slide.read(0, 256, 256, 256, 256)
        else:
            assert np.array_equal(slide.read(0, 256, 256, 256, 256), theirs)
        assert slide.read(0, 512, 256, 100, 100).shape == (100, 100, 3)


def test_damaged_bytes_give_what_openslide_gives(tmp_path):
    rng = np.random.default_rng(5)
    whole = write(tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        places = list(zip(tif.pages[0].dataoffsets, tif.pages[0].databytecounts, strict=True))
    outcomes = set()
    for _ in range(12):
        content = bytearray(whole)
        for place, length in places:
            content[place + int(rng.integers(length))] ^= 1 << int(rng.integers(8))
        (tmp_path / "b.tif").write_bytes(content)
        with open_slide(tmp_path / "b.tif", 0.5) as slide:
            for number in range(len(places)):
                x, y = number % 3 * 256, number // 3 * 256
                width, height = min(256, SIZE[0] - x), min(256, SIZE[1] - y)
                with openslide.OpenSlide(tmp_path / "b.tif") as handle:
                    try:
                        theirs = np.asarray(handle.read_region((x, y), 0, (width, height)))[..., :3]
                    except openslide.OpenSlideError:
                        theirs = None
                try:
                    mine = slide.read(0, x, y, width, height)
                except RegionError:
                    mine = None
                assert (mine is None) == (theirs is None)
                assert mine is None or np.array_equal(mine, theirs)
                outcomes.add(mine is None)
    assert outcomes == {True, False}


def test_a_decoder_that_is_one_level_off_is_not_used(tmp_path, monkeypatch):
    plain = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *arguments, **options: plain(*arguments, **options) ^ 1)
    assert check(write(tmp_path / "a.tif")) == set()


def test_what_the_system_does_not_give_is_asked_of_openslide(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif")
    with openslide.OpenSlide(path) as handle:
        theirs = np.asarray(handle.read_region((0, 0), 0, (300, 300)))[..., :3]
    with open_slide(path, 0.5) as slide:
        slide.read(0, 0, 0, 10, 10)

        def refuse(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "pread", refuse)
        assert np.array_equal(slide.read(0, 0, 0, 300, 300), theirs)
