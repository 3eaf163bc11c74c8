"""Temperature and threshold do what they say on validation tiles."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from wsi_idc.model.context import by_slide, in_context
from wsi_idc.settings import TileSpec
from wsi_idc.train.calibrate import fit_context, fit_scale, fit_temperature, fit_threshold, sigmoid


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_comes_out(temperature):
    generator = np.random.default_rng(0)
    honest = generator.normal(0, 2, 40_000).astype(np.float32)
    truth = generator.random(len(honest)) < sigmoid(honest)
    assert fit_temperature(honest * np.float32(temperature), truth) == pytest.approx(temperature, rel=0.05)


def test_tiles_told_apart_without_error_keep_a_finite_temperature():
    assert 0.04 < fit_temperature(np.array([-5, 5], np.float32), np.array([False, True])) < 0.06


def test_no_threshold_does_better():
    generator = np.random.default_rng(1)
    truth = generator.random(300) < 0.3
    probability = np.round(np.clip(generator.normal(0.35 + 0.3 * truth, 0.2), 0, 1), 2)

    def worth(threshold: float) -> float:
        called = probability >= threshold
        return f1_score(truth, called) + balanced_accuracy_score(truth, called)

    chosen = fit_threshold(probability, truth)
    assert worth(chosen) == pytest.approx(max(worth(value) for value in np.arange(0.005, 1, 0.01)))


def test_scale_and_shift_that_logits_were_bent_by_are_found():
    generator = np.random.default_rng(2)
    true_logits = generator.normal(-1.0, 2.0, 20_000)
    truth = generator.random(20_000) < sigmoid(true_logits)
    temperature, shift = fit_scale((true_logits + 0.7) * 0.4, truth)
    assert temperature == pytest.approx(0.4, abs=0.02)
    assert shift == pytest.approx(-0.7, abs=0.06)


def test_tiles_told_apart_without_error_keep_a_finite_scale():
    temperature, shift = fit_scale(np.array([-5.0, -1.0]), np.array([False, True]))
    assert 0.04 < temperature < 20 and abs(shift) <= 20


def regions(generator, slides=4, side=16):
    """Slides in two halves, IDC on the right: cells, slide ids, truth."""
    cell = np.stack(np.unravel_index(np.arange(side * side), (side, side)), 1).astype(np.int32)
    names = np.repeat([f"s{index}" for index in range(slides)], side * side)
    truth = np.concatenate([cell[:, 1] >= generator.integers(4, side - 4) for _ in range(slides)])
    return np.tile(cell, (slides, 1)), names, truth


def test_neighbours_count_where_idc_lies_in_regions():
    generator = np.random.default_rng(3)
    cell, slide, truth = regions(generator)
    logits = np.where(truth, 0.5, -0.5) + generator.normal(0, 1.0, len(truth))
    context = fit_context(logits, cell, slide, truth, TileSpec(), mean=0.0)
    assert context is not None
    other = regions(np.random.default_rng(4))
    alone = sigmoid(np.where(other[2], 0.5, -0.5) + np.random.default_rng(5).normal(0, 1.0, len(other[2])))
    together = by_slide(other[1], lambda own: in_context(alone[own], other[0][own], TileSpec(), context))
    assert balanced_accuracy_score(other[2], together >= context.threshold) > 0.9
    assert balanced_accuracy_score(other[2], alone >= 0.5) < 0.75


def test_neighbours_do_not_count_where_they_tell_nothing():
    generator = np.random.default_rng(6)
    cell, slide, _ = regions(generator)
    truth = generator.random(len(cell)) < 0.4
    logits = np.where(truth, 4.0, -4.0) + generator.normal(0, 1.0, len(truth))
    calibrated = logits / fit_temperature(logits, truth)
    assert fit_context(calibrated, cell, slide, truth, TileSpec(), mean=-0.4) is None
