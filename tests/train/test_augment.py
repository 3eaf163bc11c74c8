"""Augmentation: what each amount may do, and that the generator alone decides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_idc.train.augment import augment, mix
from wsi_idc.train.settings import AUGMENTATIONS, Augmentation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_tiles(count: int = 6, size: int = 21) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), generator=generator(9), dtype=torch.uint8)


def plain(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.permute(0, 3, 1, 2).float() / 255


def test_nothing_asked_for_is_nothing_done():
    assert torch.equal(augment(some_tiles(), Augmentation(), generator()), plain(some_tiles()))


def test_all_mirrors_are_the_eight_of_a_square():
    tile = some_tiles(1)
    found = augment(tile.repeat(200, 1, 1, 1), Augmentation(mirror="all"), generator())
    eight = [
        torch.rot90(image, turns, (1, 2)) for image in (plain(tile)[0], plain(tile)[0].flip(2)) for turns in range(4)
    ]
    distance = torch.stack([(found - image).abs().amax((1, 2, 3)) for image in eight])
    assert distance.min(0).values.max() < 1e-3
    assert len(set(distance.argmin(0).tolist())) == 8


def test_a_horizontal_mirror_is_the_tile_or_its_reflection():
    tile = some_tiles(1)
    found = augment(tile.repeat(50, 1, 1, 1), Augmentation(mirror="horizontal"), generator())
    both = [(found - image).abs().amax((1, 2, 3)) < 1e-3 for image in (plain(tile)[0], plain(tile)[0].flip(2))]
    assert torch.logical_xor(*both).all()


def test_a_shift_moves_the_tile_by_its_part_at_most():
    size = 41
    tile = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    tile[:, size // 2, size // 2] = 255
    found = augment(tile.repeat(100, 1, 1, 1), Augmentation(shift=0.1), generator())[:, 0]
    axis = torch.arange(size) - size // 2
    for across in (1, 2):
        centre = (found.sum(across) * axis).sum(1) / found.sum((1, 2))
        assert 0.07 * size < centre.abs().max() <= 0.1 * size + 0.01


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_augmentation_stays_within_what_a_tile_can_be(seed):
    for how in AUGMENTATIONS.values():
        found = augment(some_tiles(), how, generator(seed))
        assert found.shape == (6, 3, 21, 21)
        assert found.dtype == torch.float32
        assert found.min() >= 0
        assert found.max() <= 1.001


@pytest.mark.parametrize("name", ["full", "light", "seed"])
def test_the_generator_alone_decides(name):
    how = AUGMENTATIONS[name]
    torch.manual_seed(1)
    first = augment(some_tiles(), how, generator(4))
    torch.manual_seed(2)
    assert torch.equal(first, augment(some_tiles(), how, generator(4)))
    assert not torch.equal(first, augment(some_tiles(), how, generator(5)))


def test_white_stays_white_under_stain_jitter():
    white = torch.full((4, 8, 8, 3), 255, dtype=torch.uint8)
    assert torch.allclose(
        augment(white, Augmentation(stain=0.5, colour=0.3), generator()), torch.ones(4, 3, 8, 8), atol=1e-6
    )


def test_stain_jitter_changes_each_tile_in_its_own_way():
    same = some_tiles(1).repeat(5, 1, 1, 1)
    means = augment(same, Augmentation(stain=0.3), generator()).mean((2, 3))
    assert len({tuple(row) for row in means.tolist()}) == 5


def test_mixup_blends_tiles_and_labels_alike():
    labels = torch.tensor([0.0, 1.0, 0.0, 1.0])
    images = labels.view(4, 1, 1, 1).expand(4, 3, 5, 5)
    blended, targets = mix(images, labels, 0.4, generator(3))
    assert torch.allclose(blended.mean((1, 2, 3)), targets)
    assert ((targets >= 0) & (targets <= 1)).all()
