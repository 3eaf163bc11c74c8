"""What the tissue mask takes for tissue, and how tiles are measured against it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from wsi_idc.errors import AnnotationError
from wsi_idc.grid import Grid
from wsi_idc.settings import ExtractSettings, TileSpec
from wsi_idc.slides import open_slide
from wsi_idc.slides.patches import PatchFolder
from wsi_idc.tissue import MASK_MPP, read_mask, tile_fraction, tile_quality, tissue_mask

GLASSES = {"white": (242, 242, 242), "grey": (205, 205, 205), "warm": (238, 232, 214), "cold": (226, 232, 240)}
PENS = {"black": (22, 20, 18), "blue": (25, 50, 175), "green": (40, 150, 115), "red": (205, 30, 45)}


def glass(colour: tuple[int, int, int] = GLASSES["white"], side: int = 400) -> NDArray[np.uint8]:
    """Glass with the noise of a camera: +-1 grey level."""
    noise = np.random.default_rng(7).integers(-1, 2, (side, side, 1))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def absorb(picture: NDArray[np.uint8], where: NDArray[np.bool_], colour: tuple[int, int, int]) -> None:
    """Put a stain of that colour (as it looks on white glass) on part of the picture, by Beer-Lambert."""
    picture[where] = np.rint(picture[where] * (np.array(colour) / 242)).astype(np.uint8)


def disc(side: int, x: int, y: int, radius: float) -> NDArray[np.bool_]:
    rows, columns = np.ogrid[:side, :side]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def stroke(side: int = 400) -> NDArray[np.bool_]:
    """A pen stroke with blurred ends, 25 px wide."""
    canvas = np.zeros((side, side), np.uint8)
    cv2.polylines(canvas, [np.array([[40, 330], [150, 300], [250, 340], [370, 300]], np.int32)], False, 1, 25)
    return canvas > 0


def honeycomb(side: int = 400, mpp: float = 8.0) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Fat: cells of 80 um, nearly as white as glass, inside thin pale pink walls, in a disc of 260 px."""
    spacing = 80.0 / mpp
    rows, columns = np.indices((side, side)).astype(float)
    row = np.round(rows / (spacing * 0.866)).astype(int)
    points = [
        (r * spacing * 0.866, (c + 0.5 * (r % 2)) * spacing)
        for r in range(row.max() + 2)
        for c in range(int(side / spacing) + 2)
    ]
    distances = cKDTree(points).query(np.stack([rows, columns], axis=-1), k=2)[0]
    where = disc(side, side // 2, side // 2, 130)
    picture = glass(side=side)
    absorb(picture, where & (distances[..., 1] - distances[..., 0] < 10.0 / mpp), (232, 204, 218))
    return picture, where


@pytest.mark.parametrize("mpp", [4.0, 8.0, 16.0])
@pytest.mark.parametrize("colour", GLASSES.values(), ids=GLASSES)
def test_blank_glass_of_any_tint_holds_no_tissue(colour: tuple[int, int, int], mpp: float) -> None:
    assert not tissue_mask(glass(colour), mpp).any()
    assert not tissue_mask(np.full((64, 64, 3), colour, np.uint8), mpp).any()


@pytest.mark.parametrize("mpp", [4.0, 8.0, 16.0])
@pytest.mark.parametrize("colour", GLASSES.values(), ids=GLASSES)
@pytest.mark.parametrize("stain", [(222, 165, 195), (150, 110, 170)], ids=["eosin", "haematoxylin"])
def test_stained_tissue_is_kept_to_its_edge(
    stain: tuple[int, int, int], colour: tuple[int, int, int], mpp: float
) -> None:
    picture, blob = glass(colour), disc(400, 190, 210, 90)
    absorb(picture, blob, stain)
    mask = tissue_mask(picture, mpp)
    assert mask[disc(400, 190, 210, 88)].all()
    assert not mask[~disc(400, 190, 210, 92)].any()


@pytest.mark.parametrize("mpp", [8.0, 16.0])
@pytest.mark.parametrize("ink", PENS.values(), ids=PENS)
def test_a_pen_stroke_is_not_kept_and_tissue_beside_it_is(ink: tuple[int, int, int], mpp: float) -> None:
    picture, blob, pen = glass(), disc(400, 200, 130, 90), stroke()
    absorb(picture, blob, (222, 165, 195))
    soft = cv2.GaussianBlur(pen.astype(np.float32), (0, 0), 2.0)[..., None]
    picture = np.rint(picture * (1 - soft) + np.array(ink) * soft).astype(np.uint8)
    mask = tissue_mask(picture, mpp)
    assert not mask[cv2.dilate(pen.astype(np.uint8), np.ones((13, 13), np.uint8)) > 0].any()
    assert mask[disc(400, 200, 130, 88)].all()


@pytest.mark.parametrize("mpp", [4.0, 8.0])
def test_pale_fat_is_kept_with_the_inside_of_its_cells(mpp: float) -> None:
    picture, where = honeycomb(mpp=mpp)
    mask = tissue_mask(picture, mpp)
    assert mask[where].mean() > 0.95
    assert mask[~where].mean() < 0.005


def test_dust_hairs_and_a_coverslip_edge_are_not_tissue() -> None:
    picture = glass()
    rng = np.random.default_rng(3)
    for x, y, radius in rng.integers((10, 60, 2), (390, 390, 7), (40, 3)):
        absorb(picture, disc(400, x, y, radius), (150, 150, 150))
    picture[20:24] = (120, 122, 121)
    picture[:20] = (225, 225, 224)
    cv2.line(picture, (30, 380), (200, 200), (180, 180, 180), 2)
    picture = cv2.GaussianBlur(picture, (0, 0), 0.8)
    assert not tissue_mask(picture, 8.0).any()


def test_a_brown_margin_is_ink_on_a_pink_slide_and_stain_on_a_blue_one() -> None:
    kept = {}
    for name, stain in (("pink", (222, 165, 195)), ("blue", (150, 148, 190))):
        picture, brown = glass(), disc(400, 300, 200, 40)
        absorb(picture, disc(400, 150, 200, 90), stain)
        absorb(picture, brown, (150, 95, 50))
        kept[name] = float(tissue_mask(picture, 8.0)[brown].mean())
    assert kept["pink"] == 0.0
    assert kept["blue"] > 0.9


def test_nothing_on_a_dark_background_is_tissue() -> None:
    picture = np.full((300, 300, 3), 3, np.uint8)
    picture[disc(300, 150, 150, 80)] = (40, 10, 160)
    assert not tissue_mask(picture, 8.0).any()


def test_a_picture_without_glass_is_all_tissue() -> None:
    picture = np.random.default_rng(1).integers((150, 90, 130), (225, 165, 205), (200, 200, 3)).astype(np.uint8)
    assert tissue_mask(picture, 8.0).all()


def test_a_fine_thumbnail_gives_a_mask_of_its_own_shape() -> None:
    picture, blob = glass(side=402), disc(402, 200, 200, 120)
    absorb(picture, blob, (222, 165, 195))
    mask = tissue_mask(picture, 0.9)
    assert mask.shape == (402, 402)
    assert (mask == blob).mean() > 0.98


@pytest.mark.parametrize("method", ["otsu", "morphological"])
def test_tiatoolbox_maskers_find_tissue_and_survive_blank_pictures(method: str) -> None:
    picture, blob = glass(), disc(400, 190, 210, 90)
    absorb(picture, blob, (222, 165, 195))
    mask = tissue_mask(picture, 8.0, method)  # type: ignore[arg-type]
    assert mask.dtype == np.bool_
    assert (mask == blob).mean() > 0.9
    blank = tissue_mask(np.full((50, 60, 3), 242, np.uint8), 8.0, method)  # type: ignore[arg-type]
    assert blank.shape == (50, 60)
    assert not blank.any()


def test_none_means_that_everything_is_tissue() -> None:
    assert tissue_mask(glass(side=20), 8.0, "none").all()


def test_importing_the_module_imports_nothing_heavy() -> None:
    heavy = ("cv2", "scipy", "skimage", "tiatoolbox", "torch", "zarr")
    code = f"import sys, wsi_idc.tissue; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Masks given by the manifest


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_any_nonzero_colour_of_a_mask_picture_is_tissue(tmp_path: Path, mode: str, suffix: str) -> None:
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:7] = True
    grey = Image.fromarray(np.where(expected, 1, 0).astype(np.uint16 if mode == "I;16" else np.uint8))
    picture = Image.fromarray(expected) if mode == "1" else grey
    if mode == "P":
        grey = Image.fromarray(np.where(expected, 0, 1).astype(np.uint8))
        grey.putpalette([255, 255, 255, 0, 0, 0] + [0] * 762)  # the colour counts, not its index
        picture = grey
    elif mode in ("RGB", "RGBA"):
        picture = grey.convert(mode)
    picture.save(tmp_path / f"mask{suffix}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"mask{suffix}", (6, 8)), expected)


def test_transparent_parts_of_a_mask_are_not_tissue(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[:2, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", (4, 4)).sum(axis=1).tolist() == [0, 0, 4, 4]


def test_a_mask_that_claims_too_much_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "mask.png")
    with pytest.raises(AnnotationError, match=r"more than 67 million.*; save it smaller"):
        read_mask(tmp_path / "mask.png", (50, 50))


def test_a_mask_is_resized_by_nearest_neighbour(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).random((5, 7)) > 0.5
    Image.fromarray(expected).save(tmp_path / "mask.png")
    large = read_mask(tmp_path / "mask.png", (50, 70))
    np.testing.assert_array_equal(large, expected.repeat(10, 0).repeat(10, 1))
    Image.fromarray(large).save(tmp_path / "large.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "large.png", (5, 7)), expected)


def test_a_mask_of_another_aspect_ratio_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((1000, 1030), bool)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", (500, 510)).all()
    with pytest.raises(AnnotationError, match=r"mask\.png: mask of 1030 x 1000 px .*\(500 x 500\)") as caught:
        read_mask(tmp_path / "mask.png", (500, 500))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_an_unreadable_mask_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mask.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AnnotationError) as caught:
        read_mask(path, (5, 5))
    assert str(caught.value).startswith(f"{path}: mask cannot be read")
    assert "\n" not in str(caught.value)


# Parts of tiles


def brute(mask: NDArray[np.bool_], grid: Grid, cells: NDArray[np.int32]) -> list[float]:
    """Sum of the overlap of each tile with each tissue pixel of the mask, one by one."""
    height, width = mask.shape
    ends_x = np.arange(width + 1) * grid.size[0] / width
    ends_y = np.arange(height + 1) * grid.size[1] / height
    parts = []
    for x, y in grid.position(cells).tolist():
        across = np.clip(np.minimum(ends_x[1:], x + grid.extent[0]) - np.maximum(ends_x[:-1], x), 0, None)
        down = np.clip(np.minimum(ends_y[1:], y + grid.extent[1]) - np.maximum(ends_y[:-1], y), 0, None)
        parts.append(float(down @ mask @ across) / (grid.extent[0] * grid.extent[1]))
    return parts


@given(
    seed=st.integers(0, 2**32 - 1),
    mask_shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    mpp=st.tuples(st.floats(0.2, 8.0), st.floats(0.2, 8.0)),
    tile=st.integers(8, 60),
    stride=st.integers(8, 60),
)
def test_tile_fraction_is_the_exact_area(
    seed: int,
    mask_shape: tuple[int, int],
    size: tuple[int, int],
    mpp: tuple[float, float],
    tile: int,
    stride: int,
) -> None:
    mask = np.random.default_rng(seed).random(mask_shape) > 0.4
    grid = Grid(TileSpec(size_px=tile, mpp=2.0, stride_px=stride), size, mpp)
    cells = grid.cells()[:200]
    parts = tile_fraction(mask, grid, cells)
    assert parts.dtype == np.float32
    assert parts.shape == (len(cells),)
    np.testing.assert_allclose(parts, brute(mask, grid, cells), atol=1e-5)


def test_a_tile_half_of_whose_mask_is_tissue_has_one_half() -> None:
    grid = Grid(TileSpec(), (200, 100), (4.0, 4.0))
    mask = np.zeros((50, 100), bool)
    mask[:, :25] = True  # the first 50 of 200 level-0 pixels: a column of tiles
    mask[:25, 50:75] = True  # the upper tile of the third column
    mask[:25, 87:] = True
    assert tile_fraction(mask, grid, grid.cells()).tolist() == [1, 0, 1, np.float32(0.52), 1, 0, 0, 0]
    half = np.zeros((2, 8), bool)
    half[0, 1] = half[1, 0] = True
    assert tile_fraction(half, grid, grid.cells()[[0, 4]]).tolist() == [0.5, 0.5]


def test_what_lies_beyond_the_slide_is_not_tissue() -> None:
    grid = Grid(TileSpec(), (75, 60), (4.0, 4.0))
    parts = tile_fraction(np.ones((7, 9), bool), grid, grid.cells())
    np.testing.assert_allclose(parts, [1.0, 0.5, 0.2, 0.1], rtol=1e-6)


def test_no_cells_have_no_parts() -> None:
    grid = Grid(TileSpec(), (75, 60), (4.0, 4.0))
    assert tile_fraction(np.ones((7, 9), bool), grid, np.zeros((0, 2), np.int32)).shape == (0,)


# Quality of tiles


def test_blur_is_the_variance_of_the_laplacian_inside_the_tile() -> None:
    tiles = np.random.default_rng(5).integers(0, 255, (7, 20, 20, 1), dtype=np.uint8).repeat(3, axis=3)
    blur, pen = tile_quality(tiles)
    grey = tiles[..., 0].astype(float)
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    np.testing.assert_allclose(blur, laplacian.var(axis=(1, 2)), rtol=1e-5)
    assert blur.dtype == pen.dtype == np.float32


def test_a_blurred_tile_has_a_smaller_figure_and_a_blank_one_zero() -> None:
    sharp = np.random.default_rng(5).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    blur, _ = tile_quality(np.stack([sharp, cv2.GaussianBlur(sharp, (0, 0), 2.0), np.full_like(sharp, 242)]))
    assert blur[0] > 10 * blur[1] > 0
    assert blur[2] == 0


@pytest.mark.parametrize("ink", PENS.values(), ids=PENS)
def test_pen_is_the_part_of_a_tile_that_has_the_colour_of_ink(ink: tuple[int, int, int]) -> None:
    tiles = np.full((3, 50, 50, 3), (222, 165, 195), np.uint8)
    tiles[1, :, :10] = ink
    tiles[2] = ink
    assert tile_quality(tiles)[1].tolist() == [0.0, np.float32(0.2), 1.0]


def test_figures_of_a_tile_do_not_depend_on_its_neighbours() -> None:
    tiles = np.random.default_rng(2).integers(0, 255, (200, 50, 50, 3), dtype=np.uint8)
    together, alone = tile_quality(tiles), [tile_quality(tile[None]) for tile in tiles]
    np.testing.assert_array_equal(together[0], np.concatenate([blur for blur, _ in alone]))
    np.testing.assert_array_equal(together[1], np.concatenate([pen for _, pen in alone]))
    assert [len(figure) for figure in tile_quality(tiles[:0])] == [0, 0]


# Real data


@pytest.fixture(scope="module", params=["8863", "8865", "8867", "14082", "14306"])
def labelled_slide(
    request: pytest.FixtureRequest, idc_slide: Callable[[str], Path]
) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """A complete slide at 4 um/px, and the class of each cell (-1: empty)."""
    place = idc_slide(request.param)
    slide = tifffile.imread(place / f"idc-{request.param}.tif", key=0)
    classes = np.full((-(-slide.shape[0] // 50), -(-slide.shape[1] // 50)), -1, np.int8)
    cells, labels = PatchFolder(place / request.param).ready_cells()
    classes[tuple(cells.T)] = labels
    return slide, classes


@pytest.mark.parametrize("mpp", [pytest.param(4.0, marks=pytest.mark.slow), MASK_MPP, 16.0])
def test_real_slides_keep_their_tiles_and_leave_empty_cells(
    labelled_slide: tuple[NDArray[np.uint8], NDArray[np.int8]], mpp: float
) -> None:
    slide, classes = labelled_slide
    height, width = slide.shape[:2]
    shape = (round(width * 4 / mpp), round(height * 4 / mpp))
    thumbnail = np.asarray(cv2.resize(slide, shape, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    grid = Grid(TileSpec(), (width, height), (4.0, 4.0))
    assert grid.shape == classes.shape
    kept = tile_fraction(tissue_mask(thumbnail, mpp), grid, grid.cells()) >= ExtractSettings().min_tissue
    kept = kept.reshape(classes.shape)
    assert kept[classes == 1].all()
    assert kept[classes >= 0].mean() >= 0.98
    assert kept[classes < 0].mean() <= 0.01


def picture(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("mpp", [8.0, 12.0, 16.0])
def test_nothing_of_a_slide_with_only_a_black_pen_is_kept(shared_data: Path, mpp: float) -> None:
    assert not tissue_mask(picture(shared_data / "tissue" / "pen_black.png"), mpp).any()


# Boxes x0, y0, x1, y1 in each thumbnail, as a person sees them.
SEEN = {
    "pen_green.png": {
        "tissue": [(320, 170, 370, 220), (450, 200, 700, 250), (560, 400, 630, 470), (740, 200, 780, 240)],
        "fat": [(420, 100, 490, 130), (230, 620, 330, 700), (440, 540, 500, 620)],
        "glass": [(850, 300, 990, 840), (10, 150, 140, 560), (0, 40, 140, 70)],
        "ink": [(160, 100, 200, 300), (430, 430, 470, 450), (600, 495, 700, 520), (770, 300, 810, 400)],
        "blue ink": [(174, 454, 200, 474)],
    },
    "pen_red.png": {
        "tissue": [(250, 170, 600, 270), (200, 450, 550, 750), (560, 250, 715, 640), (110, 820, 150, 845)],
        "fat": [(185, 75, 210, 90)],
        "glass": [(860, 20, 910, 990), (10, 870, 200, 940), (300, 20, 900, 80), (5, 200, 60, 700)],
        "ink": [
            (105, 350, 130, 560),
            (65, 800, 95, 850),
            (480, 90, 590, 140),
            (790, 440, 815, 540),
            (775, 650, 840, 680),
        ],
    },
    "coverslip_edge.png": {
        "tissue": [(670, 300, 730, 330), (770, 300, 830, 340), (840, 270, 880, 320), (570, 405, 610, 430)],
        "glass": [(20, 110, 540, 440), (1200, 230, 1480, 440), (600, 110, 800, 220)],
        "edge": [(0, 0, 1488, 90)],
    },
}


@pytest.mark.parametrize("mpp", [8.0, 12.0, 16.0])
@pytest.mark.parametrize("name", SEEN)
def test_of_a_slide_with_ink_or_edges_the_tissue_that_a_person_sees_is_kept(
    shared_data: Path, name: str, mpp: float
) -> None:
    mask = tissue_mask(picture(shared_data / "tissue" / name), mpp)
    for what, boxes in SEEN[name].items():
        for x0, y0, x1, y1 in boxes:
            kept = float(mask[y0:y1, x0:x1].mean())
            good = kept > 0.97 if what == "tissue" else kept > 0.85 if what == "fat" else kept == 0.0
            assert good, f"{what} at {(x0, y0, x1, y1)}: {kept:.3f}"


def thumbnail(path: Path, mpp: float) -> NDArray[np.uint8]:
    with open_slide(path) as slide:
        return slide.thumbnail(mpp)[0]


@pytest.mark.parametrize("mpp", [4.0, 8.0, 16.0])
def test_the_skin_of_cmu_1_is_tissue_and_its_glass_is_not(shared_data: Path, mpp: float) -> None:
    mask = tissue_mask(thumbnail(shared_data / "slides" / "CMU-1-Small-Region.svs", mpp), mpp)
    height, width = mask.shape
    assert 0.35 < mask.mean() < 0.45
    assert mask[int(0.65 * height) : int(0.9 * height), int(0.4 * width) : int(0.7 * width)].all()
    assert not mask[:, int(0.92 * width) :].any()


def test_a_fluorescence_slide_holds_no_tissue(shared_data: Path) -> None:
    assert not tissue_mask(thumbnail(shared_data / "slides" / "fluorescence-387.ndpi", 8.0), 8.0).any()
