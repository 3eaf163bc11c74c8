"""One folder that holds an evaluation: CSV, JSON, plots, and a page that needs nothing else.

Every file repeats that it is for research use only, and the caller's notes. All contents are made before the first is
written, each is written beside its place and renamed, and `report.html` comes last, so a killed run leaves no half file
and a page never stands beside figures that are older than it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wsi_idc import USE, __version__
from wsi_idc.csvs import csv_text
from wsi_idc.errors import UsageError
from wsi_idc.evaluate.bootstrap import CALIBRATION_BINS
from wsi_idc.evaluate.maps import draw_slides
from wsi_idc.evaluate.metrics import FIGURES, RESAMPLES, Difference, Evaluation, GroupRow, Results, evaluate
from wsi_idc.evaluate.page import html_page, plain, share
from wsi_idc.evaluate.plots import draw_all, interval, render, short_names
from wsi_idc.evaluate.predictions import Predictions
from wsi_idc.files import write_whole
from wsi_idc.store import StoredSlide


def write_report(
    out_dir: Path,
    models: Sequence[Predictions] | Results,
    *,
    notes: Sequence[str] = (),
    context: Mapping[str, Any] | None = None,
    slides: Sequence[StoredSlide] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Path]:
    """Write the whole evaluation; files of an earlier one in the same folder are replaced.

    Args:
        out_dir: made where it is missing.
        models: predictions, evaluated here, or the results of `evaluate` as they are.
        notes: what every output must say, such as that patients were trained on.
        context: where the figures come from (store, split, bundle, settings): plain values, shown and kept as JSON.
        slides: those of the tiles, in the order of `Predictions.tile`: the worst and the best are shown on the page;
            none, where they are not given.
        resamples: bootstrap resamples; of no account for results.
        seed: the bootstrap's seed; of no account for results.

    Returns:
        The files written, `report.html` last.

    Raises:
        UsageError: models that cannot be evaluated together, or a folder that cannot be written.
        StoreDamageError: a slide that is shown is not what was written.
    """
    results = models if isinstance(models, Results) else evaluate(models, resamples=resamples, seed=seed)
    said = [" ".join(note.split()) for note in notes]
    facts = dict(context or {})
    contents = {name: text.encode() for name, text in _tables(results, said).items()}
    contents["metrics.json"] = (json.dumps(as_json(results, said, facts), indent=2, allow_nan=False) + "\n").encode()
    plots = draw_all(results, said)
    for name, plot in plots.items():
        contents[f"{name}.png"], contents[f"{name}.svg"] = render(plot, "png"), render(plot, "svg")
    sizes = {name: [round(100 * side) for side in plot.get_size_inches()] for name, plot in plots.items()}
    shown = draw_slides(results, slides) if slides else []
    contents["report.html"] = html_page(results, said, facts, contents, sizes, shown).encode()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_whole(out_dir / name, content)
    except OSError as error:
        where, why = error.filename or out_dir, error.strerror or str(error)
        raise UsageError(where, f"cannot be written: {why}", "free space or choose another --out") from error
    return [out_dir / name for name in contents]


def summary_rows(results: Results) -> list[dict[str, str]]:
    """The terminal's table: a row a figure, under "Figure" its name and under each model's name its value in words."""
    rows = [
        {"Figure": words, **{e.predictions.model: interval(e.figures[name]) for e in results.evaluations}}
        for name, words in FIGURES.items()
    ]
    counted = {
        e.predictions.model: f"{len(e.predictions):,} / {e.predictions.n_patients:,}" for e in results.evaluations
    }
    calls = {e.predictions.model: e.predictions.threshold_words for e in results.evaluations}
    return [*rows, {"Figure": "Threshold", **calls}, {"Figure": "Tiles / patients", **counted}]


def difference_rows(results: Results) -> list[dict[str, str]]:
    """The terminal's table of differences.

    Of two models a row a figure: its name, difference, share at or below zero, and the favoured model. Of more a
    matrix of ROC AUC, a model's minus another's, with a star where the interval excludes zero.
    """
    models = [evaluation.predictions.model for evaluation in results.evaluations]
    if len(models) > 2:
        heads = dict(zip(models, short_names(models, 18), strict=True))
        matrix = [(a, {b: results.difference("roc_auc", a, b) for b in models}) for a in models]
        return [
            {"ROC AUC, row - column": a} | {heads[b]: _starred(row) if row else "" for b, row in rows.items()}
            for a, rows in matrix
        ]
    return [
        {
            "Figure": FIGURES[row.figure],
            f"{row.a} - {row.b}": interval(row.value, "signed"),
            "At or below 0": share(row.at_or_below_zero),
            "Favours": results.favours(row),
        }
        for row in results.differences
    ]


def _starred(row: Difference) -> str:
    value = interval(row.value, "signed").partition(" ")[0]
    return f"{value} *" if row.favours else value


def as_json(results: Results, notes: Sequence[str] = (), context: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything but the plots and the per-slide rows, as plain JSON types; an undefined figure is null."""
    whole: dict[str, Any] = plain(
        {
            "format": "wsi-idc-evaluation/1",
            "version": __version__,
            "research_use_only": USE,
            "notes": [*notes, *results.notes()],
            "context": dict(context or {}),
            "interval": {
                "level": 0.95,
                "method": "percentile bootstrap over patients",
                "resamples": results.resamples,
                "seed": results.seed,
            },
            "calibration_error": f"{CALIBRATION_BINS} equal-width bins of P(IDC), arXiv:1706.04599",
            "models": [_model_json(evaluation) for evaluation in results.evaluations],
            "few_patients": results.few is not None,
            "differences": [
                {"model": row.a, "minus": row.b, "figure": row.figure, **asdict(row.value)}
                | {"at_or_below_zero": row.at_or_below_zero, "favours": row.favours or None}
                for row in results.differences
            ],
        }
    )
    return whole


def _model_json(evaluation: Evaluation) -> dict[str, Any]:
    data = evaluation.predictions
    return {
        "model": data.model,
        "title": data.title,
        "thresholds": data.thresholds,
        "tiles": len(data),
        "positive": int(data.truth.sum()),
        "slides": data.n_slides,
        "patients": data.n_patients,
        "left_out": {"unknown_truth": data.unknown, "no_probability": data.unscored},
        "confusion": asdict(evaluation.confusion),
        "figures": {name: asdict(figure) for name, figure in evaluation.figures.items()},
    }


def _tables(results: Results, notes: Sequence[str]) -> dict[str, str]:
    """Each CSV file's text; `note` is the last column of every row."""
    said = " ".join([USE, *notes])
    tables: dict[str, list[dict[str, Any]]] = {"metrics": [], "per_slide": [], "per_patient": [], "confusion": []}
    for evaluation in results.evaluations:
        data = evaluation.predictions
        model = {"model": data.model}
        sizes = {"tiles": len(data), "patients": data.n_patients}
        own = " ".join([said, *(f"{note}." for note in evaluation.notes)])
        for name, figure in evaluation.figures.items():
            tables["metrics"].append(model | {"figure": name} | asdict(figure) | sizes | {"note": own})
        tables["confusion"].append(
            model | {"threshold": data.threshold_words} | asdict(evaluation.confusion) | sizes | {"note": said}
        )
        for row in evaluation.per_slide:
            tables["per_slide"].append(model | {"slide": row.slide, "patient": row.patient} | _group(row, said))
        for row in evaluation.per_patient:
            tables["per_patient"].append(model | {"patient": row.patient, "slides": row.slides} | _group(row, said))
    few = [] if results.few is None else [f"{results.few} patients only: intervals are rough and likely too narrow."]
    compared = " ".join([said, *few])
    differences = [
        {"model": row.a, "minus": row.b, "figure": row.figure, **asdict(row.value)}
        | {"at_or_below_zero": row.at_or_below_zero, "favours": row.favours, "note": compared}
        for row in results.differences
    ]
    heads = ["model", "minus", "figure", "value", "low", "high", "at_or_below_zero", "favours", "note"]
    texts = {f"{name}.csv": csv_text(rows) for name, rows in tables.items()}
    return texts | {"differences.csv": csv_text(differences, heads)}


def _group(row: GroupRow, note: str) -> dict[str, Any]:
    counted = {"tiles": row.tiles, "positive": row.positive, "mean_probability": row.mean_probability}
    return counted | asdict(row.confusion) | dict(row.figures) | {"note": note}
