"""A tile's neighbours count as a Gaussian field says, and for nothing where there are none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, kv, logit

from wsi_idc.errors import ModelError
from wsi_idc.model.config import Context
from wsi_idc.model.context import by_slide, in_context, smooth_logits
from wsi_idc.settings import TileSpec

SPEC = TileSpec()
CONTEXT = Context(reach_um=2400.0, spread=1.5, mean=-0.8)


def full(rows, columns):
    return np.stack(np.unravel_index(np.arange(rows * columns), (rows, columns)), 1).astype(np.int32)


def smooth(logits, cell, spec=SPEC, reach=2400.0, spread=1.5, mean=0.0, limit=20.0):
    context = Context(reach_um=reach, spread=spread, mean=mean, limit=limit)
    return smooth_logits(np.asarray(logits, float), np.asarray(cell), spec, context)


def test_it_is_the_mean_of_the_field_that_the_paper_gives():
    """Against the Matern covariance in closed form, on scattered cells, away from the approximations of the grid."""
    generator = np.random.default_rng(0)
    cell = full(24, 24)[generator.choice(576, 80, replace=False)]
    logits = generator.normal(size=80)
    reach, spread = 3000.0, 1.2
    distance = 200.0 * np.sqrt(((cell[:, None] - cell[None]) ** 2).sum(-1)) * np.sqrt(8.0) / reach
    near = np.maximum(distance, 1e-9)
    covariance = spread**2 * near * kv(1, near)
    expected = covariance @ np.linalg.solve(covariance + np.eye(80), logits)
    found = smooth(logits, cell, reach=reach, spread=spread)
    assert np.abs(found - expected).max() < 0.06
    assert np.corrcoef(found, expected)[0, 1] > 0.998


def test_a_tile_without_neighbours_keeps_its_logit_drawn_to_the_mean():
    lone = smooth([2.0], [[5, 5]], mean=-1.0, spread=1.5)
    share = 1.5**2 / (1.5**2 + 1.0)
    assert lone == pytest.approx([-1.0 + share * 3.0], abs=0.1)


def test_a_tile_that_is_too_sure_counts_like_one_at_the_limit():
    cell, logits = full(5, 5), np.random.default_rng(3).normal(size=25)
    logits[12] = 4.0
    expected = smooth(logits, cell, limit=4.0)
    assert expected == pytest.approx(smooth(logits, cell))
    for sure in (9.0, np.inf):
        logits[12] = sure
        assert smooth(logits, cell, limit=4.0) == pytest.approx(expected)


def test_the_result_is_scaled_and_shifted():
    cell, probability = full(6, 6), np.random.default_rng(0).random(36)
    plain = in_context(probability, cell, SPEC, CONTEXT)
    bent = in_context(probability, cell, SPEC, CONTEXT.model_copy(update={"temperature": 0.5, "shift": 1.5}))
    assert logit(bent) == pytest.approx(2.0 * logit(plain) + 1.5, abs=1e-4)


def test_noise_on_a_region_goes_and_the_region_stays():
    generator = np.random.default_rng(1)
    cell = full(30, 30)
    truth = (cell[:, 1] >= 15).astype(float) * 4.0 - 2.0
    noisy = truth + generator.normal(0, 2.0, len(cell))
    found = smooth(noisy, cell)
    assert np.abs(found - truth).mean() < 0.4 * np.abs(noisy - truth).mean()
    assert ((found > 0) == (truth > 0)).mean() > 0.97 > ((noisy > 0) == (truth > 0)).mean()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), count=st.integers(1, 40))
def test_neither_the_order_nor_the_place_of_the_tiles_counts(seed, count):
    generator = np.random.default_rng(seed)
    cell = full(9, 9)[generator.choice(81, count, replace=False)]
    logits, order = generator.normal(size=count), generator.permutation(count)
    found = smooth(logits, cell)
    assert smooth(logits[order], cell[order]) == pytest.approx(found[order], abs=1e-6)
    assert smooth(logits, cell + np.array([7, 31])) == pytest.approx(found, abs=1e-6)


def test_overlapping_tiles_are_several_grids_of_tiles_that_do_not():
    generator = np.random.default_rng(2)
    cell = full(10, 14)
    logits = generator.normal(size=len(cell))
    found = smooth(logits, cell, TileSpec(stride_px=25))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own = (cell[:, 0] % 2 == row) & (cell[:, 1] % 2 == column)
        assert found[own] == pytest.approx(smooth(logits[own], cell[own] // 2), abs=1e-9)


def test_a_reach_that_is_too_long_for_the_tiles_is_refused():
    with pytest.raises(ModelError, match=r"context\.reach_um: 2400 um are 75 tiles, more than 60"):
        smooth([1.0], [[0, 0]], TileSpec(size_px=8))


def test_probabilities_stay_probabilities_at_the_ends():
    cell = full(4, 4)
    ends = np.tile(np.array([0.0, 1.0], np.float32), 8)
    found = in_context(ends, cell, SPEC, CONTEXT)
    assert found.dtype == np.float32 and found.shape == (16,)
    assert np.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()
    assert in_context(np.zeros(0, np.float32), np.zeros((0, 2), np.int32), SPEC, CONTEXT).shape == (0,)


def test_the_temperature_comes_last():
    cell, alone = full(3, 3), np.linspace(0.1, 0.9, 9)
    plain = in_context(alone, cell, SPEC, CONTEXT)
    cooled = in_context(alone, cell, SPEC, CONTEXT.model_copy(update={"temperature": 0.5}))
    assert cooled == pytest.approx(expit(logit(plain) * 2.0), abs=1e-5)


def test_slides_do_not_touch_each_other():
    slide = np.array(["b", "a", "b", "a"])
    found = by_slide(slide, lambda own: own.astype(float) + 10.0 * len(own))
    assert found.tolist() == [20.0, 21.0, 22.0, 23.0]


def directly(logits, cell, reach, spread):
    """The surface that `smooth` is to find, by elimination."""
    import scipy.sparse as sparse
    from scipy.sparse.linalg import spsolve

    def line(count):
        laplacian = sparse.diags([-np.ones(count - 1), np.full(count, 2.0), -np.ones(count - 1)], [-1, 0, 1]).tolil()
        laplacian[0, 0] = laplacian[-1, -1] = 1.0
        return laplacian.tocsr()

    kappa, margin = np.sqrt(8.0) / reach, int(np.ceil(reach))
    inside = cell - cell.min(axis=0) + margin
    shape = tuple(inside.max(axis=0) + 1 + margin)
    place = np.ravel_multi_index(tuple(inside.T), shape)
    readings, weight = np.zeros((2, shape[0] * shape[1]))
    readings[place], weight[place] = logits, 1.0
    root = sparse.kronsum(line(shape[1]), line(shape[0])) + kappa**2 * sparse.identity(weight.size)
    matrix = root @ root / (4.0 * np.pi * (kappa * spread) ** 2) + sparse.diags(weight)
    return spsolve(matrix.tocsc(), readings)[place]


def pieces(*corners, rows=9, columns=7):
    return np.concatenate([full(rows, columns) + np.array(corner) for corner in corners])


SHAPES = {
    "one tile": full(1, 1),
    "a row": full(1, 90),
    "a column": full(83, 1),
    "a rectangle": full(21, 30),
    "pieces far apart": pieces((0, 0), (2, 70), (50, 33)),
    "pieces that touch at corners": pieces((0, 0), (9, 7), (18, 14)),
    "every third cell": full(30, 33)[::3],
    "scattered": full(60, 60)[np.random.default_rng(8).choice(3600, 120, replace=False)],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("reach", "spread"), [(20.0, 2.0), (12.0, 1.5), (37.3, 0.3), (0.4, 2.0), (5.0, 60.0)])
def test_the_surface_is_the_one_that_elimination_finds(name, reach, spread):
    cell = SHAPES[name]
    logits = np.random.default_rng(len(name)).normal(0, 3.0, len(cell))
    found = smooth(logits, cell, reach=reach * 200.0, spread=spread)
    assert np.abs(found - directly(logits, cell, reach, spread)).max() < 1e-7


def test_so_it_is_at_the_longest_reach_and_the_widest_spread():
    cell = full(20, 18)[np.random.default_rng(4).choice(360, 150, replace=False)]
    logits = np.random.default_rng(5).normal(0, 3.0, len(cell))
    for spread in (0.05, 100.0):
        found = smooth(logits, cell, reach=60 * 200.0, spread=spread)
        assert np.abs(found - directly(logits, cell, 60.0, spread)).max() < 1e-6


def test_so_it_is_of_more_than_twenty_thousand_tiles():
    generator = np.random.default_rng(6)
    cell = full(170, 150)[generator.random(170 * 150) < 0.85]
    logits = generator.normal(0, 3.0, len(cell))
    found = smooth(logits, cell, reach=20 * 200.0, spread=2.0)
    assert len(cell) > 20_000 and np.abs(found - directly(logits, cell, 20.0, 2.0)).max() < 1e-7


def test_threads_change_no_bit_of_it():
    import cv2
    from threadpoolctl import threadpool_limits

    generator = np.random.default_rng(7)
    cell = full(150, 140)
    logits = generator.normal(size=len(cell))
    results, before = [], cv2.getNumThreads()
    try:
        for threads in (1, 2, 5):
            cv2.setNumThreads(threads)
            with threadpool_limits(threads):
                results.append(smooth(logits, cell).tobytes())
    finally:
        cv2.setNumThreads(before)
    assert len(set(results)) == 1


def test_what_is_no_number_is_an_error_and_no_map():
    with pytest.raises(ModelError, match="no surface over 9 tiles was found"):
        smooth(np.full(9, np.nan), full(3, 3))
