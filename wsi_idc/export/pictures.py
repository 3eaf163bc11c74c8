"""A probability map drawn over the slide's thumbnail."""

from pathlib import Path

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
        UsageError: the slide has no current map by that model, or it is of several classes, or `out` cannot be written.
    """
    from matplotlib.figure import Figure

    slide, found = store.slide(slide_id), store.map(model, slide_id)
    state = found.state(slide)
    if state.kind != "current":
        problem = f"has no map by {model}" if state.kind == "none" else f"its map by {model} is {state}"
        raise UsageError(slide_id, problem, "run wsi-idc infer")
    thumbnail, image = slide.thumbnail, found.read("0")
    if image.ndim != 2:
        raise UsageError(slide_id, f"its map by {model} has {len(image)} channels", "maps of one channel are drawn")
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
    bar.ax.axhline(float(found.attributes["model"]["threshold"]), color="white", linewidth=1.5)
    figure.supxlabel(f"{slide.count:,} tiles of {grid.spec}. {USE}", fontsize=8, color="0.35")
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UsageError(out, f"cannot be written ({error.strerror or error})", "choose another place") from error
