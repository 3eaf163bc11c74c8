"""`wsi-idc config`: the settings in force, and where each comes from."""

from pathlib import Path
from typing import Annotated

import typer

from wsi_idc.cli.options import ConfigOption, JsonOption, console_for, load_settings
from wsi_idc.errors import UsageError


def config(
    manifest: Annotated[
        Path | None, typer.Argument(help="With the settings beside this manifest; else with those of --config.")
    ] = None,
    config: ConfigOption = None,
    json_lines: JsonOption = False,
) -> None:
    """Show every setting of run and its stages that is in force, and where it comes from."""
    console = console_for(json_lines=json_lines)
    if manifest is not None and not manifest.is_file():
        raise UsageError(manifest, "no such file", "check the path of the manifest")
    found = load_settings({}, manifest=manifest, file=config)
    rows = []
    for name, value, origin in found.rows():
        plain = [str(part) for part in value] if isinstance(value, tuple) else value
        console.record("setting", name=name, value=plain, source=origin)
        text = ", ".join(plain) if isinstance(plain, list) else str("" if plain is None else plain)
        if name == "model" and not value:
            text = "the one that ships"
        rows.append([name, text, origin])
    console.table(["setting", "value", "from"], rows)
