"""The evaluation as one page of HTML that needs nothing else: no script, no font, no picture from elsewhere."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any

from markupsafe import Markup

from wsi_idc import USE
from wsi_idc.colours import stops
from wsi_idc.evaluate.maps import NOTHING, OUTLINE, Panel, Shown
from wsi_idc.evaluate.metrics import FIGURES, Difference, Evaluation, Results
from wsi_idc.evaluate.plots import interval
from wsi_idc.evaluate.style import base_style

SHOWN_ROWS = 500
"""Rows of patients or slides that the page shows for one model; the CSV files hold all of them."""

PLOT_WORDS = {
    "roc": "ROC curves",
    "precision_recall": "Precision-recall curves",
    "reliability": "Reliability: part that is IDC against P(IDC)",
    "per_patient": "ROC AUC and balanced accuracy of each patient",
}


def html_page(
    results: Results,
    notes: Sequence[str],
    context: Mapping[str, Any],
    contents: Mapping[str, bytes],
    sizes: Mapping[str, Sequence[int]],
    shown: Sequence[Shown],
) -> str:
    """The page as HTML, with its plots inside it.

    Args:
        results: the figures.
        notes: the caller's notes, which stand at the top before the results' own.
        context: where the figures come from, shown at the end.
        contents: the plots, `<name>.png` to the file's bytes.
        sizes: each plot's name to its width and height, in any one unit.
        shown: the slides that are shown.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("wsi_idc.evaluate").joinpath("report.html.j2").read_text("utf-8"))
    first = results.evaluations[0].predictions
    names = ", ".join(e.predictions.model for e in results.evaluations)
    return template.render(
        base=Markup(base_style()),
        research_use=USE,
        notes=[*notes, *results.notes()],
        tiles=len(first),
        positive=int(first.truth.sum()),
        slides=first.n_slides,
        patients=first.n_patients,
        resamples=results.resamples,
        seed=results.seed,
        models=[
            {"model": e.predictions.model, "title": e.predictions.title}
            | {"threshold": e.predictions.threshold_words, "cells": e.confusion}
            for e in results.evaluations
        ],
        figures=[
            {"name": words, "cells": [_value_range(interval(e.figures[name])) for e in results.evaluations]}
            for name, words in FIGURES.items()
        ],
        few=results.few,
        pairs=[
            {"a": a, "b": b, "rows": [_difference(results, row) for row in rows]}
            for (a, b), rows in groupby(results.differences, key=lambda row: (row.a, row.b))
            if len(results.evaluations) == 2
        ],
        matrices=_matrices(results) if len(results.evaluations) > 2 else [],
        plots=[
            {"alt": f"{words}: {names}", "width": sizes[name][0], "height": sizes[name][1]}
            | {"data": base64.b64encode(contents[f"{name}.png"]).decode()}
            for name, words in PLOT_WORDS.items()
        ],
        shown=[{"heading": slide.heading, "panels": [_panel(panel) for panel in slide.panels]} for slide in shown],
        gradient=", ".join(stops()) if shown else "",
        outline=f"rgb{OUTLINE}",
        nothing=f"rgb{NOTHING}",
        groups=[group for evaluation in results.evaluations for group in _groups(evaluation)],
        context=[(name, _words(value)) for name, value in context.items()],
    )


def _difference(results: Results, row: Difference) -> dict[str, Any]:
    value, extent = _value_range(interval(row.value, "signed"))
    return {"name": FIGURES[row.figure], "value": value, "range": extent, "favours": results.favours(row)} | {
        "share": share(row.at_or_below_zero)
    }


def _matrices(results: Results) -> list[dict[str, Any]]:
    """A table a figure: each model's minus each other's."""
    models = [evaluation.predictions.model for evaluation in results.evaluations]

    def cell(row: Difference | None) -> dict[str, Any]:
        if row is None:
            return {"value": "", "range": "", "sure": False}
        value, extent = _value_range(interval(row.value, "signed"))
        return {"value": value, "range": extent, "sure": bool(row.favours)}

    return [
        {"name": words, "rows": [(a, [cell(results.difference(name, a, b)) for b in models]) for a in models]}
        for name, words in FIGURES.items()
    ]


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "words": panel.words,
        "width": panel.size[0],
        "height": panel.size[1],
        "source": f"data:image/{panel.kind};base64,{base64.b64encode(panel.content).decode()}",
    }


def _value_range(words: str) -> tuple[str, str]:
    """A figure in words, cut into its value and its interval."""
    value, _, rest = words.partition(" ")
    return value, rest


def _groups(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The page's tables of patients, and of slides where a patient has several."""
    data = evaluation.predictions
    shown = {"roc_auc": "ROC AUC", "f1": "F1", "balanced_accuracy": "Bal. accuracy", "recall": "Recall"}
    shown |= {"specificity": "Specificity", "brier": "Brier"}
    kinds = [("patients", evaluation.per_patient, "per_patient.csv")]
    if data.n_slides != data.n_patients:
        kinds.append(("slides", evaluation.per_slide, "per_slide.csv"))
    groups = []
    for kind, rows, file in kinds:
        worst = sorted(rows, key=lambda row: -row.figures["brier"])[:SHOWN_ROWS]
        ids = ["Patient"] if kind == "patients" else ["Slide", "Patient"]
        groups.append(
            {
                "heading": f"{data.model}: {len(rows):,} {kind}",
                "left_out": len(rows) - len(worst),
                "file": file,
                "heads": [*ids, "Tiles", "IDC", "Mean P(IDC)", *shown.values()],
                "rows": [
                    [row.patient] * (kind == "patients")
                    + [row.slide, row.patient] * (kind == "slides")
                    + [f"{row.tiles:,}", f"{row.positive:,}", _number(row.mean_probability)]
                    + [_number(row.figures[name]) for name in shown]
                    for row in worst
                ],
            }
        )
    return groups


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _words(value: Any) -> str:
    unpacked = plain(value)
    return unpacked if isinstance(unpacked, str) else json.dumps(unpacked, ensure_ascii=False)


def share(value: float) -> str:
    """A share in per cent, or "n/a"."""
    return "n/a" if math.isnan(value) else f"{value:.2%}"


def plain(value: Any) -> Any:
    """A value as JSON has it: NaN and infinities null, NumPy's scalars and arrays unpacked, anything else in words."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
