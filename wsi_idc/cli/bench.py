"""`wsi-idc bench`: what a run costs here, what binds, and how long a manifest takes."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import (
    ConfigOption,
    GpusOption,
    JsonOption,
    ModelSetting,
    QuietOption,
    StoreSetting,
    console_for,
    load_settings,
    when_interrupted,
)


def bench(
    what: Annotated[
        str | None,
        typer.Argument(
            help="A slide, or a manifest, which is then estimated; else a slide is painted.", metavar="WHAT"
        ),
    ] = None,
    config: ConfigOption = None,
    store: StoreSetting = None,
    model: ModelSetting = None,
    tile_size: Annotated[int | None, typer.Option(help="Tile side in pixels. [default: the model's]")] = None,
    mpp: Annotated[float | None, typer.Option(help="Tile resolution in um/px. [default: the model's]")] = None,
    gpus: GpusOption = None,
    seconds: Annotated[float, typer.Option(min=0.01, max=600, help="How long each measurement goes on.")] = 1.5,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what a run costs on this machine and slide; say what binds, how to run, and how long it will take."""
    console = console_for(json_lines=json_lines, quiet=quiet)
    beside = Path(what) if what is not None and what.lower().endswith(".csv") else None
    found = load_settings(
        {
            "store": store,
            "model": None if model is None else str(model),
            "extract.tile_size": tile_size,
            "extract.mpp": mpp,
            "infer.gpus": gpus,
        },
        manifest=beside,
        file=config,
    )
    from wsi_idc.bench import Scratch, near, run_bench

    scratch = Scratch(near(found))
    when_interrupted(lambda _: scratch.clear())
    try:
        run_bench(what, found, seconds, scratch, console)
    finally:
        scratch.clear()
