"""Plots of one or several models: ROC, precision-recall, reliability and the spread over patients.

Colours are Okabe and Ito's, which colour-blind readers tell apart (Color Universal Design, 2008), and lines also differ
in their dashes. Figures are matplotlib objects of their own; pyplot and its global state are not used.
"""

import textwrap
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from wsi_idc import USE
from wsi_idc.evaluate.bootstrap import CALIBRATION_BINS, calibration_bin
from wsi_idc.evaluate.metrics import FIGURES, Figure, Results

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))

_WIDTH = 6.4
_LINE = 0.17
"""Height in inches of one line of the footer."""
_UNDEFINED = "undefined:\none class only"


def draw_all(results: Results, notes: Sequence[str] = ()) -> dict[str, Canvas]:
    """Every plot by its file name without suffix; the notes stand in each footer after the research-use line."""
    footer = [USE, *notes]
    drawers: dict[str, Callable[[Results, Sequence[str]], Canvas]] = {
        "roc": draw_roc,
        "precision_recall": draw_precision_recall,
        "reliability": draw_reliability,
        "per_patient": draw_per_patient,
    }
    return {name: _laid_out(draw(results, footer)) for name, draw in drawers.items()}


def render(figure: Canvas, kind: Literal["png", "svg"]) -> bytes:
    """The plot as a file's content; the same figures give the same bytes."""
    stream = BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "wsi-idc"}):
        figure.savefig(stream, format=kind, dpi=150, metadata=metadata)
    return stream.getvalue()


def draw_roc(results: Results, footer: Sequence[str]) -> Canvas:
    """ROC curves, each with its operating point and AUC."""
    from sklearn.metrics import roc_curve

    figure, (axes, key) = _canvas("ROC", footer, n_models=len(results.evaluations), panels=(5.6,))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    labels = _labels(results, "roc_auc")
    for index, evaluation in enumerate(results.evaluations):
        data = evaluation.predictions
        label = labels[index]
        if np.isnan(evaluation.figures["roc_auc"].value):
            axes.plot([], [], **_line(index), label=label)
            _say(axes, _UNDEFINED)
            continue
        false_positive, recall, _ = roc_curve(data.truth, data.probability)
        axes.plot(false_positive, recall, **_line(index), label=label)
        at = evaluation.figures
        axes.plot(1 - at["specificity"].value, at["recall"].value, **_point(index))
    axes.set(xlabel="1 - specificity", ylabel="Recall (sensitivity)")
    _square(axes)
    _legend(key, axes, point="operating point")
    return figure


def draw_precision_recall(results: Results, footer: Sequence[str]) -> Canvas:
    """Precision-recall curves, each with its operating point and average precision, over the share of IDC tiles."""
    from sklearn.metrics import precision_recall_curve

    figure, (axes, key) = _canvas("Precision and recall", footer, n_models=len(results.evaluations), panels=(5.6,))
    share = float(results.evaluations[0].predictions.truth.mean())
    axes.axhline(share, color="0.6", linewidth=1, linestyle=":")
    axes.annotate(
        f"share of IDC tiles {share:.3f}",
        (0.01, share),
        xytext=(0, 3),
        textcoords="offset points",
        color="0.35",
        size=8,
    )
    labels = _labels(results, "average_precision")
    for index, evaluation in enumerate(results.evaluations):
        data = evaluation.predictions
        label = labels[index]
        if np.isnan(evaluation.figures["average_precision"].value):
            axes.plot([], [], **_line(index), label=label)
            _say(axes, _UNDEFINED)
            continue
        precision, recall, _ = precision_recall_curve(data.truth, data.probability, drop_intermediate=True)
        axes.plot(recall, precision, **_line(index), label=label, drawstyle="steps-post")
        axes.plot(evaluation.figures["recall"].value, evaluation.figures["precision"].value, **_point(index))
    axes.set(xlabel="Recall (sensitivity)", ylabel="Precision")
    _square(axes)
    _legend(key, axes, point="operating point")
    return figure


def draw_reliability(results: Results, footer: Sequence[str]) -> Canvas:
    """Part that is IDC against mean probability in each of 15 equal-width bins, over a histogram of probabilities."""
    figure, (upper, lower, key) = _canvas("Reliability", footer, n_models=len(results.evaluations), panels=(5.6, 1.6))
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    labels = _labels(results, "ece", "ECE")
    for index, evaluation in enumerate(results.evaluations):
        data = evaluation.predictions
        score = data.probability.astype(np.float64)
        bins = calibration_bin(score)
        tiles = np.bincount(bins, minlength=CALIBRATION_BINS)
        held = tiles > 0
        mean = np.bincount(bins, score, CALIBRATION_BINS)[held] / tiles[held]
        part = np.bincount(bins, data.truth, CALIBRATION_BINS)[held] / tiles[held]
        upper.plot(mean, part, **_line(index), marker="o", markersize=4, label=labels[index])
        lower.stairs(tiles, edges, color=_line(index)["color"], linestyle=_line(index)["linestyle"], linewidth=1.4)
    upper.set(ylabel="Part of the tiles that is IDC")
    upper.tick_params(labelbottom=False)
    _square(upper)
    lower.set(xlabel="P(IDC)", ylabel="Tiles", xlim=(-0.02, 1.02), yscale="log")
    lower.set_ylim(bottom=0.7)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    lower.grid(color="0.9", linewidth=0.6)
    _legend(key, upper)
    return figure


def draw_per_patient(results: Results, footer: Sequence[str]) -> Canvas:
    """Each patient's ROC AUC and balanced accuracy, with quartiles; whiskers reach from 5 to 95 %."""
    n_models = len(results.evaluations)
    figure = _page("Patients", footer, max(_WIDTH, 1.2 + 2.8 * n_models), 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    lowest = min(_patients(axes, results, name) for axes, name in ((left, "roc_auc"), (right, "balanced_accuracy")))
    left.set(ylabel="One point a patient", ylim=(max(lowest - 0.03, -0.02), 1.02))
    return figure


def _patients(axes: Axes, results: Results, name: str) -> float:
    """One figure of each patient, model beside model; returns the lowest, or 0.48."""
    n_models = len(results.evaluations)
    jitter = np.random.default_rng(0)
    lowest, ticks = 0.48, []
    models = short_names([evaluation.predictions.model for evaluation in results.evaluations], 18)
    for index, evaluation in enumerate(results.evaluations):
        values = np.array([row.figures[name] for row in evaluation.per_patient])
        values = values[~np.isnan(values)]
        model = _plain(models[index])
        ticks.append(f"{model}\n{len(values):,} of {len(evaluation.per_patient):,}")
        if not len(values):
            continue
        lowest = min(lowest, float(values.min()))
        offset = jitter.uniform(-0.3, 0.3, len(values))
        axes.scatter(index + offset, values, s=12, color=_line(index)["color"], alpha=0.5, linewidths=0)
        looks: dict[str, Any] = {"showfliers": False, "manage_ticks": False, "medianprops": {"color": "0", "lw": 1.8}}
        axes.boxplot(values, positions=[index], widths=0.7, whis=(5, 95), **looks)
    if not axes.collections:
        _say(axes, "undefined: no patient\nhas both classes")
    axes.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
    axes.set(title=FIGURES[name], xlim=(-0.6, n_models - 0.4), xlabel="Patients with both classes, of all")
    axes.set_xticks(range(n_models), ticks, size=8)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    return lowest


def _canvas(title: str, footer: Sequence[str], *, n_models: int, panels: Sequence[float]) -> tuple[Canvas, list[Axes]]:
    """Panels of the given heights in inches above each other, the last one for the legend, and the footer below."""
    heights = [*panels, 0.22 * (n_models + 1) + 0.1]
    figure = _page(title, footer, _WIDTH, sum(heights) + 0.7)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    return figure, [figure.add_subplot(grid[row, 0]) for row in range(len(heights))]


def _page(title: str, footer: Sequence[str], width: float, body: float) -> Canvas:
    """An empty plot `width` by `body` inches with a title, and the footer below it."""
    lines = [part for note in footer for part in textwrap.wrap(" ".join(note.split()), int(width * 15))]
    foot = _LINE * len(lines) + 0.12
    height = body + foot
    figure = Canvas(figsize=(width, height), facecolor="white")
    figure.set_layout_engine("constrained", rect=(0, foot / height, 1, body / height))
    figure.suptitle(title, size=13)
    place: dict[str, Any] = {"x": 0.1 / width, "y": 0.06 / height, "va": "bottom"}
    figure.text(s=_plain("\n".join(lines)), size=8, color="0.25", linespacing=1.35, **place)
    return figure


def _legend(key: Axes, axes: Axes, point: str = "") -> None:
    """One line a model, in a panel of its own where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    drawn = [line for line in axes.lines if line.get_marker() == "o" and np.size(line.get_xdata())]
    if point and drawn:
        handles.append(Line2D([], [], linestyle="", marker="o", color="0.4", markersize=7))
        labels.append(point)
    key.axis("off")
    key.legend(handles, labels, loc="center", frameon=False, fontsize=9, borderaxespad=0)


def _square(axes: Axes) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _line(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.8,
    }


def _point(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": "o",
        "markersize": 8,
        "markeredgecolor": "white",
        "zorder": 5,
    }


def _labels(results: Results, name: str, short: str = "") -> list[str]:
    """Each model's line in the legend: its name and one figure."""
    models = short_names([evaluation.predictions.model for evaluation in results.evaluations], 40)
    return [
        _plain(f"{model}: {short or FIGURES[name]} {interval(evaluation.figures[name])}")
        for model, evaluation in zip(models, results.evaluations, strict=True)
    ]


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Names of at most so many characters, cut in their middle; those that would then be alike have their number."""
    head = (width - 1) // 2
    cut = [name if len(name) <= width else f"{name[:head]}…{name[head + 1 - width :]}" for name in names]
    return [f"{number}: {name}"[:width] if cut.count(name) > 1 else name for number, name in enumerate(cut, start=1)]


def interval(figure: Figure, signed: Literal["signed", "unsigned"] = "unsigned") -> str:
    """A figure with its interval in words: `0.908 (0.888 to 0.931)`, or "n/a"."""
    sign = "+" if signed == "signed" else ""
    if np.isnan(figure.value):
        return "n/a"
    if np.isnan(figure.low):
        return f"{figure.value:{sign}.3f} (no interval)"
    return f"{figure.value:{sign}.3f} ({figure.low:{sign}.3f} to {figure.high:{sign}.3f})"


def _laid_out(figure: Canvas) -> Canvas:
    """The plot with its panels in place for good: each further draw would move them by a hair."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _say(axes: Axes, words: str) -> None:
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.5, words, color="0.35", backgroundcolor="white", **place)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
