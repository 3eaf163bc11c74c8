"""The command line: parse, call, print, exit code. Heavy imports happen inside commands.

Exit codes: 0 all slides done, 1 some failed, 2 bad usage, manifest, settings or model, 75 another run holds the store,
130 or 143 interrupted.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from wsi_idc import USE, __version__
from wsi_idc.console import Console
from wsi_idc.errors import UsageError, WsiIdcError, system_reason

if TYPE_CHECKING:
    from wsi_idc.cluster import Summary
    from wsi_idc.manifest import Row

app = typer.Typer(
    name="wsi-idc",
    help=f"Probability maps of invasive ductal carcinoma (IDC) from whole-slide images. {USE}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="WSI_IDC_STORE", help="The tile store, a folder.", metavar="STORE")
]
OnlyOption = Annotated[
    list[str] | None, typer.Option("--only", metavar="ID", help="Limit to this slide; may be repeated.")
]
WorkersOption = Annotated[
    int, typer.Option("--workers", help="Local worker processes; 0: all in this process, by threads.")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of each task. [default: the cores, shared evenly]")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do again what is up to date.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print only what went wrong.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Also say what was skipped, and why.")]

DEFAULT_STORE = Path("tiles.zarr")


def _console(*, json_lines: bool, quiet: bool = False, verbose: bool = False) -> Console:
    console = Console(json_lines=json_lines, verbosity=verbose - quiet)
    global _current
    _current = console
    return console


_current = Console()


def _version(value: bool) -> None:
    if value:
        print(f"wsi-idc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Everything is in the commands."""


def _finish(console: Console, command: str, summary: "Summary") -> None:
    """The closing table and the exit code."""
    console.summary(command, summary)
    if summary.failures:
        raise typer.Exit(1)


def _limit(rows: "list[Row]", only: list[str] | None) -> "list[Row]":
    """The rows asked for by `--only`."""
    import difflib

    known = [row.slide_id for row in rows]
    for name in only or []:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else ""
            raise UsageError(f"--only {name}", "no such slide_id in the manifest", hint)
    return [row for row in rows if not only or row.slide_id in only]


@app.command()
def extract(
    manifest: Annotated[Path, typer.Argument(help="CSV with a column path; see the README for the others.")],
    store: StoreOption = DEFAULT_STORE,
    tile_size: Annotated[int | None, typer.Option(help="Tile side in pixels. [default: 50]")] = None,
    mpp: Annotated[float | None, typer.Option(help="Tile resolution in um/px. [default: 4.0]")] = None,
    stride: Annotated[int | None, typer.Option(help="Pixels from tile to tile. [default: the tile size]")] = None,
    last: Annotated[
        str | None, typer.Option(help="Tiles over the slide's edge: keep, or drop. [default: keep]", metavar="RULE")
    ] = None,
    tissue: Annotated[
        str | None,
        typer.Option(help="Tissue mask: default, otsu, morphological or none. [default: default]", metavar="METHOD"),
    ] = None,
    min_tissue: Annotated[
        float | None, typer.Option(help="Least part of a tile that is tissue. [default: 0.05]")
    ] = None,
    annotation_class: Annotated[
        str | None, typer.Option(help="The annotations' class that is positive. [default: IDC]")
    ] = None,
    no_pixels: Annotated[
        bool, typer.Option("--no-pixels", help="Store where the tiles are, not their pixels.")
    ] = False,
    workers: WorkersOption = 0,
    threads: ThreadsOption = None,
    only: OnlyOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Cut the tissue of a manifest's slides into tiles."""
    console = _console(json_lines=json_lines, quiet=quiet, verbose=verbose)
    from wsi_idc.manifest import read_manifest
    from wsi_idc.settings import ExtractSettings, TileSpec, build

    spec = build(TileSpec, size_px=tile_size, mpp=mpp, stride_px=stride, last=last)
    settings = build(
        ExtractSettings,
        tile=spec,
        tissue=tissue,
        min_tissue=min_tissue,
        annotation_class=annotation_class,
        pixels=not no_pixels,
        workers=workers,
        threads=threads,
    )
    rows = _limit(read_manifest(manifest), only)
    from wsi_idc import extract as stage

    if dry_run:
        from wsi_idc.store import open_store

        existing = open_store(store) if store.exists() else None
        planned = stage.plan_slides(rows, existing, settings, force=force)
        console.plans({slide.row.slide_id: slide.plan for slide in planned})
        return
    with console.progress("extract") as listener:
        summary = stage.extract(rows, store, settings, force=force, listener=listener)
    _finish(console, "extract", summary)


@app.command()
def infer(
    store: StoreOption = DEFAULT_STORE,
    model: Annotated[
        Path | None,
        typer.Option(
            envvar="WSI_IDC_MODEL", help="A model bundle's folder. [default: the one that ships]", metavar="BUNDLE"
        ),
    ] = None,
    workers: WorkersOption = 0,
    threads: ThreadsOption = None,
    gpus: Annotated[int, typer.Option(help="GPUs to use, one process each; 0: the CPU.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Tiles scored together. [default: 64]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto (int8 where the bundle has it), float32 or int8.", metavar="PRECISION")
    ] = None,
    only: OnlyOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score the tiles of a store, and write one probability map a slide."""
    console = _console(json_lines=json_lines, quiet=quiet, verbose=verbose)
    from wsi_idc.settings import InferSettings, build

    settings = build(
        InferSettings, batch_size=batch_size, workers=workers, threads=threads, gpus=gpus, precision=precision
    )
    if settings.gpus and settings.workers:
        raise UsageError("--gpus", "cannot go with --workers", "leave one of them out")
    from wsi_idc import infer as stage
    from wsi_idc.model.bundle import SHIPPED, read_bundle

    bundle = read_bundle(model or SHIPPED)
    if dry_run:
        from wsi_idc.store import open_store

        choice = stage.choose_model(bundle, settings)
        console.plans(stage.plan_maps(open_store(store), bundle, choice, only=only or [], force=force))
        return
    with console.progress("infer") as listener:
        summary = stage.infer(store, bundle, settings, only=only or [], force=force, listener=listener)
    _finish(console, "infer", summary)


@app.command()
def train(
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path, typer.Option(help="The bundle to write.", metavar="BUNDLE")] = Path("model"),
    recipe: Annotated[str | None, typer.Option(help="default or seed. [default: default]")] = None,
    network: Annotated[str | None, typer.Option(help="resnet50 or idc-2016. [default: resnet50]")] = None,
    activation: Annotated[str | None, typer.Option(help="relu or elu. [default: the recipe's]")] = None,
    stem: Annotated[str | None, typer.Option(help="standard, stride-1 or no-pool. [default: standard]")] = None,
    input_px: Annotated[int | None, typer.Option("--input", help="Side the network sees. [default: 50, or 32]")] = None,
    flips: Annotated[str | None, typer.Option(help="none, or averaged at inference. [default: the recipe's]")] = None,
    init: Annotated[Path | None, typer.Option(help="Start from this bundle's weights.", metavar="BUNDLE")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Also learn this bundle's answers.", metavar="BUNDLE")] = None,
    split_by: Annotated[
        str | None, typer.Option(help="patient; or tile, which leaks and warns. [default: patient]")
    ] = None,
    val_split: Annotated[
        float | None, typer.Option(help="Part of the patients that validate, where none has a split. [default: 0.15]")
    ] = None,
    folds: Annotated[int | None, typer.Option(help="Cross-validate by patient; 0: train once. [default: 0]")] = None,
    cross_validation: Annotated[
        Path | None,
        typer.Option(
            help="A --folds run of the same recipe: its held-out patients calibrate too; its figures go into the card.",
            metavar="FOLDER",
        ),
    ] = None,
    positive_from: Annotated[
        float | None, typer.Option(help="IDC part that makes a tile positive. [default: 0.5]")
    ] = None,
    balance: Annotated[str | None, typer.Option(help="none, weights or sampling. [default: none]")] = None,
    epochs: Annotated[int | None, typer.Option(help="[default: the recipe's]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="[default: the recipe's]")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. [default: the recipe's]")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without gain; 0: never stop. [default: the recipe's]")
    ] = None,
    mixup: Annotated[float | None, typer.Option(help="[default: the recipe's]")] = None,
    smoothing: Annotated[float | None, typer.Option(help="Label smoothing. [default: the recipe's]")] = None,
    augmentation: Annotated[str | None, typer.Option(help="full, light or seed. [default: the recipe's]")] = None,
    context: Annotated[
        bool | None,
        typer.Option("--context/--no-context", help="Let a tile's neighbours count. [default: the recipe's]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 0]")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs to train on; 0: the CPU.")] = 0,
    processes: Annotated[int | None, typer.Option(help="CPU processes that share a batch. [default: 1]")] = None,
    threads: ThreadsOption = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Tiles beyond this many GB are read from disk. [default: 4]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was broken off.")] = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network on the labelled tiles of a store, and write a model bundle."""
    console = _console(json_lines=json_lines, quiet=quiet)
    from wsi_idc.settings import build
    from wsi_idc.train import TrainSettings, run

    settings = build(
        TrainSettings,
        recipe=recipe,
        network=network,
        activation=activation,
        stem=stem,
        input_px=input_px,
        flips=flips,
        init=init,
        teacher=teacher,
        split_by=split_by,
        val_split=val_split,
        folds=folds,
        cross_validation=cross_validation,
        positive_from=positive_from,
        balance=balance,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        patience=patience,
        mixup=mixup,
        smoothing=smoothing,
        augmentation=augmentation,
        context=context,
        seed=seed,
        gpus=gpus,
        processes=processes,
        threads=threads,
        memory_gb=memory_gb,
    )
    result = run(store, out, settings, say=console.line, resume=resume, progress=console.draws)
    console.record("trained", bundle=str(result.bundle), epochs=result.epochs, figures=result.figures)
    for note in result.notes:
        console.line(note)
    console.table(
        ["figure", "value", "95 % interval"],
        [[name, f"{value:.3f}", f"{low:.3f} to {high:.3f}"] for name, (value, low, high) in result.figures.items()],
    )
    console.line(f"wrote {result.bundle}. {USE}")


@app.command()
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
    console = _console(json_lines=json_lines, quiet=quiet)
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
    files = write_report(out, results, notes=found.notes, context=context)
    if json_lines:
        console.record("evaluation", **as_json(results, found.notes, context))
    for note in [*found.notes, *results.notes()]:
        console.line(f"note: {note}")
    for rows in (summary_rows(results), difference_rows(results)):
        if rows:
            console.table(list(rows[0]), [list(row.values()) for row in rows])
    console.line(f"wrote {files[-1]} and {len(files) - 1} files beside it. {USE}")


@app.command()
def status(
    manifest: Annotated[Path | None, typer.Argument(help="Show the slides of this manifest; else the store's.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json_lines: JsonOption = False,
) -> None:
    """Show every slide: extracted, scored by which model, or failed and why."""
    console = _console(json_lines=json_lines)
    from wsi_idc.manifest import read_manifest
    from wsi_idc.status import slide_states

    names = [row.slide_id for row in read_manifest(manifest)] if manifest else None
    states = slide_states(store, names)
    for state in states:
        console.record("status", **state.fields())
    rows = [[state.slide_id, state.extracted, state.tiles, state.scored, state.reason] for state in states]
    console.table(["slide", "extracted", "tiles", "scored", "why"], rows)


@app.command("manifest")
def make_manifest(
    folder: Annotated[Path, typer.Argument(help="A folder of slides, or the IDC data set's folder.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The CSV to write; else it is printed.", metavar="FILE")
    ] = None,
    split_file: Annotated[
        Path | None, typer.Option(help="CSV of patient_id (or slide_id) and split.", metavar="FILE")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="um/px of slides that have none of their own.")] = None,
) -> None:
    """Write a manifest of every slide in a folder."""
    console = _console(json_lines=False)
    from dataclasses import replace

    from wsi_idc.scan import read_split_file, scan, write_manifest
    from wsi_idc.slides import detect

    found = scan(folder, detect, read_split_file(split_file) if split_file else None)
    rows = found.rows if mpp is None else [replace(row, mpp=mpp) for row in found.rows]
    if not rows:
        raise UsageError(folder, "no slide found in it", "see the formats in the README")
    write_manifest(output or sys.stdout, rows)
    for line in found.left_out.lines():
        console.trouble(line)
    console.trouble(f"{len(rows)} slide{'s' if len(rows) != 1 else ''}{f' in {output}' if output else ''}")


@app.command()
def info(
    slide: Annotated[Path, typer.Argument(help="A slide: a file, or a DICOM, OME-NGFF or patch folder.")],
    mpp: Annotated[float | None, typer.Option(help="um/px to use whatever the file says.")] = None,
    tissue: Annotated[
        str | None,
        typer.Option(help="Tissue mask: default, otsu, morphological or none. [default: default]", metavar="METHOD"),
    ] = None,
    min_tissue: Annotated[
        float | None, typer.Option(help="Least part of a tile that is tissue. [default: 0.05]")
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(help="Draw mask and kept tiles on the thumbnail.", metavar="OUT.png")
    ] = None,
    json_lines: JsonOption = False,
) -> None:
    """Say what a slide is: format, size, levels, um/px, tissue tiles."""
    console = _console(json_lines=json_lines)
    from wsi_idc.info import describe_slide, info_lines
    from wsi_idc.settings import ExtractSettings, build

    settings = build(ExtractSettings, tissue=tissue, min_tissue=min_tissue)
    fields = describe_slide(slide, mpp, settings, preview)
    console.record("info", **fields)
    for line in info_lines(fields):
        console.line(line)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to make it.")] = Path("demo"),
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make three small slides, extract and score them, and draw their maps."""
    console = _console(json_lines=json_lines, quiet=quiet)
    from wsi_idc.demo import run_demo

    run_demo(folder, console)


def _interrupted(number: int, _: FrameType | None) -> NoReturn:
    """End at once: the store is sound at any moment, and worker threads cannot be told to stop."""
    import multiprocessing

    again = "add --resume to go on" if "train" in sys.argv[1:2] else "the same command goes on from there"
    hint = f"interrupted: what was complete is kept, {again}"
    cursor = "\x1b[?25h\r\x1b[K" if sys.stderr.isatty() else ""
    os.write(2, f"{cursor}wsi-idc: {hint}\n".encode())
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


def main(arguments: list[str] | None = None) -> Any:
    """The console script."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        return app(args=arguments)
    except WsiIdcError as error:
        _current.error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except OSError as error:
        _current.error(WsiIdcError("", system_reason(error), "what was complete is kept"))
        sys.exit(1)
    except Exception as error:
        if os.environ.get("WSI_IDC_DEBUG"):
            raise
        advice = "a defect: please report it, with what WSI_IDC_DEBUG=1 prints"
        _current.error(WsiIdcError("", f"{type(error).__name__}: {error}", advice))
        sys.exit(1)


if __name__ == "__main__":
    main()
