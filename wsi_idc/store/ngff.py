"""A map as an OME-NGFF image (https://ngff.openmicroscopy.org): its metadata, in the store and where it is exported."""

from collections.abc import Sequence
from typing import Any, Literal

from wsi_idc.store.slide import StoredSlide

NgffVersion = Literal["0.4", "0.5"]
_COLOURS = ("FFC400", "00B0FF", "FF4081", "69F0AE", "B388FF", "FF6E40")
"""Of the channels; from the seventh on again from the start."""


def pitch_um(slide: StoredSlide) -> float:
    """The side of a map's pixel in um: a pixel is a cell of the grid, so it is the stride."""
    return float(slide.spec.stride_px * slide.spec.mpp)


def first_centre_um(slide: StoredSlide) -> tuple[float, float]:
    """The centre (x, y) of a map's first pixel, which is its first tile's, seen from that of the slide's, in um."""
    side = slide.spec.size_px * slide.spec.mpp
    x, y = slide.mpp
    return (side - x) / 2, (side - y) / 2


def ngff_attributes(
    slide: StoredSlide, model: str, classes: Sequence[str], dimensions: int, version: NgffVersion = "0.5"
) -> dict[str, Any]:
    """What a group says that holds a map as its array `0`.

    Viewers put a pixel's centre at its coordinate: with this scale and translation map and slide lie on each other.
    Without `omero` they take a channel's limits from its values, and a map without tissue has none.

    Args:
        slide: whose map.
        model: by which model.
        classes: whose probabilities the channels are.
        dimensions: of the array: 2 (y, x) where there is one channel, or 3 (c, y, x).
        version: of the format.
    """
    pitch, (x, y) = pitch_um(slide), first_centre_um(slide)
    axes: list[dict[str, str]] = [{"name": name, "type": "space", "unit": "micrometer"} for name in ("y", "x")]
    scale, translation = [pitch, pitch], [y, x]
    if dimensions == 3:
        axes, scale, translation = [{"name": "c", "type": "channel"}, *axes], [1.0, *scale], [0.0, *translation]
    transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": translation}]
    what = "P" if dimensions == 3 else f"P({classes[0]})"
    image = {
        "name": f"{what} {model}",
        "axes": axes,
        "datasets": [{"path": "0", "coordinateTransformations": transforms}],
    }
    channels = [
        {
            "label": f"P({name})",
            "color": _COLOURS[number % len(_COLOURS)],
            "active": True,
            "window": {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0},
        }
        for number, name in enumerate(classes)
    ]
    if version == "0.4":
        return {"multiscales": [{"version": version, **image}], "omero": {"version": version, "channels": channels}}
    return {"ome": {"version": version, "multiscales": [image], "omero": {"channels": channels}}}
