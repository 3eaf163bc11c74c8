"""What a slide file is read with: one small class a reader, all giving stored pixels of one level.

OpenSlide first, in the binding that tiatoolbox itself stands on: tiatoolbox's reader would add nothing to it here but
eight seconds of import in every process. Then tiatoolbox's TIFF and DICOM readers (`toolbox.py`); OME-NGFF through zarr
(tiatoolbox reads version 0.4 alone, and only with display settings in it) and pictures through Pillow (`arrays.py`).
Readers are asked for whole pixels of a stored level; their own resampling is left out, so that every format is
resampled by the one mechanism of `reader.py`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import DamageError, SlideError
from wsi_idc.slides.stored import open_stored
from wsi_idc.slides.tiff import COPY_AGAIN
from wsi_idc.units import FILE_ORIGIN, Level0Px, LevelPx, Mpp

WHITE = (255, 255, 255)
UNKNOWN_BLOCK = (LevelPx(0), LevelPx(0))
"""`Level.block` of a file that does not say what it stores together."""


class RefusedError(Exception):
    """A reader does not know a file's format, so that another may try: never that a file is damaged."""


@dataclass(frozen=True)
class Level:
    """One level of a slide's pyramid.

    Attributes:
        size: (width, height) in pixels of this level.
        downsample: level-0 pixels per pixel of this level, (x, y).
        block: (width, height) of what the file stores together, in pixels of this level; (0, 0) where unknown.
    """

    size: tuple[LevelPx, LevelPx]
    downsample: tuple[float, float]
    block: tuple[LevelPx, LevelPx] = UNKNOWN_BLOCK


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
        origin: the slide's top-left in the file's own level-0 pixels (x, y), where the file says that only a part of
            it is the slide. All else here counts from it.
        warnings: what is missing from the file, a line each.
        profile: its ICC profile; empty where it has none.
    """

    format: str
    reader: str
    levels: tuple[Level, ...]
    mpp: tuple[Mpp, Mpp] | None = None
    mpp_source: str = ""
    objective: float | None = None
    associated: tuple[str, ...] = ()
    background: tuple[int, int, int] = WHITE
    origin: tuple[Level0Px, Level0Px] = FILE_ORIGIN
    warnings: tuple[str, ...] = ()
    profile: bytes = b""


class Backend(Protocol):
    """An open slide file.

    Attributes:
        description: what the file says about itself.
        shared: whether threads may read from it at once, so that it is opened once for all of them.
    """

    description: Description
    shared: bool

    def read(self, level: int, x: LevelPx, y: LevelPx, width: LevelPx, height: LevelPx) -> NDArray[np.uint8]:
        """Stored pixels of a rectangle that lies within the level: uint8 (height, width, 3 or 4)."""

    def close(self) -> None:
        """Let go of the file."""


def make_levels(sizes: list[tuple[int, int]], blocks: list[tuple[int, int]] | None = None) -> tuple[Level, ...]:
    """Levels of the sizes, finest first, and of what is stored together in each; (width, height) each.

    The numbers are a reader's own, which get their unit here: pixels of their level.
    """
    width, height = sizes[0]
    blocks = blocks or [UNKNOWN_BLOCK] * len(sizes)
    return tuple(
        Level((LevelPx(w), LevelPx(h)), (width / w, height / h), (LevelPx(across), LevelPx(down)))
        for (w, h), (across, down) in zip(sizes, blocks, strict=True)
        if w and h
    )


def check_rgb(path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse pixels that are not 8-bit RGB or RGBA, (height, width, 3 or 4)."""
    if dtype != np.uint8 or len(shape) != 3 or shape[2] not in (3, 4):
        found = f"{np.dtype(dtype).name} with {shape[2] if len(shape) == 3 else 1} channel(s)"
        raise SlideError(path, f"pixels are {found}", "8-bit RGB is needed; is this a fluorescence or a mask image?")


def first_line(error: BaseException) -> str:
    """A reader's reason in one line, without addresses and paths."""
    text = str(error).strip() or type(error).__name__
    line = re.sub(r"^Reading \S+: ", "", text.splitlines()[0].strip())
    return re.sub(r"<([\w.]+) object at 0x[0-9a-f]+>", r"\1", line)[:200]


# --- OpenSlide ----------------------------------------------------------------------------------------------------


class OpenSlideBackend:
    """Aperio, Hamamatsu, Leica, MIRAX, Philips, Ventana, Zeiss, DICOM, generic tiled TIFF: what OpenSlide reads.

    It describes the file, and reads what cannot be had from the stored tiles themselves (`stored.py`).

    Raises:
        RefusedError: OpenSlide does not know the format, or the compression in it.
        DamageError: it knows the format, and cannot open the file all the same.
    """

    shared = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._here = local()
        self._handles: list[Any] = []
        self._stored = None
        try:
            self.description = describe_handle(self._handle(), "OpenSlide")
            self._stored = open_stored(path, self.description, self._by_openslide)
        except Exception:
            self.close()
            raise

    def _handle(self) -> Any:
        """The calling thread's handle: one that failed once fails for good, which must not be another thread's."""
        handle = getattr(self._here, "handle", None)
        if handle is None:
            handle = self._here.handle = open_handle(self._path)
            self._handles.append(handle)
        return handle

    def decodes_tiles(self, level: int) -> bool:
        """Whether a level is read by decoding no more than the stored tiles that a region touches, to one result.

        Elsewhere OpenSlide may blend neighbouring pixels, by where a region begins.
        """
        return self._stored is not None and self._stored.takes(level)

    def read(self, level: int, x: LevelPx, y: LevelPx, width: LevelPx, height: LevelPx) -> NDArray[np.uint8]:
        """See `Backend.read`."""
        pixels = None if self._stored is None else self._stored.read(level, x, y, width, height)
        return self._by_openslide(level, x, y, width, height) if pixels is None else pixels

    def _by_openslide(self, level: int, x: LevelPx, y: LevelPx, width: LevelPx, height: LevelPx) -> NDArray[np.uint8]:
        """OpenSlide's pixels; alpha included, by which it marks what was never scanned."""
        handle = self._handle()
        try:
            return np.asarray(handle.read_region(in_file(self.description, level, x, y), level, (width, height)))
        except Exception:
            self._here.handle = None
            self._handles.remove(handle)
            handle.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        for handle in self._handles:
            handle.close()
        if self._stored is not None:
            self._stored.close()


def open_without_ome(path: Path) -> OpenSlideBackend:
    """OpenSlide, but for OME-TIFF: it is a generic TIFF to it, without its um/px and the levels kept in sub-pages."""
    backend = OpenSlideBackend(path)
    if backend.description.format == OME_TIFF:
        backend.close()
        raise RefusedError("OpenSlide knows no OME-TIFF")
    return backend


OME_TIFF = "generic-tiff (OME-TIFF)"


def open_handle(path: Path) -> Any:
    """An OpenSlide handle; see `OpenSlideBackend` for what is raised."""
    import openslide

    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise RefusedError("OpenSlide does not know the format") from error
    except openslide.OpenSlideError as error:
        reason = first_line(error)
        vendor = openslide.OpenSlide.detect_format(path)
        # DICOM writers leave tags out, or misspell them, that OpenSlide insists on and other readers can do without.
        tag_missing = vendor == "dicom" and reason.startswith("Couldn't get")
        if vendor is None or "nsupported" in reason or tag_missing:
            raise RefusedError(f"OpenSlide: {reason}") from error
        raise DamageError(path, f"OpenSlide knows it as {vendor} and cannot open it: {reason}", COPY_AGAIN) from error


def describe_handle(handle: Any, reader: str) -> Description:
    """What an OpenSlide handle says of its file.

    The bounds of MIRAX and Leica files are the slide, as they are in QuPath: each level begins at the whole pixel
    nearest to their corner.
    """
    properties = handle.properties
    vendor = properties.get("openslide.vendor", "unknown")
    ome = vendor == "generic-tiff" and "<OME " in properties.get("openslide.comment", "")
    origin, size = _bounds(properties, handle.level_dimensions[0])
    levels = []
    for number, (whole, down) in enumerate(zip(handle.level_dimensions, handle.level_downsamples, strict=True)):
        width, height = (
            max(1, min(round(length / down), side - round(start / down)))
            for length, side, start in zip(size, whole, origin, strict=True)
        )
        tile = [int(properties.get(f"openslide.level[{number}].tile-{side}", 0)) for side in ("width", "height")]
        levels.append(Level((LevelPx(width), LevelPx(height)), (down, down), (LevelPx(tile[0]), LevelPx(tile[1]))))
    mpp, source = _resolution(properties)
    objective = properties.get("openslide.objective-power")
    colour = properties.get("openslide.background-color", "FFFFFF")
    return Description(
        format=OME_TIFF if ome else vendor,
        reader=reader,
        levels=tuple(levels),
        mpp=mpp,
        mpp_source=source,
        objective=float(objective) if objective else None,
        associated=tuple(handle.associated_images),
        background=(int(colour[0:2], 16), int(colour[2:4], 16), int(colour[4:6], 16)),
        origin=(Level0Px(origin[0]), Level0Px(origin[1])),
        profile=_profile(handle),
    )


def _profile(handle: Any) -> bytes:
    """The ICC profile of an OpenSlide handle; of a broken one the bytes as they are, which come with pixels alone."""
    from PIL import ImageCms

    try:
        profile = handle.color_profile
    except ImageCms.PyCMSError:
        return bytes(handle.read_region((0, 0), handle.level_count - 1, (1, 1)).info.get("icc_profile", b""))
    return b"" if profile is None else bytes(profile.tobytes())


def in_file(description: Description, level: int, x: LevelPx, y: LevelPx) -> tuple[Level0Px, Level0Px]:
    """Where a level's pixel lies in the file's own level-0 pixels, as OpenSlide is asked for it."""
    down = description.levels[level].downsample
    start = [round(side / part) for side, part in zip(description.origin, down, strict=True)]
    return Level0Px(round((start[0] + x) * down[0])), Level0Px(round((start[1] + y) * down[1]))


def _bounds(properties: Any, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corner and size of the slide in the file: its bounds, cut to the file's size, or all of the file."""
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return (0, 0), size
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, size[0]), min(y + height, size[1])
    return ((left, top), (right - left, bottom - top)) if left < right and top < bottom else ((0, 0), size)


def _resolution(properties: Any) -> tuple[tuple[Mpp, Mpp] | None, str]:
    try:
        mpp = (Mpp(float(properties["openslide.mpp-x"])), Mpp(float(properties["openslide.mpp-y"])))
    except (KeyError, ValueError):
        return None, ""
    generic = properties.get("openslide.vendor") == "generic-tiff"
    return mpp, "TIFF resolution tag" if generic else "openslide.mpp-x, -y"
