"""What each kind of slide file is read with: one small class a reader, all giving stored pixels of one level.

OpenSlide first, in the binding that tiatoolbox itself stands on: tiatoolbox's reader would add nothing to it here but
eight seconds of import in every process. Then tiatoolbox's TIFF, DICOM and JPEG 2000 readers; OME-NGFF through zarr
(tiatoolbox reads version 0.4 alone, and only with display settings in it), and pictures through Pillow (tiatoolbox's
virtual reader would hold the same array). Readers are asked for whole pixels of a stored level; their own resampling
is left out, so that every format is resampled by the one mechanism of `reader.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import SlideError

WHITE = (255, 255, 255)
MAX_PICTURE_PIXELS = 200_000_000
"""A picture without levels is held in memory (3 bytes a pixel); a larger one has to be converted first."""


@dataclass(frozen=True)
class Level:
    """One level of a slide's pyramid.

    Attributes:
        size: (width, height) in pixels of this level.
        downsample: level-0 pixels per pixel of this level, (x, y).
        block: (width, height) of what the file stores together, in pixels of this level; (0, 0) where unknown.
    """

    size: tuple[int, int]
    downsample: tuple[float, float]
    block: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Description:
    """What a file says about itself.

    Attributes:
        format: the file format, in the words of its field.
        reader: what it is read with.
        levels: finest first.
        mpp: level-0 um/px (x, y), or None where the file has none.
        mpp_source: where `mpp` was found.
        objective: magnification of the scan, or None.
        associated: names of label, macro and other pictures.
        background: RGB that stands where the slide has no pixels.
    """

    format: str
    reader: str
    levels: tuple[Level, ...]
    mpp: tuple[float, float] | None = None
    mpp_source: str = ""
    objective: float | None = None
    associated: tuple[str, ...] = ()
    background: tuple[int, int, int] = WHITE


class Backend(Protocol):
    """An open slide file."""

    description: Description

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Stored pixels of a rectangle that lies within the level: uint8 (height, width, 3 or 4)."""

    def close(self) -> None:
        """Let go of the file."""


def _make_levels(sizes: list[tuple[int, int]], blocks: list[tuple[int, int]] | None = None) -> tuple[Level, ...]:
    width, height = sizes[0]
    blocks = blocks or [(0, 0)] * len(sizes)
    return tuple(
        Level((w, h), (width / w, height / h), block) for (w, h), block in zip(sizes, blocks, strict=True) if w and h
    )


def _toolbox() -> Any:
    """tiatoolbox's readers, imported where a slide is opened (5 to 10 s), without the log handlers it would install."""
    import logging

    logging.getLogger().addHandler(logging.NullHandler())
    from tiatoolbox.wsicore import wsireader

    logging.captureWarnings(False)
    return wsireader


def _quietly(opener: Callable[..., Any], *arguments: Any) -> Any:
    """Call a reader without the warnings that would land in the middle of a progress display."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return opener(*arguments)


class OpenSlideBackend:
    """Aperio, Hamamatsu, Leica, MIRAX, Philips, Ventana, Zeiss, DICOM, generic tiled TIFF: what OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        import openslide

        self._open: Callable[[], Any] = lambda: openslide.OpenSlide(path)
        self._handle = self._open()
        if "<OME " in self._handle.properties.get("openslide.comment", ""):
            # OpenSlide takes it for a generic TIFF: without its um/px, and without levels kept in sub-IFDs.
            self._handle.close()
            raise ValueError("OME-TIFF")
        self.description = self._describe()

    def _describe(self) -> Description:
        properties = self._handle.properties
        vendor = properties.get("openslide.vendor", "unknown")
        sizes = list(self._handle.level_dimensions)
        blocks = [
            (
                int(properties.get(f"openslide.level[{level}].tile-width", 0)),
                int(properties.get(f"openslide.level[{level}].tile-height", 0)),
            )
            for level in range(len(sizes))
        ]
        levels = tuple(
            Level(size, (downsample, downsample), block)
            for size, downsample, block in zip(sizes, self._handle.level_downsamples, blocks, strict=True)
        )
        mpp, source = self._resolution(properties)
        objective = properties.get("openslide.objective-power")
        colour = properties.get("openslide.background-color", "FFFFFF")
        return Description(
            format=vendor,
            reader="OpenSlide",
            levels=levels,
            mpp=mpp,
            mpp_source=source,
            objective=float(objective) if objective else None,
            associated=tuple(self._handle.associated_images),
            background=(int(colour[0:2], 16), int(colour[2:4], 16), int(colour[4:6], 16)),
        )

    @staticmethod
    def _resolution(properties: Any) -> tuple[tuple[float, float] | None, str]:
        try:
            mpp = (float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"]))
        except (KeyError, ValueError):
            return None, ""
        generic = properties.get("openslide.vendor") == "generic-tiff"
        return mpp, "TIFF resolution tag" if generic else "openslide.mpp-x, -y"

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Backend.read`; alpha included, since OpenSlide marks what was never scanned by it."""
        down_x, down_y = self.description.levels[level].downsample
        place = (round(x * down_x), round(y * down_y))
        try:
            return np.asarray(self._handle.read_region(place, level, (width, height)))
        except Exception:
            # A handle that failed once fails for good: give the next region a fresh one.
            self._handle.close()
            self._handle = self._open()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._handle.close()


class TiffBackend:
    """OME-TIFF, WebP and JPEG 2000 TIFF, and other tiled TIFF that OpenSlide refuses: tiatoolbox's TIFF reader."""

    def __init__(self, path: Path) -> None:
        self._reader = _quietly(_toolbox().TIFFWSIReader, path)
        page = self._reader.tiff.pages[0]
        compression = getattr(page.compression, "name", None)
        if compression is None:
            raise SlideError(path, f"TIFF compression {page.compression} is unknown", "convert it to a common one")
        self._arrays = list(self._reader.level_arrays.values())
        _check_rgb(path, self._arrays[0].shape, self._arrays[0].array.dtype)
        sizes = [(int(array.shape[1]), int(array.shape[0])) for array in self._arrays]
        blocks = [(int(page.tilewidth), int(page.tilelength))] * len(sizes) if page.is_tiled else None
        info = _quietly(lambda: self._reader.info)
        ome = bool(self._reader.tiff.is_ome)
        mpp = self._resolution(page)
        if ome:
            mpp = None if info.mpp is None else (float(info.mpp[0]), float(info.mpp[1]))
        self.description = Description(
            format="OME-TIFF" if ome else f"TIFF ({compression})",
            reader="tiatoolbox TIFF",
            levels=_make_levels(sizes, blocks),
            mpp=mpp,
            mpp_source="" if mpp is None else "OME-XML" if ome else "TIFF resolution tag",
        )

    @staticmethod
    def _resolution(page: Any) -> tuple[float, float] | None:
        """um/px of the resolution tags; tiatoolbox would guess an objective where there is none, a file does not."""
        unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.resolutionunit))
        x, y = page.resolution
        return (unit / x, unit / y) if unit and x > 0 and y > 0 else None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Backend.read`."""
        return np.asarray(self._arrays[level][y : y + height, x : x + width])

    def close(self) -> None:
        """Let go of the file."""
        self._reader.tiff.close()


class DicomBackend:
    """DICOM whole-slide images that OpenSlide refuses: tiatoolbox's DICOM reader (wsidicom)."""

    def __init__(self, path: Path) -> None:
        self._wsi = _quietly(_toolbox().DICOMWSIReader, path).wsi
        levels = list(self._wsi.levels)
        self._numbers = [level.level for level in levels]
        spacing = self._wsi.levels.base_level.datasets[0].pixel_spacing
        mpp = None if spacing is None else (spacing.width * 1e3, spacing.height * 1e3)
        names = ("label", "overview", "thumbnail")
        self.description = Description(
            format="DICOM",
            reader="tiatoolbox DICOM (wsidicom)",
            levels=_make_levels(
                [(level.size.width, level.size.height) for level in levels],
                [(level.tile_size.width, level.tile_size.height) for level in levels],
            ),
            mpp=mpp,
            mpp_source="DICOM PixelSpacing" if mpp else "",
            associated=tuple(name for name in names if getattr(self._wsi, f"{name}s", None)),
        )

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Backend.read`."""
        return np.asarray(self._wsi.read_region((x, y), self._numbers[level], (width, height)).convert("RGB"))

    def close(self) -> None:
        """Let go of the file."""
        self._wsi.close()


@dataclass
class ArrayBackend:
    """Levels that can be sliced as arrays: OME-NGFF, and pictures held in memory."""

    arrays: list[Any]
    description: Description
    axes: Sequence[str] = "yxc"

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Backend.read`; the first of every other axis, such as t and z."""
        part = {"x": slice(x, x + width), "y": slice(y, y + height), "c": slice(None)}
        pixels = np.asarray(self.arrays[level][tuple(part.get(name, 0) for name in self.axes)])
        left = [name for name in self.axes if name in part]
        return pixels.transpose([left.index(name) for name in "yxc"])

    def close(self) -> None:
        """Let go of the arrays."""
        self.arrays = []


def open_jp2(path: Path) -> ArrayBackend:
    """A JPEG 2000 file, by tiatoolbox's reader; decoded once, so it is bounded as pictures are."""
    reader = _quietly(_toolbox().JP2WSIReader, path)
    info = _quietly(lambda: reader.info)
    _check_picture(path, *map(int, info.slide_dimensions))
    bounds = (0, 0, *info.slide_dimensions)
    pixels = _quietly(lambda: reader.read_bounds(bounds, 0, "level"))
    _check_rgb(path, pixels.shape, pixels.dtype)
    source = "JPEG 2000 resolution box" if info.mpp is not None else ""
    mpp = None if info.mpp is None else (float(info.mpp[0]), float(info.mpp[1]))
    size = (pixels.shape[1], pixels.shape[0])
    return ArrayBackend(
        [pixels], Description("JPEG 2000", "tiatoolbox JP2 (glymur)", _make_levels([size]), mpp, source)
    )


def open_picture(path: Path) -> ArrayBackend:
    """A PNG, JPEG or plain TIFF picture, held in memory. It has no um/px of its own.

    Raises:
        SlideError: it has more than `MAX_PICTURE_PIXELS`.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the check below is ours, before anything is decoded
    with Image.open(path) as picture:
        _check_picture(path, *picture.size)
        pixels = np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
        kind = picture.format or path.suffix.lstrip(".").upper()
    return ArrayBackend([pixels], Description(kind, "Pillow", _make_levels([(pixels.shape[1], pixels.shape[0])])))


def open_ngff(path: Path) -> ArrayBackend:
    """An OME-NGFF image, version 0.4 (Zarr 2) or 0.5 (Zarr 3), with axes t, c, z, y, x or y, x, c; first t and z.

    Raises:
        SlideError: it has no multiscales, or its pixels are not 8-bit RGB.
    """
    import zarr

    group: Any = zarr.open_group(path, mode="r")
    attributes = dict(group.attrs)
    multiscales = attributes.get("ome", attributes).get("multiscales")
    if not multiscales:
        raise SlideError(path, "a Zarr group without OME-NGFF multiscales", "give the group that holds the image")
    image = multiscales[0]
    axes = [axis["name"] if isinstance(axis, dict) else axis for axis in image.get("axes", ["t", "c", "z", "y", "x"])]
    arrays = [group[dataset["path"]] for dataset in image["datasets"]]
    x, y, c = (axes.index(name) if name in axes else None for name in ("x", "y", "c"))
    if x is None or y is None or c is None:
        raise SlideError(path, f"OME-NGFF axes {'/'.join(axes)}", "an RGB image with axes c, y and x is needed")
    shape = arrays[0].shape
    _check_rgb(path, (shape[y], shape[x], shape[c]), arrays[0].dtype)
    sizes = [(int(array.shape[x]), int(array.shape[y])) for array in arrays]
    blocks = [(int(array.chunks[x]), int(array.chunks[y])) for array in arrays]
    mpp = _ngff_resolution(image, x, y)
    return ArrayBackend(
        arrays,
        Description("OME-NGFF", "zarr", _make_levels(sizes, blocks), mpp, "OME-NGFF scale" if mpp else ""),
        axes,
    )


def _ngff_resolution(image: Any, x: int, y: int) -> tuple[float, float] | None:
    factors = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "angstrom": 1e-4}
    axes = image.get("axes", [])
    if len(axes) <= max(x, y) or not isinstance(axes[x], dict):
        return None
    factor = factors.get(axes[x].get("unit", ""))
    for transform in image["datasets"][0].get("coordinateTransformations", []):
        if transform.get("type") == "scale" and factor:
            return float(transform["scale"][x]) * factor, float(transform["scale"][y]) * factor
    return None


def _check_rgb(path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    if dtype != np.uint8 or len(shape) != 3 or shape[2] not in (3, 4):
        found = f"{np.dtype(dtype).name} with {shape[2] if len(shape) == 3 else 1} channel(s)"
        raise SlideError(path, f"pixels are {found}", "8-bit RGB is needed; is this a fluorescence or a mask image?")


def _check_picture(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PICTURE_PIXELS:
        raise SlideError(
            path,
            f"a picture of {width} x {height} pixels without levels",
            "convert it to a tiled pyramidal TIFF, for example with vips",
        )
