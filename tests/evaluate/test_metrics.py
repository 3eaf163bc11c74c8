"""Figures agree with scikit-learn, and the bootstrap with one that copies rows."""

import csv
import io
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from wsi_idc.errors import UsageError
from wsi_idc.evaluate.bootstrap import calibration_bin, patient_weights, ranking_figures, resampled_figures
from wsi_idc.evaluate.metrics import FIGURES, compare, confusion_of, evaluate, evaluate_one, point_figures
from wsi_idc.evaluate.predictions import predictions


def reference(truth, probability, threshold):
    """Every figure, by scikit-learn and by the definitions; NaN where one class is missing."""
    called = probability >= threshold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = {
            "accuracy": sk.accuracy_score(truth, called),
            "precision": sk.precision_score(truth, called, zero_division=np.nan),
            "recall": sk.recall_score(truth, called, zero_division=np.nan),
            "specificity": sk.recall_score(~truth, ~called, zero_division=np.nan),
            "f1": sk.f1_score(truth, called, zero_division=np.nan),
            "brier": np.mean((probability - truth) ** 2),
        }
    one_class = truth.all() or not truth.any()
    for name, function, value in (
        ("balanced_accuracy", sk.balanced_accuracy_score, called),
        ("roc_auc", sk.roc_auc_score, probability),
        ("average_precision", sk.average_precision_score, probability),
    ):
        figures[name] = np.nan if one_class else function(truth, value)
    figures["ece"] = 0.0
    for number in range(15):
        inside = (probability * 15 >= number) & ((probability * 15 < number + 1) | (number == 14))
        if inside.any():
            figures["ece"] += inside.mean() * abs(probability[inside].mean() - truth[inside].mean())
    return {name: figures[name] for name in FIGURES}


@pytest.mark.parametrize("decimals", [None, 1])
def test_point_figures_are_scikit_learns(decimals, some):
    data = some(decimals=decimals)
    wanted = reference(data.truth, data.probability, 0.4)
    assert point_figures(data.truth, data.probability, data.probability >= 0.4) == pytest.approx(wanted, abs=1e-12)


def test_confusion_counts_a_tile_at_the_threshold_as_called():
    truth = np.array([True, True, True, False, False])
    cells = confusion_of(truth, np.array([0.5, 0.9, 0.49, 0.5, 0.1]) >= 0.5)
    assert (cells.tp, cells.fn, cells.fp, cells.tn) == (2, 1, 1, 1)


def test_calibration_bins_hold_zero_and_one():
    assert calibration_bin(np.array([0.0, 1 / 15 - 1e-9, 1 / 15, 0.5, 1.0])).tolist() == [0, 0, 1, 7, 14]


@pytest.mark.parametrize("decimals", [None, 1])
def test_the_bootstrap_is_one_that_copies_rows(decimals, some):
    data = some(tiles=150, patients=9, decimals=decimals)
    weights = patient_weights(9, 60, seed=4)
    fast = resampled_figures(data, weights)
    names = np.unique(data.patient)
    for index, row in enumerate(weights):
        rows = np.concatenate([np.flatnonzero(data.patient == names[k]) for k in np.repeat(np.arange(9), row)])
        slow = reference(data.truth[rows], data.probability[rows], data.threshold[rows])
        assert {name: values[index] for name, values in fast.items()} == pytest.approx(slow, abs=1e-12, nan_ok=True)


def test_the_interval_is_the_percentiles_of_the_resamples(some):
    evaluation = evaluate_one(some(), resamples=300, seed=3)
    for name, figure in evaluation.figures.items():
        assert (figure.low, figure.high) == tuple(np.percentile(evaluation.samples[name], [2.5, 97.5]))
        assert figure.low <= figure.value <= figure.high or name == "ece"


def test_resamples_draw_as_many_patients_as_there_are_and_follow_the_seed():
    weights = patient_weights(30, 500, seed=1)
    assert (weights.sum(axis=1) == 30).all()
    assert np.array_equal(weights, patient_weights(30, 500, seed=1))
    assert not np.array_equal(weights, patient_weights(30, 500, seed=2))


def test_intervals_are_over_patients_not_tiles(some):
    # Every tile ten times over says nothing new about patients.
    data = some()
    again = [np.tile(part, 10) for part in (data.probability, data.truth, data.slide, data.patient)]
    tenfold = evaluate_one(predictions("a", *again, threshold=0.4), resamples=200)
    once = evaluate_one(data, resamples=200)
    for name in FIGURES:
        assert tenfold.figures[name].low == pytest.approx(once.figures[name].low, abs=1e-9)
        assert tenfold.figures[name].high == pytest.approx(once.figures[name].high, abs=1e-9)


tile_lists = st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40)


@given(tile_lists, st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_weighted_ranking_is_that_of_copied_rows_with_ties(tiles, weight):
    truth, score, owner = (np.array(column) for column in zip(*tiles, strict=True))
    probability = score / 4
    auc, precision = ranking_figures(truth, probability, owner, np.array([weight]))
    copies = np.array(weight)[owner]
    rows = np.repeat(np.arange(len(truth)), copies)
    if len(rows) == 0 or truth[rows].all() or not truth[rows].any():
        assert np.isnan(auc[0])
        assert np.isnan(precision[0])
        return
    assert auc[0] == pytest.approx(sk.roc_auc_score(truth[rows], probability[rows]), abs=1e-12)
    assert precision[0] == pytest.approx(sk.average_precision_score(truth[rows], probability[rows]), abs=1e-12)


def test_a_model_against_itself_differs_by_nothing(some):
    for row in evaluate([some("a"), some("b")], resamples=50).differences:
        assert (row.value.value, row.value.low, row.value.high) == (0, 0, 0)
        assert row.at_or_below_zero == 1
        assert row.favours == ""


def test_differences_are_paired_by_patient(some):
    first, second = some("good", seed=1, noise=0.1), some("poor", seed=2, noise=0.5)
    rows = evaluate([first, second], resamples=80, seed=9).differences
    weights = patient_weights(first.n_patients, 80, seed=9)
    delta = {k: v - resampled_figures(second, weights)[k] for k, v in resampled_figures(first, weights).items()}
    for row in rows:
        assert (row.a, row.b) == ("good", "poor")
        assert (row.value.low, row.value.high) == pytest.approx(tuple(np.percentile(delta[row.figure], [2.5, 97.5])))
        assert row.at_or_below_zero == (delta[row.figure] <= 0).mean()
    favours = {row.figure: row.favours for row in rows}
    assert favours["roc_auc"] == "good"
    assert favours["brier"] == "good"


def test_every_pair_of_models_is_compared_in_the_order_given(some):
    models = [some(name, tiles=60, patients=5) for name in "abc"]
    pairs = [(row.a, row.b) for row in evaluate(models, resamples=5).differences if row.figure == "f1"]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]


def test_models_over_other_tiles_or_labels_are_refused(some):
    data = some(tiles=50)
    fewer = predictions("b", data.probability[:40], data.truth[:40], data.slide[:40], data.patient[:40], threshold=0.5)
    holed = np.where(np.arange(50) == 7, np.nan, data.probability)
    other_hole = np.where(np.arange(50) == 8, np.nan, data.probability)
    flipped = predictions("b", data.probability, ~data.truth, data.slide, data.patient, threshold=0.5)
    with pytest.raises(UsageError, match=r"a and b: scored on different tiles \(50 and 40\)"):
        evaluate([data, fewer])
    with pytest.raises(UsageError, match="different labels"):
        evaluate([data, flipped])
    with pytest.raises(UsageError, match="different tiles"):
        evaluate(
            [
                predictions(n, p, data.truth, data.slide, data.patient, threshold=0.5)
                for n, p in (("a", holed), ("b", other_hole))
            ]
        )
    with pytest.raises(UsageError, match="resampled differently"):
        compare(evaluate_one(data, resamples=5), evaluate_one(data, resamples=6))


def test_no_model_a_model_twice_and_no_resamples_are_refused(some):
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate([])
    with pytest.raises(UsageError, match="a is given twice"):
        evaluate([some(), some()])
    with pytest.raises(UsageError, match="--resamples"):
        evaluate([some()], resamples=0)


def test_tiles_without_truth_or_probability_are_dropped_and_counted():
    part = np.array([0.0, 0.49, 0.5, 1.0, np.nan, np.nan, 1.0])
    probability = np.array([0.1, 0.2, 0.3, 0.4, 0.5, np.nan, np.nan], np.float32)
    data = predictions("m", probability, part, ["s"] * 7, ["p"] * 7, threshold=0.5)
    assert data.truth.tolist() == [False, False, True, True]
    assert data.tile.tolist() == [0, 1, 2, 3]
    assert (data.unknown, data.unscored) == (2, 1)
    assert data.probability.dtype == np.float32
    assert data.notes() == [
        "m: 2 tiles have no label and are left out",
        "m: 1 labelled tiles have no probability and are left out",
    ]


def test_a_slide_without_a_patient_is_a_patient_of_its_own():
    data = predictions("m", [0.1, 0.2, 0.3], [0, 1, 1], ["s", "t", "u"], ["p", "", ""], threshold=0.5)
    assert data.patient.tolist() == ["p", "slide t", "slide u"]
    assert "2 slides have no patient" in data.notes()[0]


@pytest.mark.parametrize(
    ("probability", "truth", "patient", "words"),
    [
        ([], [], [], "no tiles to evaluate"),
        ([0.1, 0.2], [np.nan, np.nan], ["p", "p"], "none of 2 tiles has a label"),
        ([np.nan, np.nan], [1, 0], ["p", "p"], "all probabilities of the 2 labelled tiles are NaN"),
        ([0.1, 1.2], [1, 0], ["p", "p"], "probabilities outside 0 to 1"),
        ([0.1, 0.2], [1, 0], ["p", "q"], "slide s: has two patients, p and q"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_line(probability, truth, patient, words):
    with pytest.raises(UsageError) as caught:
        predictions("m", probability, truth, ["s"] * len(truth), patient, threshold=0.5)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_tile_may_have_a_threshold_of_its_own():
    two = predictions(
        "m", [0.3, 0.3, np.nan, 0.3], [1, 0, 1, 0], ["s", "t", "t", "u"], ["p", "q", "q", "r"],
        threshold=[0.2, 0.4, 0.9, 0.3],
    )  # fmt: skip
    assert two.called.tolist() == [True, False, True]
    assert two.thresholds == [0.2, 0.3, 0.4] and two.threshold_words == "0.2 and 0.3 and 0.4"
    confusion = evaluate_one(two, resamples=20).confusion
    assert (confusion.tp, confusion.fp, confusion.tn, confusion.fn) == (1, 1, 1, 0)


def test_a_threshold_that_is_no_probability_is_refused():
    with pytest.raises(UsageError, match="threshold"):
        predictions("m", [0.1], [1], ["s"], ["p"], threshold=float("nan"))


@pytest.mark.parametrize("truth", [0, 1])
def test_one_class_leaves_figures_undefined_and_says_so(truth):
    data = predictions("m", [0.1, 0.9, 0.4], [truth] * 3, ["s", "t", "u"], ["p", "q", "r"], threshold=0.5)
    evaluation = evaluate_one(data, resamples=20)
    undefined = {name for name, figure in evaluation.figures.items() if np.isnan(figure.value)}
    assert undefined >= {"roc_auc", "average_precision", "balanced_accuracy"}
    assert "roc_auc" not in {name for name, figure in evaluation.figures.items() if not np.isnan(figure.low)}
    kind = "IDC" if truth else "non-IDC"
    assert any(f"{len(undefined)} figures are undefined, since all 3 tiles are {kind}" in n for n in evaluation.notes)


def test_nothing_called_idc_leaves_precision_undefined():
    data = predictions("m", [0.1, 0.2], [1, 0], ["s", "t"], ["p", "q"], threshold=0.5)
    evaluation = evaluate_one(data, resamples=20)
    assert np.isnan(evaluation.figures["precision"].value)
    assert evaluation.figures["f1"].value == 0
    assert any("no tile is called IDC" in note for note in evaluation.notes)


def test_one_patient_has_figures_but_no_interval():
    data = predictions("m", [0.1, 0.9, 0.4], [0, 1, 1], ["s"] * 3, ["p"] * 3, threshold=0.5)
    evaluation = evaluate_one(data, resamples=20)
    assert evaluation.figures["roc_auc"].value == 1
    assert all(np.isnan(figure.low) for figure in evaluation.figures.values())
    assert "m: one patient only, so no figure has an interval" in evaluation.notes


def test_resamples_of_one_class_are_left_out_and_counted():
    data = predictions("m", [0.1, 0.9, 0.4], [0, 1, 1], ["s", "t", "u"], ["p", "q", "r"], threshold=0.5)
    evaluation = evaluate_one(data, resamples=200)
    lost = int(np.isnan(evaluation.samples["roc_auc"]).sum())
    assert 0 < lost < 200
    assert f"m: ROC AUC is undefined in {lost} of 200 resamples, which its interval leaves out" in evaluation.notes
    assert any("3 patients only" in note for note in evaluation.notes)


def test_slides_and_patients_have_the_figures_of_their_own_tiles(some):
    data = some()
    evaluation = evaluate_one(data, resamples=1)
    for rows, key, name in (
        (evaluation.per_slide, data.slide, "slide"),
        (evaluation.per_patient, data.patient, "patient"),
    ):
        assert [getattr(row, name) for row in rows] == np.unique(key).tolist()
        assert sum(row.tiles for row in rows) == len(data)
        for row in rows:
            own = key == getattr(row, name)
            assert dict(row.figures) == pytest.approx(
                reference(data.truth[own], data.probability[own], 0.4), abs=1e-12, nan_ok=True
            )
            assert row.positive == data.truth[own].sum() == row.confusion.tp + row.confusion.fn
            assert row.slides == len(set(data.slide[own]))


def test_the_published_network_has_its_known_figures_on_the_extra_patients(shared_data, published_model):
    runtime = pytest.importorskip("onnxruntime")
    from PIL import Image

    with (shared_data / "idc" / "patients.csv").open() as stream:
        wanted = {row["patient_id"] for row in csv.DictReader(stream) if row["split"] == "extra"}
    session = runtime.InferenceSession(published_model / "model.onnx", providers=["CPUExecutionProvider"])
    truth, patient, probability = [], [], []
    with zipfile.ZipFile(shared_data / "idc" / "patches.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".webp") and name.split("/")[0] in wanted]
        for start in range(0, len(names), 512):
            batch = names[start : start + 512]
            tiles = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in batch])
            probability.append(session.run(["probability"], {"tiles": tiles})[0].ravel())
            truth += [name.split("/")[1] == "1" for name in batch]
            patient += [name.split("/")[0] for name in batch]
    data = predictions("2016", np.concatenate(probability), truth, patient, patient, threshold=0.5)
    evaluation = evaluate_one(data, resamples=200)
    assert data.n_patients == 119
    assert evaluation.figures["roc_auc"].value == pytest.approx(0.908, abs=0.001)
    assert evaluation.figures["f1"].value == pytest.approx(0.717, abs=0.001)
    assert evaluation.figures["balanced_accuracy"].value == pytest.approx(0.787, abs=0.001)
    for figure in evaluation.figures.values():
        assert figure.low < figure.value < figure.high
