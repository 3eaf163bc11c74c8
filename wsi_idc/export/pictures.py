"""A probability map drawn over the slide's thumbnail."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_idc import USE
from wsi_idc.errors import UsageError
from wsi_idc.store import Store

COLOURS = "cividis"
"""Perceptually even, and the same to colour-blind eyes."""


def draw_map(store: Store, model: str, slide_id: str, out: Path) -> None:
    """Write the map of a slide as a PNG: thumbnail, probabilities over it, scale bar and colour bar.

    Args:
        store: the store.
        model: whose map.
        slide_id: of which slide.
        out: the PNG.

    Raises:
        UsageError: the slide has no map by that model, or `out` cannot be written.
    """
    from matplotlib.figure import Figure

    record = store.map_node(model, slide_id).record()
    if not record.usable:
        raise UsageError(slide_id, f"has no map by {model}", "run wsi-idc infer")
    slide = store.slide(slide_id)
    thumbnail = np.asarray(slide.node.array("thumbnail")[...])
    image: NDArray[np.float32] = np.asarray(store.map_node(model, slide_id).array("0")[...])
    grid = slide.grid
    width, height = (side * mpp / 1000 for side, mpp in zip(grid.size, grid.mpp, strict=True))
    pitch = grid.spec.stride_px * grid.spec.mpp / 1000
    rows, columns = image.shape

    figure = Figure(figsize=(11, min(max(4.7 * height / width, 2.0), 20.0) + 1.0), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis in axes:
        axis.imshow(thumbnail, extent=(0, width, height, 0), interpolation="antialiased")
        axis.set_xlabel("mm")
    axes[0].set_title(slide_id, loc="left")
    drawn = axes[1].imshow(
        image,
        extent=(0, columns * pitch, rows * pitch, 0),
        cmap=COLOURS,
        vmin=0,
        vmax=1,
        alpha=0.85,
        interpolation="nearest",
    )
    axes[1].set_xlim(0, width)
    axes[1].set_ylim(height, 0)
    axes[1].set_title(f"P(IDC) by {model}", loc="left")
    bar = figure.colorbar(drawn, ax=axes, label="P(IDC)", shrink=0.85)
    if record.complete is not None:
        threshold = float(record.attributes["model"]["threshold"])
        bar.ax.axhline(threshold, color="white", linewidth=1.5)
    figure.supxlabel(f"{slide.count:,} tiles of {grid.spec}. {USE}", fontsize=8, color="0.35")
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UsageError(out, f"cannot be written ({error.strerror or error})", "choose another place") from error
