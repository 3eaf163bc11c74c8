"""Temperature and threshold do what they say on validation tiles."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from wsi_idc.train.calibrate import fit_temperature, fit_threshold, sigmoid
from wsi_idc.train.cross_validation import centred


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


def test_folds_are_put_together_at_their_own_thresholds():
    probability = np.array([0.1, 0.2999, 0.3001, 0.9], np.float32)
    assert (centred(probability, 0.3) >= 0.5).tolist() == [False, False, True, True]
    assert np.allclose(centred(probability, 0.5), probability, atol=1e-6)
