"""Plots are whole, say what they must, and cope with what is undefined."""

import io
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from wsi_idc import USE
from wsi_idc.evaluate.metrics import evaluate
from wsi_idc.evaluate.plots import COLOURS, draw_all, interval, render, short_names
from wsi_idc.evaluate.predictions import predictions

NOTE = "These patients were trained on."


@pytest.fixture(scope="module")
def two_models(some):
    return evaluate([some("first", seed=1), some("second", seed=2)], resamples=20)


def words(figure):
    return [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]


def test_each_plot_says_research_use_and_the_notes(two_models):
    plots = draw_all(two_models, [NOTE])
    assert set(plots) == {"roc", "precision_recall", "reliability", "per_patient"}
    for figure in plots.values():
        assert f"{USE}\n{NOTE}" in words(figure)
        svg = render(figure, "svg").decode()
        assert USE in svg
        assert NOTE in svg


def test_png_and_svg_open_and_are_the_same_each_time(two_models):
    figure = draw_all(two_models)["roc"]
    again = draw_all(two_models)["roc"]
    png = Image.open(io.BytesIO(render(figure, "png")))
    assert png.format == "PNG"
    assert min(png.size) > 600
    assert ElementTree.fromstring(render(figure, "svg")).tag.endswith("svg")
    assert render(figure, "svg") == render(again, "svg")
    assert render(figure, "png") == render(again, "png")


def test_all_models_are_drawn_apart_and_named_with_their_figure(two_models):
    figure = draw_all(two_models)["roc"]
    axes = figure.axes[0]
    curves = {line.get_color(): line.get_linestyle() for line in axes.lines if line.get_label().find("ROC AUC") > 0}
    assert list(curves) == list(COLOURS[:2])
    assert len(set(curves.values())) == 2
    for evaluation in two_models.evaluations:
        name = evaluation.predictions.model
        assert f"{name}: ROC AUC {interval(evaluation.figures['roc_auc'])}" in words(figure)


def test_the_roc_curve_ends_at_its_corners_and_holds_the_operating_point(two_models):
    axes = draw_all(two_models)["roc"].axes[0]
    curve = next(line for line in axes.lines if line.get_label().startswith("first"))
    point = next(line for line in axes.lines if line.get_marker() == "o")
    x, y = curve.get_data()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    # scikit-learn drops points on straight parts, so the operating point lies on the line, not always on a vertex.
    at, height = float(point.get_xdata()[0]), float(point.get_ydata()[0])
    below, above = np.interp([at - 1e-9, at + 1e-9], x, y)
    assert min(below, y[np.isclose(x, at)].min(initial=1)) - 1e-9 <= height
    assert height <= max(above, y[np.isclose(x, at)].max(initial=0)) + 1e-9


def test_reliability_has_each_held_bins_mean_and_part():
    data = predictions("m", [0.01, 0.03, 0.5, 0.98], [0, 1, 1, 1], list("stuv"), list("pqrs"), threshold=0.5)
    axes = draw_all(evaluate([data], resamples=5))["reliability"].axes[0]
    line = next(line for line in axes.lines if line.get_marker() == "o")
    assert line.get_xdata() == pytest.approx([0.02, 0.5, 0.98])
    assert line.get_ydata() == pytest.approx([0.5, 1, 1])


def test_one_class_draws_a_word_in_place_of_a_curve():
    data = predictions("m", [0.1, 0.4], [0, 0], ["s", "t"], ["p", "q"], threshold=0.5)
    plots = draw_all(evaluate([data], resamples=5))
    for name in ("roc", "precision_recall", "per_patient"):
        assert any("undefined" in text for text in words(plots[name]))
    for figure in plots.values():
        assert render(figure, "png").startswith(b"\x89PNG")


def test_a_name_with_dollars_is_not_taken_for_mathematics(some):
    data = some("a$_{broken$b$", tiles=60, patients=5)
    for figure in draw_all(evaluate([data], resamples=5), ["costs $5 or $6"]).values():
        assert render(figure, "svg")


def test_nothing_drawn_lies_outside_the_picture(two_models):
    long = ["A note that goes on and on about what was trained on what, and by whom, and why that matters. " * 4]
    for figure in draw_all(two_models, long).values():
        width, height = figure.get_size_inches() * figure.dpi
        footer = next(text for text in figure.texts if USE in text.get_text()).get_window_extent()
        assert footer.x0 >= 0
        assert footer.y0 >= 0
        assert footer.x1 <= width
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert footer.y1 <= box.y0 + 1
            assert box.x0 >= -1
            assert box.x1 <= width + 1
            assert box.y1 <= height + 1


def test_short_names_stay_apart():
    assert short_names(["a", "b"], 18) == ["a", "b"]
    seeds = short_names([f"a-model-with-a-long-name-seed-{seed}" for seed in (1, 2)], 18)
    assert seeds == ["a-model-…me-seed-1", "a-model-…me-seed-2"]
    middles = short_names([f"the-same-beginning-{word}-the-same-ending" for word in ("x", "y")], 18)
    assert len(set(middles)) == 2
    assert all(len(name) <= 18 for name in [*seeds, *middles])


def test_pyplot_stays_out_of_it():
    code = "import sys, wsi_idc.evaluate.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
