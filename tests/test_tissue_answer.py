"""The mask's answer, pinned: pictures that take every branch, and what each step made of them.

Masks are part of results that people have. Whoever makes the mask faster must not change these figures; whoever changes
what is tissue must, and say so in the changelog.
"""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_tissue import PENS, absorb, disc, glass, honeycomb
from wsi_idc import tissue
from wsi_idc.tissue import tile_quality, tissue_mask

EOSIN, HAEMATOXYLIN, BROWN = (222, 165, 195), (150, 110, 170), (150, 95, 50)


def clouds(seed: int, height: int, width: int, reach: int) -> NDArray[np.int64]:
    """Smooth noise, 0 to 255, in whole numbers: the same on every machine."""
    field = np.random.default_rng(seed).integers(0, 256, (height + 2 * reach, width + 2 * reach))
    for axis in (0, 1):
        total = np.cumsum(field, axis=axis)
        low, high = np.delete(total, np.s_[-2 * reach :], axis), np.delete(total, np.s_[: 2 * reach], axis)
        field = (high - low) // (2 * reach)
    return (field - field.min()) * 255 // (field.max() - field.min())


def section() -> NDArray[np.uint8]:
    """Eosin and haematoxylin with holes of every size, fat, dust, a smear, a margin's brown, small and pale pieces."""
    side = 640
    picture, walls = glass(side=side), honeycomb(side=side)[0].min(axis=2) < 230
    absorb(picture, disc(side, 210, 220, 190), EOSIN)
    absorb(picture, disc(side, 120, 160, 60) | disc(side, 300, 300, 25), HAEMATOXYLIN)
    for x, y, radius in ((200, 100, 8), (230, 330, 30), (300, 190, 60), (120, 290, 40)):
        picture[disc(side, x, y, radius)] = (242, 242, 242)
    absorb(picture[250:330, 80:160], walls[280:360, 280:360] & disc(80, 40, 40, 40), (232, 204, 218))  # fat in a hole
    absorb(picture[370:, 370:], walls[185:455, 185:455], (232, 204, 218))
    absorb(picture, disc(side, 60, 500, 25), BROWN)
    for x, y, radius in ((450, 60, 5), (480, 60, 12), (520, 60, 2), (560, 60, 30)):
        absorb(picture, disc(side, x, y, radius), EOSIN)
    absorb(picture, disc(side, 560, 180, 40), (238, 233, 236))  # hardly stained
    absorb(picture, disc(side, 490, 180, 20), (140, 132, 138))  # mostly grey
    absorb(picture, disc(side, 200, 540, 60), (200, 200, 200))
    absorb(picture, disc(side, 200, 540, 18), (240, 222, 236))  # hardly darker than the grey around it
    for x, y, radius in np.random.default_rng(3).integers((300, 560, 1), (360, 630, 4), (15, 3)):
        absorb(picture, disc(side, x, y, radius), (150, 150, 150))
    picture[:6, 300:] = (120, 122, 121)
    return picture[:600, :627]


def stained_clouds() -> NDArray[np.uint8]:
    """Stains that come and go, from nothing to dark: colours near every limit."""
    height, width = 520, 613
    picture = glass(side=640)[:height, :width].astype(np.int64)
    for seed, reach, colour in (
        (1, 24, EOSIN),
        (2, 10, HAEMATOXYLIN),
        (3, 16, (232, 204, 218)),
        (4, 20, (200, 198, 199)),
    ):
        much = np.maximum(clouds(seed, height, width, reach) - 150, 0)[..., None]
        picture = picture * (242 * 60 - (242 - np.array(colour)) * np.minimum(much, 60)) // (242 * 60)
    return picture.astype(np.uint8)


def immunostained() -> NDArray[np.uint8]:
    picture = glass()
    absorb(picture, disc(400, 150, 200, 90), (150, 148, 190))
    absorb(picture, disc(400, 300, 200, 40) | disc(400, 150, 200, 30), BROWN)
    return picture


def penned(*inks: str) -> NDArray[np.uint8]:
    """Tissue, a long thick stroke across it in the first ink, and short thin ones with blurred ends in each."""
    side = 640
    picture = glass(side=side)
    absorb(picture, disc(side, 320, 250, 180), EOSIN)
    absorb(picture, disc(side, 250, 250, 60), HAEMATOXYLIN)
    canvas = np.zeros((len(inks) + 1, side, side), np.uint8)
    course = np.array([[30, 330], [200, 400], [420, 380], [610, 420]], np.int32)
    cv2.polylines(canvas[0], [course], False, 255, 26)
    for number in range(len(inks)):
        cv2.line(canvas[number + 1], (60, 500 + 35 * number), (110, 505 + 35 * number), 255, 7)
        cv2.line(canvas[number + 1], (400 + 60 * number, 120), (430 + 60 * number, 160), 255, 5)
    for place, ink in zip(canvas, (inks[0], *inks), strict=True):
        much = cv2.blur(place, (5, 5)).astype(np.int64)[..., None]
        picture = ((picture * (255 - much) + np.array(PENS[ink]) * much) // 255).astype(np.uint8)
    return picture


def muscle() -> NDArray[np.uint8]:
    """Small areas of a red pen's colour, and no long stroke."""
    picture = glass()
    absorb(picture, disc(400, 200, 200, 120), EOSIN)
    for x, y, radius in ((160, 160, 12), (240, 220, 15), (330, 60, 12)):
        picture[disc(400, x, y, radius)] = PENS["red"]
    return picture


def without_glass() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers((150, 90, 130), (225, 165, 205), (200, 200, 3)).astype(np.uint8)


def pale_without_glass() -> NDArray[np.uint8]:
    """No glass, but smooth pale tissue in a third of it: that is not taken for glass."""
    picture = without_glass()
    picture[:, :66] = (235, 215, 228)
    return picture


PICTURES: dict[str, Callable[[], NDArray[np.uint8]]] = {
    "section": section,
    "clouds": stained_clouds,
    "immunostained": immunostained,
    "muscle": muscle,
    "red and black": lambda: penned("red", "black"),
    "blue and red": lambda: penned("blue", "red"),
    "green": lambda: penned("green"),
    "without glass": without_glass,
    "pale without glass": pale_without_glass,
}
# Picture, um/px: pixels of the mask, mean row and column of these, and by what part of the picture each step
# changed it: colours of tissue, ink, too pale, specks, holes filled, half on glass, doubtful pieces.
ANSWERS = {
    ("section", 8.0): (149_690, 303.69, 303.01, (0.345617, 0, -0.052477, -0.000037, 0.108812, -0.001127, -0.002887)),
    ("section", 5.0): (150_642, 305.26, 304.75, (0.37361, 0, -0.080534, -0.000037, 0.111425, -0.001207, -0.002826)),
    ("clouds", 8.0): (162_201, 271.96, 322.36, (0.404176, 0, -0.030914, -0.010967, 0.171562, -0.018045, -0.006961)),
    ("clouds", 16.0): (124_504, 271.52, 311.97, (0.371775, 0, -0.014864, -0.0041, 0.068613, -0.020354, -0.010481)),
    ("clouds", 2.5): (308_336, 266.10, 308.54, (0.457417, 0, -0.05798, -0.022414, 0.592545, -0.002129, -0.000016)),
    ("immunostained", 8.0): (30_470, 200.00, 174.74, (0.194662, 0, -0.004225, 0, 0, 0, 0)),
    ("muscle", 8.0): (45_666, 198.65, 201.26, (0.290288, 0, -0.0055, 0, 0.000625, 0, 0)),
    ("red and black", 8.0): (89_894, 236.74, 317.18, (0.284277, -0.062644, -0.002161, -0.000005, 0, 0, 0)),
    ("red and black", 12.0): (91_713, 238.38, 317.82, (0.283943, -0.057795, -0.002239, 0, 0, 0, 0)),
    ("blue and red", 8.0): (94_643, 238.42, 319.03, (0.287815, -0.053855, -0.002866, 0, 0.000664, -0.000696, 0)),
    ("green", 8.0): (90_674, 237.41, 317.51, (0.233953, -0.010327, -0.002251, -0.000002, 0, 0, 0)),
    ("without glass", 8.0): (40_000, 99.50, 99.50, (1, 0, 0, 0, 0, 0, 0)),
    ("pale without glass", 8.0): (40_000, 99.50, 99.50, (1, 0, -0.0038, 0, 0.0038, 0, 0)),
}


@pytest.mark.parametrize(("name", "mpp"), ANSWERS)
def test_the_mask_of_a_made_picture_is_what_it_always_was(name: str, mpp: float) -> None:
    steps: dict[str, float] = {}
    mask = tissue_mask(PICTURES[name](), mpp, steps=steps)
    pixels, row, column, parts = ANSWERS[name, mpp]
    # A pixel or two, so that the last bit of a float on another processor is no failure.
    assert np.count_nonzero(mask) == pytest.approx(pixels, abs=6)
    assert [float(places.mean()) for places in np.nonzero(mask)] == pytest.approx([row, column], abs=0.02)
    assert list(steps.values()) == pytest.approx(parts, abs=6 / mask.size + 1e-6)


# Shortcuts give what the long way gives.


@pytest.mark.parametrize("rows", [1, 10_000])
def test_how_much_is_looked_at_together_does_not_show(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = penned("red", "black")
    whole = tissue_mask(picture, 8.0)
    monkeypatch.setattr(tissue, "_BAND", rows * picture.shape[1])
    np.testing.assert_array_equal(tissue_mask(picture, 8.0), whole)


@pytest.mark.parametrize("radius", [1.0, 2.0, 4.0, 5.3, 8.0, 12.8, 16.0])
@pytest.mark.parametrize("shape", [(90, 120), (7, 40), (40, 3)])
def test_an_opening_by_squares_is_the_opening_by_their_disc(radius: float, shape: tuple[int, int]) -> None:
    plane = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    opened = np.concatenate([part for _, part in tissue._opened(plane, radius)])
    np.testing.assert_array_equal(opened, cv2.morphologyEx(plane, cv2.MORPH_OPEN, tissue._disc(radius)))


@pytest.mark.parametrize("connectivity", [4, 8])
def test_pieces_known_by_their_runs_are_those_of_every_pixel(connectivity: int) -> None:
    random = np.random.default_rng(2)
    mask = random.random((40, 61)) > 0.6
    mask[3, -4:] = mask[4, :5] = True  # a run at a row's end and one at the next row's start do not touch
    values = random.random(mask.shape).astype(np.float32)
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=connectivity)
    pieces = tissue._Pieces(mask, connectivity)  # type: ignore[arg-type]
    np.testing.assert_array_equal(pieces.labels, labels)
    np.testing.assert_array_equal(pieces.pixels, np.bincount(labels.ravel()))
    np.testing.assert_allclose(pieces.total(values), np.bincount(labels.ravel(), values.ravel()), rtol=1e-6)
    np.testing.assert_array_equal(pieces.total(values > 0.5), np.bincount(labels.ravel(), values.ravel() > 0.5))
    chosen = random.random(count) > 0.5
    np.testing.assert_array_equal(pieces.where(chosen.copy()), chosen[labels] & mask)


def test_the_pen_figure_counts_the_very_colours_of_ink() -> None:
    cube = np.stack(np.meshgrid(*[np.arange(256, dtype=np.uint8)[::3]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    tiles = np.concatenate([cube, cube[: -len(cube) % 64**2]]).reshape(-1, 64, 64, 3)
    density = np.log10(241.0 / (np.arange(256.0) + 1.0)).astype(np.float32)[tiles]
    red, other = tissue._pen(density[..., 0], density[..., 1], density[..., 2])
    np.testing.assert_array_equal(tile_quality(tiles)[1], (red | other).mean(axis=(1, 2)).astype(np.float32))


@pytest.mark.parametrize("odd", [0, 1])
def test_the_stain_is_the_median_density_of_what_is_stained(odd: int) -> None:
    pixels = np.random.default_rng(4).integers(60, 256, (50, 60 + odd, 3)).astype(np.uint8)
    density = np.log10(256.0 / (pixels.reshape(-1, 3) + 1.0))
    expected = np.median(density[density.mean(axis=1) > 0.05], axis=0)
    assert tissue.stain(pixels, np.ones(pixels.shape[:2], bool)) == pytest.approx(expected, abs=6e-5)
