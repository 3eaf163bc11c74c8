"""A slide is a function from a rectangle to pixels: always RGB, always on a background, never transparent.

`open_slide` opens every format; `detect` says, without opening it, whether a path looks like a slide.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import (
    AccessError,
    RegionError,
    ResolutionError,
    SlideError,
    WsiIdcError,
    system_advice,
)
from wsi_idc.settings import Reader
from wsi_idc.slides import toolbox
from wsi_idc.slides.arrays import open_ngff, open_picture
from wsi_idc.slides.backends import (
    Backend,
    Description,
    Level,
    OpenSlideBackend,
    RefusedError,
    first_line,
    open_without_ome,
)
from wsi_idc.slides.colour import Profile
from wsi_idc.slides.patches import PatchFolder, is_patch_folder
from wsi_idc.slides.pictures import MAX_PICTURE_PIXELS
from wsi_idc.slides.tiff import COPY_AGAIN
from wsi_idc.slides.whole import check_whole, is_dicom
from wsi_idc.sources import check_source, first_bytes
from wsi_idc.units import MPP_RANGE, Level0Px, LevelPx, Mpp

__all__ = ["Description", "Level", "Slide", "detect", "open_slide"]

MPP_WARNING = 0.05
"""A um/px given that differs from the file's by more than this part is used, with a warning."""
MAX_THUMBNAIL_PIXELS = 100_000_000
"""A thumbnail is held (3 bytes a pixel): at 8 um/px this is 80 x 80 mm, more than glass holds."""

_STRIP = 1024
_STRETCH = 8192
"""(height, width) in level pixels of what is read at once for a thumbnail."""

_TIFF = {".svs", ".tif", ".tiff", ".btf", ".scn", ".bif", ".ndpi", ".svslide", ".qptiff"}
_OPENSLIDE_ONLY = {".mrxs", ".vms", ".vmu", ".czi"}
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".jp2", ".j2k", ".jpx"}
_SUFFIXES = _TIFF | _OPENSLIDE_ONLY | _PICTURES


class Slide:
    """An open slide.

    Attributes:
        path: the file or folder.
        description: what the file says about itself.
        mpp: level-0 um/px (x, y) in use.
        mpp_source: where `mpp` comes from.
        warnings: lines that a user should see.
        damage: those of them that say what is missing from the file.
        icc: name of its ICC profile; None where it has none.
        icc_applied: whether its pixels were brought to sRGB by that.
        origin: the slide's top-left in the file's own level-0 pixels (x, y): not (0, 0) where the file has bounds.
            Positions everywhere count from it, as QuPath's do; those of programs that show the whole file do not.
    """

    def __init__(self, path: Path, backend: Backend, mpp: Mpp | None = None, *, icc: bool = False) -> None:
        self.path = path
        self._backend = backend
        self.description = backend.description
        self.origin = self.description.origin
        self.damage = list(self.description.warnings)
        self.warnings = list(self.damage)
        self.mpp, self.mpp_source = _resolve_mpp(path, self.description, mpp, self.warnings)
        profile = Profile(path, self.description.profile) if self.description.profile else None
        self.icc = None if profile is None else profile.name
        self._profile = profile if icc else None
        background = np.array(self.description.background, np.uint8)
        self._background = background if self._profile is None else self._profile.to_srgb(background[None, None])[0, 0]

    @property
    def size(self) -> tuple[Level0Px, Level0Px]:
        """Level-0 (width, height) in pixels."""
        width, height = self.levels[0].size
        return Level0Px(width), Level0Px(height)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The pyramid, finest first."""
        return self.description.levels

    @property
    def patches(self) -> PatchFolder | None:
        """The folder of ready-cut patches that this slide is, or None."""
        return self._backend if isinstance(self._backend, PatchFolder) else None

    @property
    def icc_applied(self) -> bool:
        """See the class."""
        return self._profile is not None

    @property
    def shared(self) -> bool:
        """Whether threads may read from it at once."""
        return self._backend.shared

    def decodes_tiles(self, level: int) -> bool:
        """Whether small regions of a level cost no more a pixel than large ones, if they are whole stored tiles."""
        return isinstance(self._backend, OpenSlideBackend) and self._backend.decodes_tiles(level)

    def level_mpp(self, level: int) -> Mpp:
        """um/px of a level: the finer of its two axes."""
        down = self.levels[level].downsample
        return Mpp(min(self.mpp[0] * down[0], self.mpp[1] * down[1]))

    def read(self, level: int, x: LevelPx, y: LevelPx, width: LevelPx, height: LevelPx) -> NDArray[np.uint8]:
        """Pixels of a rectangle of one level.

        Args:
            level: pyramid level, 0 is the finest.
            x, y: top-left pixel, in pixels of that level; may lie outside the slide.
            width, height: in pixels of that level.

        Returns:
            uint8 (height, width, 3) RGB. What lies beyond the slide or was never scanned has the background colour.

        Raises:
            RegionError: the region cannot be decoded; names its level-0 coordinates.
            AccessError: the system does not give it.
            MemoryError: there is none for it.
        """
        level_width, level_height = self.levels[level].size
        left, top = LevelPx(max(x, 0)), LevelPx(max(y, 0))
        right, bottom = min(x + width, level_width), min(y + height, level_height)
        if left >= right or top >= bottom:
            return self._blank(width, height)
        try:
            pixels = _on_background(
                self._backend.read(level, left, top, LevelPx(right - left), LevelPx(bottom - top)),
                self.description.background,
            )
        except MemoryError:
            raise
        except Exception as error:
            down = self.levels[level].downsample
            place = f"x {round(left * down[0])}, y {round(top * down[1])}"
            extent = f"{round((right - left) * down[0])} x {round((bottom - top) * down[1])} px"
            problem = f"cannot read the region at {place} ({extent} of level 0, level {level})"
            trouble = _system_trouble(self.path, error)
            if trouble is not None:
                raise AccessError(self.path, f"{problem}: {trouble.strerror}", system_advice(trouble)) from error
            raise RegionError(
                self.path, f"{problem}: {first_line(error)}", f"the file is damaged there: {COPY_AGAIN}"
            ) from error
        if self._profile is not None:
            pixels = self._profile.to_srgb(pixels)
        if pixels.shape[:2] == (height, width):
            return pixels
        whole = self._blank(width, height)
        whole[top - y : bottom - y, left - x : right - x] = pixels
        return whole

    def _blank(self, width: int, height: int) -> NDArray[np.uint8]:
        return np.full((height, width, 3), self._background, np.uint8)

    def level_for(self, mpp: Mpp) -> int:
        """The coarsest level that is at least as fine as `mpp`, or up to 1 % coarser; else the finest."""
        return max((n for n in range(len(self.levels)) if self.level_mpp(n) <= mpp * 1.01), default=0)

    def thumbnail(self, mpp: Mpp) -> tuple[NDArray[np.uint8], Mpp]:
        """The whole slide at about `mpp` um/px, area-averaged from the coarsest level that is at least as fine.

        Read piece by piece, so that a slide without coarse levels is never held.

        Returns:
            uint8 (h, w, 3) RGB, and its um/px (of the x axis).

        Raises:
            ResolutionError: it would have more than `MAX_THUMBNAIL_PIXELS`.
            RegionError, AccessError: as `read`.
        """
        level = self.level_for(mpp)
        factor = max(1, round(mpp / self.level_mpp(level)))
        width, height = self.levels[level].size
        shape = (-(-height // factor), -(-width // factor))
        if shape[0] * shape[1] > MAX_THUMBNAIL_PIXELS:
            sides = [side * part / 1000 for side, part in zip(self.size, self.mpp, strict=True)]
            raise ResolutionError(
                self.path,
                f"{self.size[0]} x {self.size[1]} px at {self.mpp[0]:.4g} um/px would be {sides[0]:,.0f} x"
                f" {sides[1]:,.0f} mm, larger than any slide",
                "give the true um/px in the manifest's column mpp (info: --mpp)",
            )
        thumbnail = np.empty((*shape, 3), np.uint8)
        strip, stretch = (max(factor, side // factor * factor) for side in (_STRIP, _STRETCH))
        for y in range(0, height, strip):
            for x in range(0, width, stretch):
                across, down = LevelPx(min(stretch, width - x)), LevelPx(min(strip, height - y))
                piece = self.read(level, LevelPx(x), LevelPx(y), across, down)
                small = _reduced(piece, factor)
                top, left = y // factor, x // factor
                thumbnail[top : top + small.shape[0], left : left + small.shape[1]] = small
        return thumbnail, Mpp(self.mpp[0] * self.levels[level].downsample[0] * factor)

    def close(self) -> None:
        """Let go of the file."""
        self._backend.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reduced(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """The means of squares of that side (pixels); at the right and the lower edge, of what is there."""
    if factor == 1:
        return pixels
    if factor == 2:  # what nearly every slide needs: OpenCV gives Pillow's very pixels in a sixth of the time
        import cv2

        height, width = pixels.shape[:2]
        if height % 2 or width % 2:
            pixels = cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        half = (-(-width // 2), -(-height // 2))
        return np.asarray(cv2.resize(pixels, half, interpolation=cv2.INTER_AREA), np.uint8)
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).reduce(factor))


def _on_background(pixels: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """RGB of RGB or RGBA pixels, composed on the background (straight alpha)."""
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    rgb, alpha = pixels[..., :3], pixels[..., 3]
    if alpha.min(initial=255) == 255:
        import cv2

        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), np.uint8)  # a tenth of what numpy takes
    part = alpha[..., None].astype(np.uint16)
    mixed = rgb * part + np.asarray(background, np.uint16) * (255 - part)
    return ((mixed + 127) // 255).astype(np.uint8)


def _resolve_mpp(
    path: Path, description: Description, asked: Mpp | None, warnings: list[str]
) -> tuple[tuple[Mpp, Mpp], str]:
    """um/px in use and where it comes from: the manifest's before the file's."""
    found = description.mpp
    low, high = MPP_RANGE
    possible = found is not None and all(low <= value <= high for value in found)
    if asked is not None:
        if not low <= asked <= high:
            raise ResolutionError(path, f"um/px {asked:g} given is impossible", f"give one within {low} to {high:g}")
        if found is not None and max(abs(asked / value - 1) for value in found) > MPP_WARNING:
            warnings.append(f"um/px {asked:g} given, the file says {found[0]:.4g} ({description.mpp_source})")
        return (asked, asked), "given"
    if found is None:
        hint = f"the objective is {description.objective:g}x, " if description.objective else ""
        advice = f"{hint}give it in the manifest's column mpp (info: --mpp)"
        raise ResolutionError(path, "the file has no um/px", advice)
    if not possible:
        raise ResolutionError(
            path,
            f"um/px {found[0]:.4g} ({description.mpp_source}) is impossible, it must be within {low} to {high:g}",
            "give the true one in the manifest's column mpp (info: --mpp)",
        )
    return found, description.mpp_source


def detect(path: Path) -> Literal["slide", "folder-slide", "patches"] | None:
    """What a path looks like, by its name and first bytes: nothing is decoded."""
    if path.is_dir():
        if is_patch_folder(path):
            return "patches"
        if (path / "zarr.json").is_file() or (path / ".zattrs").is_file():
            return "folder-slide" if _looks_like_ngff(path) else None
        files = _first_files(path)
        mixed = any(child.suffix.lower() in _SUFFIXES for child in files)
        return "folder-slide" if not mixed and any(map(_is_dicom, files)) else None
    if path.suffix.lower() in _SUFFIXES:
        return "slide"
    return "slide" if _is_dicom(path) else None


def _first_files(folder: Path, limit: int = 50) -> list[Path]:
    return [child for child in sorted(folder.iterdir())[:limit] if child.is_file()]


def _is_dicom(path: Path) -> bool:
    return path.is_file() and is_dicom(first_bytes(path, 132))


def _looks_like_ngff(path: Path) -> bool:
    texts = [file.read_text(errors="replace") for name in ("zarr.json", ".zattrs") if (file := path / name).is_file()]
    return any('"multiscales"' in text for text in texts)


def open_slide(path: Path, mpp: Mpp | None = None, reader: Reader = "auto", *, icc: bool = False) -> Slide:
    """Open a slide of any format.

    Args:
        path: a file; or a folder: DICOM, OME-NGFF, or an IDC patient's patches.
        mpp: um/px to use whatever the file says.
        reader: "auto": the one that knows the format best, and another only where that one does not know it;
            "openslide" or "tiatoolbox": that one alone.
        icc: bring its pixels to sRGB by its ICC profile, where it has one.

    Raises:
        DamageError: it is a damaged slide.
        AccessError: the system does not give it.
        ResolutionError: um/px is absent or impossible, in the file and in `mpp`.
        SlideError: it is no slide, or its ICC profile cannot be applied: one line says why.
        MemoryError: there is none for it.
    """
    path = Path(path)
    try:
        check_source(path)
        warnings = [line for part in _parts(path) for line in check_whole(part)]
        openers = _openers(path, reader)
    except FileNotFoundError as error:
        raise AccessError(path, "not found", "check the path") from error
    except OSError as error:
        raise AccessError.of(path, error) from error
    backend = _first_that_knows(path, openers)
    try:
        _check_pieces(path, backend.description)
        slide = Slide(path, backend, mpp, icc=icc)
    except WsiIdcError:
        backend.close()
        raise
    slide.warnings[:0] = warnings
    slide.damage[:0] = warnings
    return slide


def _parts(path: Path) -> list[Path]:
    """The files of a slide that can be looked at for being whole."""
    if not path.is_dir():
        return [path]
    return [] if is_patch_folder(path) else [child for child in sorted(path.iterdir()) if _is_dicom(child)]


def _first_that_knows(path: Path, openers: list[Callable[[Path], Backend]]) -> Backend:
    """The file opened by the first reader that knows its format; see `open_slide` for what is raised."""
    refusals: list[str] = []
    for opener in openers:
        try:
            return opener(path)
        except RefusedError as error:
            refusals.append(str(error))
        except (WsiIdcError, MemoryError):
            raise
        except Exception as error:
            trouble = _system_trouble(path, error)
            if trouble is not None:
                raise AccessError.of(path, trouble) from error
            # It knows the format and fails: a laxer reader would make of it what it can, and say nothing.
            refusals.append(first_line(error))
            break
    if not refusals:
        raise SlideError(path, "not a slide", "see the formats in the README")
    raise SlideError(path, "cannot be opened as a slide", " / ".join(dict.fromkeys(refusals)))


def _system_trouble(path: Path, error: Exception) -> OSError | None:
    """What the system says, where a reader failed for it and not for what is in the file; readers blur the two."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place that no file has
        return error
    try:
        for part in _parts(path):
            first_bytes(part, 1)
    except OSError as said:
        return said
    for code in (errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE):
        if os.strerror(code).casefold() in str(error).casefold():
            return OSError(code, os.strerror(code))
    return None


def _check_pieces(path: Path, description: Description) -> None:
    """Refuse a file that stores so much in one piece that decoding it would take more memory than stated."""
    for level in description.levels:
        width, height = level.block
        if width * height > MAX_PICTURE_PIXELS:
            raise SlideError(path, f"stores tiles of {width} x {height} px", "convert it to tiles of 256 or 512 px")


def _openers(path: Path, reader: Reader) -> list[Callable[[Path], Backend]]:
    """The readers to try, in order: the next one where one does not know the format."""
    folder = path.is_dir()
    if folder and is_patch_folder(path):
        if reader != "auto":
            raise SlideError(path, f"{reader} reads no folder of patches", "leave --reader out")
        return [PatchFolder]
    ngff = folder and any((path / name).is_file() for name in ("zarr.json", ".zattrs", ".zgroup"))
    dicom = any(map(_is_dicom, _first_files(path))) if folder else _is_dicom(path)
    if folder and not ngff and not dicom:
        return []
    if reader == "tiatoolbox":
        return [toolbox.open_any]
    if reader == "openslide":
        return [_open_dicom_by_openslide if folder and dicom else OpenSlideBackend]
    if ngff:
        return [open_ngff]
    if dicom:
        return [_open_dicom_by_openslide if folder else OpenSlideBackend, toolbox.open_dicom]
    suffix = path.suffix.lower()
    if suffix in _PICTURES:
        return [open_picture]
    return [open_without_ome, toolbox.open_tiff, open_picture] if suffix in _TIFF else [OpenSlideBackend]


def _open_dicom_by_openslide(folder: Path) -> Backend:
    """OpenSlide is given one file of a DICOM folder and finds the others of its series itself."""
    first = next(child for child in _first_files(folder) if _is_dicom(child))
    return OpenSlideBackend(first)
