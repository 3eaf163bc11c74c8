"""What `wsi-idc info` says of one slide."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from wsi_idc.digests import fingerprint
from wsi_idc.errors import UsageError
from wsi_idc.grid import Grid
from wsi_idc.reader import check_fit
from wsi_idc.settings import ExtractSettings
from wsi_idc.slides import open_slide
from wsi_idc.sources import Source
from wsi_idc.staging import Stage, access_to
from wsi_idc.units import Mpp
from wsi_idc.work.cut import find_tissue


def describe_slide(source: Source, mpp: Mpp | None, settings: ExtractSettings, preview: Path | None) -> dict[str, Any]:
    """The facts of a slide as plain values; draws the preview where one is asked for.

    What lies in an object store is copied to the system's folder for temporary files for as long as this takes.

    Returns:
        path, format, reader; size in level-0 pixels (width, height); mpp in um/px (x, y) and mpp_source; origin, the
        slide's top-left in the file's own pixels (x, y); levels, each with its size and um/px; objective
        (magnification, or None); icc (the name of its ICC profile, or None); associated pictures; the grid in words;
        tiles with tissue, and cells of the grid; warnings; preview.

    Raises:
        SlideError: it cannot be opened or read, or cannot give such tiles: what extract would say.
        UsageError: the preview cannot be written; or there can be no such URL.
    """
    with _near(source) as path, open_slide(path, mpp, settings.reader) as slide:
        grid = Grid(settings.tile, slide.size, slide.mpp)
        warnings = [*slide.warnings, *check_fit(slide, grid)]
        thumbnail, mask, cells, _ = find_tissue(slide, settings, None, grid)
        about = slide.description
        fields: dict[str, Any] = {
            "path": str(source),
            "format": about.format,
            "reader": about.reader,
            "size": list(slide.size),
            "mpp": list(slide.mpp),
            "mpp_source": slide.mpp_source,
            "origin": list(slide.origin),
            "icc": slide.icc,
            "levels": [
                {"size": list(level.size), "mpp": slide.level_mpp(number)} for number, level in enumerate(slide.levels)
            ],
            "objective": about.objective,
            "associated": list(about.associated),
            "grid": str(settings.tile),
            "tiles": len(cells),
            "cells": len(grid),
            "warnings": warnings,
        }
    if preview is not None:
        from wsi_idc.export.pictures import draw_preview

        if preview.exists() and isinstance(source, Path) and source.exists() and preview.samefile(source):
            raise UsageError(preview, "is the slide", "name another file with --preview")
        words = preview_lines(fields)
        try:
            draw_preview(PurePosixPath(fields["path"]).name, words, thumbnail, mask, grid, cells, preview)
        except (OSError, ValueError) as error:
            advice = "give a .png file in an existing folder"
            raise UsageError(preview, f"cannot be written ({error})", advice) from error
        fields["preview"] = str(preview)
    return fields


def preview_lines(fields: dict[str, Any]) -> list[str]:
    """What stands above the preview."""
    (width, height), (x, y) = fields["size"], fields["mpp"]
    return [
        f"{fields['format']}, {width} x {height} px at {x:.4g} x {y:.4g} um/px ({fields['mpp_source']})",
        f"{fields['tiles']:,} of {fields['cells']:,} tiles have tissue ({fields['grid']})",
        *fields["warnings"],
    ]


@contextmanager
def _near(source: Source) -> Iterator[Path]:
    """Where a slide can be read."""
    if isinstance(source, Path):
        yield source
        return
    if wrong := source.fault():
        raise UsageError(source, *wrong)
    with TemporaryDirectory(prefix="wsi-idc-") as folder:
        with access_to(source):
            content = fingerprint(source)
        with Stage(Path(folder), sys.maxsize).hold([(source, content)]) as copies:
            yield copies[source]


def info_lines(fields: dict[str, Any]) -> list[str]:
    """The same, as a person reads it: a line each, names in a column."""
    width, height = fields["size"]
    x, y = fields["mpp"]
    objective = fields["objective"]
    shown: list[tuple[str, str]] = [
        ("path", fields["path"]),
        ("format", f"{fields['format']}, read by {fields['reader']}"),
        ("size", f"{width} x {height} px, {width * x / 1000:.4g} x {height * y / 1000:.4g} mm"),
        *([("origin", "x {}, y {} of the file".format(*fields["origin"]))] if any(fields["origin"]) else []),
        ("um/px", f"{x:.6g} x {y:.6g} ({fields['mpp_source']})"),
        *(
            (
                "levels" if not number else "",
                f"{number}: {level['size'][0]} x {level['size'][1]} px, {level['mpp']:.4g} um/px",
            )
            for number, level in enumerate(fields["levels"])
        ),
        ("objective", f"{objective:g}x" if objective else "unknown"),
        ("ICC", f"{fields['icc']} (extract --icc applies it)" if fields["icc"] else "none"),
        ("associated", ", ".join(fields["associated"]) or "none"),
        ("tiles", f"{fields['tiles']:,} of {fields['cells']:,} have tissue ({fields['grid']})"),
        *(("warning", line) for line in fields["warnings"]),
        *([("preview", fields["preview"])] if "preview" in fields else []),
    ]
    return [f"{name:10}  {text}" for name, text in shown]
