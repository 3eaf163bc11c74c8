"""The evaluation's figures and plots, where the store has labels and the model may be judged on these patients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsi_idc.errors import StoreDamageError, UsageError
from wsi_idc.model.bundle import LoadedBundle
from wsi_idc.report.entry import Entry
from wsi_idc.report.pictures import Pictures
from wsi_idc.store import Store

if TYPE_CHECKING:
    from wsi_idc.evaluate.gather import SplitName
    from wsi_idc.evaluate.metrics import Results

POSITIVE_FROM = 0.5
"""Part of a tile that is IDC from which its label is positive: the default of `evaluate`."""


@dataclass(frozen=True)
class Plot:
    """A plot: its picture's name, what it shows, and its size in pixels."""

    name: str
    words: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Judged:
    """What labels say of the maps, or why they are not asked.

    Attributes:
        why_not: why there are no figures.
        split: whose slides these are.
        notes: what must be said of them.
        rows: figure and value, in words.
        plots: the evaluation's.
    """

    why_not: str = ""
    split: str = ""
    notes: Sequence[str] = ()
    rows: Sequence[tuple[str, str]] = ()
    plots: Sequence[Plot] = ()


def judge(
    store: Store, bundle: LoadedBundle | None, entries: Sequence[Entry], pictures: Pictures, threshold: float | None
) -> Judged | None:
    """The evaluation over the test slides, or over all labelled ones where none is called test; None without labels.

    `gather` decides whether the model may be judged; what it refuses is told.

    Args:
        store: the store, all of it: figures of a part are not shown.
        bundle: the model; None where it is not at hand.
        entries: the page's slides.
        pictures: where plots go.
        threshold: the user's, in place of the model's: then there are no figures, for evaluate has the model's.

    Raises:
        UsageError: plots cannot be written.
    """
    labelled = [entry for entry in entries if entry.labelled]
    if not labelled:
        return None
    if bundle is None:
        return Judged("The model is not at hand, nor whom it was trained on: give its folder to --model.")
    if threshold is not None:
        return Judged("Figures are at the model's own threshold: leave --threshold out, or run wsi-idc evaluate.")
    # Most stores have no labels: their pages do without matplotlib and scikit-learn.
    from wsi_idc.evaluate.gather import gather
    from wsi_idc.evaluate.metrics import evaluate
    from wsi_idc.evaluate.report import summary_rows

    split: SplitName = "test" if any(entry.known.get("split") == "test" for entry in labelled) else "all"
    try:
        found = gather(store, [bundle], split, positive_from=POSITIVE_FROM, trained_on=False)
        results = evaluate(found.models)
    except (UsageError, StoreDamageError) as error:
        subject = "" if error.subject.startswith("--") else f"{error.subject}: "
        return Judged(f"{subject}{error.problem}.", split)
    notes = [*found.notes, *results.notes()]
    rows = [(row["Figure"], row[bundle.fields.name]) for row in summary_rows(results)]
    return Judged("", split, notes, rows, _plots(results, found.notes, pictures))


def _plots(results: "Results", notes: Sequence[str], pictures: Pictures) -> list[Plot]:
    from wsi_idc.evaluate.page import PLOT_WORDS
    from wsi_idc.evaluate.plots import draw_all, render

    plots = draw_all(results, notes)
    return [
        Plot(
            pictures.add(render(plots[name], "png"), "png"),
            words,
            (round(100 * plots[name].get_figwidth()), round(100 * plots[name].get_figheight())),
        )
        for name, words in PLOT_WORDS.items()
    ]
