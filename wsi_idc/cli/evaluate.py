"""`wsi-idc evaluate`: maps against labels."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc import USE
from wsi_idc.cli.options import DEFAULT_STORE, JsonOption, QuietOption, StoreOption, console_for
from wsi_idc.errors import UsageError


def evaluate(
    store: StoreOption = DEFAULT_STORE,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            envvar="WSI_IDC_MODEL",
            help="A model bundle, or the folder of train --folds; several are compared. [default: the one that ships]",
            metavar="BUNDLE",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val, test, or all slides with labels.")] = "test",
    out: Annotated[Path, typer.Option(help="Folder for tables, plots and page.", metavar="DIR")] = Path("evaluation"),
    positive_from: Annotated[float, typer.Option(help="IDC part that makes a tile positive.")] = 0.5,
    trained_on: Annotated[
        bool, typer.Option("--trained-on", help="Also judge a model on patients it was trained on, and say so.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Also judge each model by its tiles alone, without neighbours.")
    ] = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare the maps of a store with its labels: figures with intervals, plots, one HTML page."""
    console = console_for(json_lines=json_lines, quiet=quiet)
    if split not in ("train", "val", "test", "all"):
        raise UsageError("--split", f"{split!r} is not a split", "give train, val, test or all")
    from typing import cast

    from wsi_idc.evaluate.gather import SplitName, gather
    from wsi_idc.evaluate.held_out import FILE, read_held_out
    from wsi_idc.evaluate.metrics import evaluate as compute
    from wsi_idc.model.bundle import SHIPPED, read_bundle
    from wsi_idc.store import open_store

    found = gather(
        open_store(store),
        [read_held_out(path) if (path / FILE).is_file() else read_bundle(path) for path in model or [SHIPPED]],
        cast(SplitName, split),
        positive_from=positive_from,
        trained_on=trained_on,
        alone=alone,
    )
    results = compute(found.models)
    from wsi_idc.evaluate.report import as_json, difference_rows, summary_rows, write_report

    context = {"store": str(store), "split": split, "positive from": positive_from}
    files = write_report(out, results, notes=found.notes, context=context, slides=found.slides)
    if json_lines:
        console.record("evaluation", **as_json(results, found.notes, context))
    for note in [*found.notes, *results.notes()]:
        console.line(f"note: {note}")
    for rows in (summary_rows(results), difference_rows(results)):
        if rows:
            console.table(list(rows[0]), [list(row.values()) for row in rows])
    if len(results.evaluations) > 2:
        console.line("* the 95 % interval excludes zero; intervals and the other figures are on the page")
    if results.few is not None and results.differences:
        console.line(f"what {results.few} patients favour is a hint: their intervals are likely too narrow")
    console.line(f"wrote {files[-1]} and {len(files) - 1} files beside it. {USE}")
