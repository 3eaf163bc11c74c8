"""The course of a training: one table from the logs of every attempt, and a plot of it."""

import csv
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

COLUMNS = ("epoch", "train_loss", "val_loss", "val_auc", "lr")


def merge_logs(folder: Path) -> list[dict[str, float]]:
    """One row an epoch, from the `metrics.csv` of each attempt; a later attempt replaces an epoch it did again."""
    epochs: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("*/metrics.csv")):
        fresh: dict[int, dict[str, float]] = {}
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                if not row.get("epoch"):
                    continue
                target = fresh.setdefault(int(row["epoch"]), {})
                target.update({key: float(value) for key, value in row.items() if value})
        epochs.update({number: row for number, row in fresh.items() if "val_loss" in row})
    return [
        {"epoch": number + 1, **{key: epochs[number].get(key, float("nan")) for key in COLUMNS[1:]}}
        for number in sorted(epochs)
    ]


def draw_history(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and AUC by epoch, as a PNG; epochs are marked, since a line through one of them shows nothing."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for key, label, style in (("train_loss", "training", "o-"), ("val_loss", "validation", "s--")):
        left.plot(epochs, [row[key] for row in rows], style, markersize=4, label=label)
    left.set(xlabel="epoch", ylabel="binary cross-entropy", title="Loss")
    left.legend()
    right.plot(epochs, [row["val_auc"] for row in rows], "s--", markersize=4, color="C1")
    right.set(xlabel="epoch", ylabel="ROC AUC", title="Validation")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()
