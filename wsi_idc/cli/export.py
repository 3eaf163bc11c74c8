"""`wsi-idc export`: maps as files for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc import USE
from wsi_idc.cli.options import (
    DEFAULT_STORE,
    ConfigOption,
    ForceOption,
    JsonOption,
    OnlyOption,
    QuietOption,
    StoreOption,
    VerboseOption,
    console_for,
    finish,
    load_settings,
)

MapModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        envvar="WSI_IDC_MODEL",
        metavar="MODEL",
        help="Whose maps: a name in the store, or a bundle's folder. [default: the only one]",
    ),
]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Probability from which a tile is positive. [default: the model's]")
]


def export(
    config: ConfigOption = None,
    store: StoreOption = DEFAULT_STORE,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="csv, parquet, geojson, png, ome-tiff, ngff, ngff-0.4, annotation-store or dicom; may be repeated. "
            "[default: csv]",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the files. [default: export]", metavar="DIR")] = None,
    model: MapModelOption = None,
    threshold: ThresholdOption = None,
    only: OnlyOption = None,
    force: ForceOption = False,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write maps as files for other programs: a file a slide and format."""
    console = console_for(json_lines=json_lines, quiet=quiet, verbose=verbose)
    from wsi_idc.export.export import export as command

    said = {"export.formats": formats, "export.out": out, "export.threshold": threshold}
    found = load_settings(said, file=config)
    settings, model = found.export, model or (str(found.model) if found.model else None)
    with console.progress("export") as listener:
        summary = command(store, model, settings, only=only or [], force=force, listener=listener)
    console.line(f"wrote to {settings.out}. {USE}")
    finish(console, "export", summary)
