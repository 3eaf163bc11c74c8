"""What `wsi-idc info` says of one slide."""

from pathlib import Path
from typing import Any

from wsi_idc.errors import UsageError
from wsi_idc.extract import find_tissue
from wsi_idc.grid import Grid
from wsi_idc.settings import ExtractSettings
from wsi_idc.slides import open_slide


def describe_slide(path: Path, mpp: float | None, settings: ExtractSettings, preview: Path | None) -> dict[str, Any]:
    """The facts of a slide, in the order in which they are shown; draws the preview where one is asked for.

    Raises:
        SlideError: it cannot be opened or read.
        UsageError: the preview cannot be written.
    """
    with open_slide(path, mpp) as slide:
        grid = Grid(settings.tile, slide.size, slide.mpp)
        thumbnail, mask, cells, _ = find_tissue(slide, settings, None, grid)
        about = slide.description
        fields = {
            "path": str(path),
            "format": about.format,
            "reader": about.reader,
            "size": f"{slide.size[0]} x {slide.size[1]} px",
            "um/px": f"{slide.mpp[0]:.6g} x {slide.mpp[1]:.6g} ({slide.mpp_source})",
            "levels": [
                f"{number}: {level.size[0]} x {level.size[1]} px, {slide.level_mpp(number):.4g} um/px"
                for number, level in enumerate(slide.levels)
            ],
            "objective": f"{about.objective:g}x" if about.objective else "unknown",
            "associated": ", ".join(about.associated) or "none",
            "tiles": f"{len(cells)} of {len(grid)} with tissue ({settings.tile})",
            "warnings": slide.warnings or "none",
        }
    if preview is not None:
        from PIL import Image

        from wsi_idc.tissue import draw_overlay

        picture = Image.fromarray(draw_overlay(thumbnail, mask, grid, cells))
        try:
            picture.save(preview)
        except (OSError, ValueError) as error:
            raise UsageError(
                preview, f"cannot be written ({error})", "give a .png file in an existing folder"
            ) from error
        fields["preview"] = str(preview)
    return fields
