"""tiatoolbox's readers, asked for stored pixels of one level.

They are what OpenSlide's refusals fall back to, and, where a user asks for them, what reads every format. Then the
class is the one that `WSIReader.open` takes, but for its traps: it holds a plain pyramidal TIFF whole, without um/px,
knows suffixes and not contents, and fails on a DICOM folder without a dot in its name or without a Manufacturer tag.

um/px are those of the file: where it has none, tiatoolbox would guess them from an objective.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import SlideError
from wsi_idc.slides.backends import (
    Description,
    RefusedError,
    check_rgb,
    describe_handle,
    first_line,
    in_file,
    make_levels,
    open_handle,
)
from wsi_idc.slides.pictures import MAX_PICTURE_PIXELS, PictureSizeError, opened_picture, rgb_profile
from wsi_idc.slides.tiff import is_tiff
from wsi_idc.slides.whole import is_dicom
from wsi_idc.sources import first_bytes
from wsi_idc.units import LevelPx, Mpp


class ToolboxBackend:
    """One of tiatoolbox's readers.

    Args:
        opener: opens the reader; called again when it has failed, since an OpenSlide handle that failed once fails for
            good.
        describe: says of the open reader what its file says.
        shared: see `Backend`.
    """

    def __init__(
        self, opener: Callable[[], Any], describe: Callable[[Any], Description], *, shared: bool = False
    ) -> None:
        self._open = opener
        self._reader = _quietly(opener)
        self.shared = shared
        try:
            self.description = _quietly(describe, self._reader)
            # tiatoolbox has one downsample a level, of the x axis or the mean of both, and counts positions by it.
            self._downs = [float(down) for down in _quietly(lambda: self._reader.info).level_downsamples]
        except Exception:
            self.close()
            raise

    def read(self, level: int, x: LevelPx, y: LevelPx, width: LevelPx, height: LevelPx) -> NDArray[np.uint8]:
        """See `Backend.read`; what was never scanned is white, by tiatoolbox."""
        if self.description.origin == (0, 0):
            place = (round(x * self._downs[level]), round(y * self._downs[level]))
        else:
            place = in_file(self.description, level, x, y)
        try:
            return np.asarray(
                self._reader.read_rect(place, (width, height), resolution=level, units="level", interpolation="none")
            )
        except Exception:
            self.close()
            self._reader = _quietly(self._open)
            raise

    def close(self) -> None:
        """Let go of the file."""
        for name in ("tiff", "wsi", "openslide_wsi"):
            if hasattr(self._reader, name):
                getattr(self._reader, name).close()


def open_tiff(path: Path) -> ToolboxBackend:
    """OME-TIFF, WebP and JPEG 2000 TIFF, and other tiled TIFF that OpenSlide does not know.

    Raises:
        RefusedError: tiatoolbox does not know it either.
        SlideError: its compression is unknown, or its pixels are not 8-bit RGB.
    """
    import tifffile

    reader = toolbox().TIFFWSIReader
    try:
        return ToolboxBackend(lambda: reader(path), lambda opened: _describe_tiff(path, opened))
    except tifffile.TiffFileError as error:
        raise RefusedError(f"tiatoolbox: {first_line(error)}") from error
    except ValueError as error:
        if "Unsupported TIFF WSI format" not in str(error):
            raise
        raise RefusedError("tiatoolbox knows no such TIFF") from error


def open_dicom(path: Path) -> ToolboxBackend:
    """A DICOM whole-slide image, a file or a folder of them (wsidicom)."""
    reader = toolbox().DICOMWSIReader

    def opener() -> Any:
        opened = reader(path)
        dataset = opened.wsi.levels.base_level.datasets[0]
        if not hasattr(dataset, "Manufacturer"):
            dataset.Manufacturer = ""  # tiatoolbox insists on it
        return opened

    return ToolboxBackend(opener, _describe_dicom)


def open_any(path: Path) -> ToolboxBackend:
    """A slide of any format that tiatoolbox knows.

    Raises:
        RefusedError: it does not know this one.
        SlideError: its pixels are not 8-bit RGB, or a picture is too large to be held.
        DamageError: OpenSlide, through tiatoolbox, knows the format and cannot open the file.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in ("zarr.json", ".zattrs", ".zgroup")):
            return _open_ngff(path)
        return open_dicom(path)
    head = first_bytes(path, 132)
    if is_dicom(head):
        return open_dicom(path)
    suffix = path.suffix.lower()
    if suffix in (".jp2", ".j2k", ".jpx"):
        reader = toolbox().JP2WSIReader
        return ToolboxBackend(lambda: reader(path), _describe_jp2)
    if not is_tiff(head):
        return _open_picture(path) if suffix in (".png", ".jpg", ".jpeg", ".bmp", ".webp") else _open_openslide(path)
    readers = [open_tiff, _open_openslide, _open_picture]
    if suffix not in (".tif", ".tiff", ".qptiff"):
        readers = [_open_openslide, open_tiff]
    refusals = []
    for opener in readers:
        try:
            return opener(path)
        except RefusedError as error:
            refusals.append(str(error))
    raise RefusedError(" / ".join(refusals))


def _open_openslide(path: Path) -> ToolboxBackend:
    open_handle(path).close()  # a refusal told in our words
    reader = toolbox().OpenSlideWSIReader
    return ToolboxBackend(
        lambda: reader(path), lambda opened: describe_handle(opened.openslide_wsi, "tiatoolbox OpenSlide")
    )


def _open_picture(path: Path) -> ToolboxBackend:
    """A picture, held in memory; its size is looked at before tiatoolbox decodes it."""
    from PIL import UnidentifiedImageError

    try:
        with opened_picture(path, MAX_PICTURE_PIXELS) as picture:
            kind, profile = picture.format or "", rgb_profile(picture)
    except PictureSizeError as error:
        advice = "convert it to a tiled pyramidal TIFF, for example with vips"
        raise SlideError(path, f"a picture without levels of {error}", advice) from error
    except UnidentifiedImageError as error:
        raise RefusedError("no picture") from error
    reader = toolbox().VirtualWSIReader

    def describe(opened: Any) -> Description:
        check_rgb(path, opened.img.shape, opened.img.dtype)
        return Description(kind, "tiatoolbox virtual", make_levels([opened.img.shape[1::-1]]), profile=profile)

    return ToolboxBackend(lambda: reader(path), describe, shared=True)


def _open_ngff(path: Path) -> ToolboxBackend:
    wsireader = toolbox()
    if not _quietly(wsireader.is_ngff, path):
        raise RefusedError("tiatoolbox reads OME-NGFF of version 0.4 with display settings (omero)")
    return ToolboxBackend(lambda: wsireader.NGFFWSIReader(path), _describe_ngff)


def _describe_tiff(path: Path, reader: Any) -> Description:
    page = reader.tiff.pages[0]
    compression = getattr(page.compression, "name", None)
    if compression is None:
        raise SlideError(path, f"TIFF compression {page.compression} is unknown", "convert it to a common one")
    arrays = list(reader.level_arrays.values())
    check_rgb(path, arrays[0].shape, arrays[0].array.dtype)
    sizes = [(int(array.shape[1]), int(array.shape[0])) for array in arrays]
    blocks = [(int(page.tilewidth), int(page.tilelength))] * len(sizes) if page.is_tiled else None
    ome = bool(reader.tiff.is_ome)
    mpp, source = _tiff_resolution(page), "TIFF resolution tag"
    if ome:
        found = reader.info.mpp
        mpp, source = None if found is None else (Mpp(float(found[0])), Mpp(float(found[1]))), "OME-XML"
    elif reader.tiff.is_svs:
        stated = re.search(r"\bMPP\s*=\s*([\d.]+)", page.description)
        mpp, source = ((Mpp(float(stated[1])), Mpp(float(stated[1]))), "Aperio MPP") if stated else (None, "")
    return Description(
        format="OME-TIFF" if ome else f"TIFF ({compression})",
        reader="tiatoolbox TIFF",
        levels=make_levels(sizes, blocks),
        mpp=mpp,
        mpp_source=source if mpp else "",
        profile=bytes(page.tags.valueof(_ICC_TAG, b"")),
    )


_ICC_TAG = 34675


def _tiff_resolution(page: Any) -> tuple[Mpp, Mpp] | None:
    """um/px of the resolution tags."""
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.resolutionunit))
    x, y = page.resolution
    return (Mpp(unit / x), Mpp(unit / y)) if unit and x > 0 and y > 0 else None


def _describe_dicom(reader: Any) -> Description:
    wsi = reader.wsi
    levels = list(wsi.levels)
    dataset = wsi.levels.base_level.datasets[0]
    spacing, paths = dataset.pixel_spacing, getattr(dataset, "OpticalPathSequence", None) or []
    mpp = None if spacing is None else (Mpp(spacing.width * 1e3), Mpp(spacing.height * 1e3))
    names = ("label", "overview", "thumbnail")
    return Description(
        format="DICOM",
        reader="tiatoolbox DICOM (wsidicom)",
        levels=make_levels(
            [(level.size.width, level.size.height) for level in levels],
            [(level.tile_size.width, level.tile_size.height) for level in levels],
        ),
        mpp=mpp,
        mpp_source="DICOM PixelSpacing" if mpp else "",
        associated=tuple(name for name in names if getattr(wsi, f"{name}s", None)),
        profile=next((bytes(path.ICCProfile) for path in paths if "ICCProfile" in path), b""),
    )


def _describe_jp2(reader: Any) -> Description:
    info = reader.info
    mpp = None if info.mpp is None else (Mpp(float(info.mpp[0])), Mpp(float(info.mpp[1])))
    sizes = [(int(width), int(height)) for width, height in info.level_dimensions]
    return Description(
        "JPEG 2000", "tiatoolbox JP2 (glymur)", make_levels(sizes), mpp, "JPEG 2000 boxes" if mpp else ""
    )


def _describe_ngff(reader: Any) -> Description:
    info = reader.info
    mpp = None if info.mpp is None else (Mpp(float(info.mpp[0])), Mpp(float(info.mpp[1])))
    sizes = [(int(width), int(height)) for width, height in info.level_dimensions]
    return Description("OME-NGFF", "tiatoolbox NGFF", make_levels(sizes), mpp, "OME-NGFF scale" if mpp else "")


def toolbox() -> Any:
    """tiatoolbox's readers, imported where a slide is opened (5 to 10 s)."""
    with without_log_handlers():
        from tiatoolbox.wsicore import wsireader

    return wsireader


@contextmanager
def without_log_handlers() -> Iterator[None]:
    """Around an import of tiatoolbox: without the log handlers that it would install for every library."""
    import logging

    logging.getLogger().addHandler(logging.NullHandler())
    try:
        yield
    finally:
        logging.captureWarnings(False)


def _quietly(opener: Callable[..., Any], *arguments: Any) -> Any:
    """Call a reader without the warnings that would land in the middle of a progress display."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return opener(*arguments)
