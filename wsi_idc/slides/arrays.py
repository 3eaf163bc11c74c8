"""Slides that are arrays: pictures held in memory, and OME-NGFF."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import DamageError, SlideError
from wsi_idc.slides.backends import Description, RefusedError, check_rgb, first_line, make_levels
from wsi_idc.slides.pictures import MAX_PICTURE_PIXELS, PictureSizeError, opened_picture, rgb_profile
from wsi_idc.slides.tiff import COPY_AGAIN
from wsi_idc.units import LevelPx, Mpp

MAX_LEVELS = 64
"""Levels of a pyramid: each halves the slide, and no slide can be halved more often."""
_COUNTED_CHUNKS = 20_000


@dataclass
class ArrayBackend:
    """Levels that can be sliced as arrays: OME-NGFF, and pictures held in memory."""

    arrays: list[Any]
    description: Description
    axes: Sequence[str] = "yxc"
    shared: bool = True

    def read(self, level: int, x: LevelPx, y: LevelPx, width: LevelPx, height: LevelPx) -> NDArray[np.uint8]:
        """See `Backend.read`; the first of every other axis, such as t and z."""
        part = {"x": slice(x, x + width), "y": slice(y, y + height), "c": slice(None)}
        pixels = np.asarray(self.arrays[level][tuple(part.get(name, 0) for name in self.axes)])
        left = [name for name in self.axes if name in part]
        return pixels.transpose([left.index(name) for name in "yxc"])

    def close(self) -> None:
        """Let go of the arrays."""
        self.arrays = []


def open_picture(path: Path) -> ArrayBackend:
    """A PNG, JPEG, JPEG 2000 or plain TIFF picture, held in memory. But for JPEG 2000 it has no um/px of its own.

    Raises:
        RefusedError: it is no picture that Pillow knows.
        SlideError: it has more than `MAX_PICTURE_PIXELS`, or other pixels than 8-bit ones.
        DamageError: it cannot be decoded.
        OSError: the system does not give it.
    """
    from PIL import UnidentifiedImageError

    try:
        with opened_picture(path, MAX_PICTURE_PIXELS) as picture:
            if picture.mode[0] in "IF":
                check_rgb(path, picture.size[::-1], np.dtype("float32" if picture.mode == "F" else "uint16"))
            pixels = np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
            kind = picture.format or path.suffix.lstrip(".").upper()
            profile = rgb_profile(picture)
            dpi = picture.info.get("dpi") if kind == "JPEG2000" else None
    except PictureSizeError as error:
        advice = "convert it to a tiled pyramidal TIFF, for example with vips"
        raise SlideError(path, f"a picture without levels of {error}", advice) from error
    except UnidentifiedImageError as error:
        raise RefusedError("no picture that Pillow knows") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DamageError(path, f"the picture is cut short or broken: {first_line(error)}", COPY_AGAIN) from error
    mpp = (Mpp(25_400 / float(dpi[0])), Mpp(25_400 / float(dpi[1]))) if dpi and min(dpi) > 0 else None
    source = "JPEG 2000 resolution box" if mpp else ""
    levels = make_levels([(pixels.shape[1], pixels.shape[0])])
    return ArrayBackend([pixels], Description(kind, "Pillow", levels, mpp, source, profile=profile))


def open_ngff(path: Path) -> ArrayBackend:
    """An OME-NGFF image, version 0.4 (Zarr 2) or 0.5 (Zarr 3), with axes t, c, z, y, x or y, x, c; first t and z.

    A chunk that is not stored is read as the array's fill value, by Zarr's rule; where there are few enough chunks to
    be counted, a warning says how many are not.

    Raises:
        DamageError: a level that it names is not there.
        SlideError: it has no multiscales, or its pixels are not 8-bit RGB, or it claims what no slide has.
    """
    import zarr

    group: Any = zarr.open_group(path, mode="r")
    attributes = dict(group.attrs)
    multiscales = attributes.get("ome", attributes).get("multiscales")
    if not multiscales:
        raise SlideError(path, "a Zarr group without OME-NGFF multiscales", "give the group that holds the image")
    image = multiscales[0]
    axes = [axis["name"] if isinstance(axis, dict) else axis for axis in image.get("axes", ["t", "c", "z", "y", "x"])]
    datasets = image["datasets"]
    if len(datasets) > MAX_LEVELS:
        raise SlideError(path, f"names {len(datasets):,} levels, more than {MAX_LEVELS}", "check what wrote it")
    try:
        arrays = [group[dataset["path"]] for dataset in datasets]
    except KeyError as error:
        raise DamageError(path, f"its level {error} is missing", COPY_AGAIN) from error
    x, y, c = (axes.index(name) if name in axes else None for name in ("x", "y", "c"))
    if x is None or y is None or c is None:
        raise SlideError(path, f"OME-NGFF axes {'/'.join(axes)}", "an RGB image with axes c, y and x is needed")
    shape = arrays[0].shape
    check_rgb(path, (shape[y], shape[x], shape[c]), arrays[0].dtype)
    if max(prod(array.chunks) for array in arrays) > 4 * MAX_PICTURE_PIXELS:
        raise SlideError(path, f"stores chunks of {arrays[0].chunks}", "store it in smaller chunks")
    sizes = [(int(array.shape[x]), int(array.shape[y])) for array in arrays]
    blocks = [(int(array.chunks[x]), int(array.chunks[y])) for array in arrays]
    mpp = _ngff_resolution(image, x, y)
    source = "OME-NGFF scale" if mpp else ""
    warnings = tuple(line for number, array in enumerate(arrays) for line in _absent_chunks(number, array))
    return ArrayBackend(
        arrays, Description("OME-NGFF", "zarr", make_levels(sizes, blocks), mpp, source, warnings=warnings), axes
    )


def _absent_chunks(level: int, array: Any) -> Iterator[str]:
    """A line on the chunks of a level that are not stored; nothing where counting them would take long."""
    if array.nchunks <= _COUNTED_CHUNKS and (absent := array.nchunks - array.nchunks_initialized):
        fill = array.fill_value
        yield f"{absent:,} of the {array.nchunks:,} chunks of level {level} are not stored: they are read as {fill}"


def _ngff_resolution(image: Any, x: int, y: int) -> tuple[Mpp, Mpp] | None:
    factors = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "angstrom": 1e-4}
    axes = image.get("axes", [])
    if len(axes) <= max(x, y) or not isinstance(axes[x], dict):
        return None
    factor = factors.get(axes[x].get("unit", ""))
    for transform in image["datasets"][0].get("coordinateTransformations", []):
        if transform.get("type") == "scale" and factor:
            return Mpp(float(transform["scale"][x]) * factor), Mpp(float(transform["scale"][y]) * factor)
    return None
