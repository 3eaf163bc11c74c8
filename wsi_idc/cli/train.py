"""`wsi-idc train`: from labelled tiles to a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc import USE
from wsi_idc.cli.options import DEFAULT_STORE, JsonOption, QuietOption, StoreOption, ThreadsOption, console_for


def train(
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path, typer.Option(help="The bundle to write.", metavar="BUNDLE")] = Path("model"),
    recipe: Annotated[str | None, typer.Option(help="default or seed. [default: default]")] = None,
    network: Annotated[str | None, typer.Option(help="resnet50 or idc-2016. [default: resnet50]")] = None,
    activation: Annotated[str | None, typer.Option(help="relu or elu. [default: the recipe's]")] = None,
    input_px: Annotated[int | None, typer.Option("--input", help="Side the network sees. [default: 50, or 32]")] = None,
    flips: Annotated[str | None, typer.Option(help="none, or averaged at inference. [default: the recipe's]")] = None,
    init: Annotated[Path | None, typer.Option(help="Start from this bundle's weights.", metavar="BUNDLE")] = None,
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
    console = console_for(json_lines=json_lines, quiet=quiet)
    from wsi_idc.settings import build
    from wsi_idc.train import TrainSettings, run

    settings = build(
        TrainSettings,
        recipe=recipe,
        network=network,
        activation=activation,
        input_px=input_px,
        flips=flips,
        init=init,
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
        augmentation=augmentation,
        context=context,
        seed=seed,
        gpus=gpus,
        processes=processes,
        threads=threads,
        memory_gb=memory_gb,
    )
    result = run(store, out, settings, say=console.line, resume=resume, progress=console.draws)
    if result is None:
        return  # A helper of another process, which tells how it went.
    from wsi_idc.evaluate.metrics import FIGURES
    from wsi_idc.evaluate.page import plain
    from wsi_idc.train.result import tell

    judges = "held-out patients" if settings.folds else f"validation {settings.split_by}s"
    console.record(
        "trained",
        bundle=str(result.bundle),
        epochs=result.epochs,
        figures_on=judges,
        figures=plain(result.figures),
    )
    for note in result.notes:
        console.line(note)
    console.table(
        [f"figure on {judges}", "value", "95 % interval"],
        [[FIGURES[name], *tell(figure)] for name, figure in result.figures.items()],
    )
    if not settings.folds:
        console.line(f"these figures flatter: {judges} chose the epoch and the thresholds")
        console.line("to judge the model: wsi-idc infer, then wsi-idc evaluate, on patients in none of its lists")
    console.line(f"wrote {result.bundle}. {USE}")
