"""A slide is a function from a rectangle to pixels: always RGB, always on a background, never transparent.

`open_slide` opens every format; `detect` says, without opening it, whether a path looks like a slide.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import RegionError, ResolutionError, SlideError, WsiIdcError
from wsi_idc.slides.backends import (
    Backend,
    Description,
    DicomBackend,
    Level,
    OpenSlideBackend,
    TiffBackend,
    open_jp2,
    open_ngff,
    open_picture,
)
from wsi_idc.slides.patches import PatchFolder, is_patch_folder
from wsi_idc.units import MPP_RANGE

__all__ = ["Description", "Level", "Slide", "detect", "open_slide"]

MPP_WARNING = 0.05
"""A manifest's um/px that differs from the file's by more than this part is used, with a warning."""

_TIFF = {".svs", ".tif", ".tiff", ".btf", ".scn", ".bif", ".ndpi", ".svslide", ".qptiff"}
_OPENSLIDE_ONLY = {".mrxs", ".vms", ".vmu", ".czi"}
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_JP2 = {".jp2", ".j2k", ".jpx"}
_SUFFIXES = _TIFF | _OPENSLIDE_ONLY | _PICTURES | _JP2


class Slide:
    """An open slide.

    Attributes:
        path: the file or folder.
        description: what the file says about itself.
        mpp: level-0 um/px (x, y) in use.
        mpp_source: where `mpp` comes from.
        warnings: lines that a user should see.
    """

    def __init__(self, path: Path, backend: Backend, mpp: float | None = None) -> None:
        self.path = path
        self._backend = backend
        self.description = backend.description
        self.warnings: list[str] = []
        self.mpp, self.mpp_source = _resolve_mpp(path, self.description, mpp, self.warnings)

    @property
    def size(self) -> tuple[int, int]:
        """Level-0 (width, height) in pixels."""
        return self.levels[0].size

    @property
    def levels(self) -> tuple[Level, ...]:
        """The pyramid, finest first."""
        return self.description.levels

    @property
    def patches(self) -> PatchFolder | None:
        """The folder of ready-cut patches that this slide is, or None."""
        return self._backend if isinstance(self._backend, PatchFolder) else None

    def level_mpp(self, level: int) -> float:
        """um/px of a level: the finer of its two axes."""
        down = self.levels[level].downsample
        return min(self.mpp[0] * down[0], self.mpp[1] * down[1])

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Pixels of a rectangle of one level.

        Args:
            level: pyramid level, 0 is the finest.
            x, y: top-left pixel, in pixels of that level; may lie outside the slide.
            width, height: in pixels of that level.

        Returns:
            uint8 (height, width, 3) RGB. What lies beyond the slide or was never scanned has the background colour.

        Raises:
            RegionError: the region cannot be decoded; names its level-0 coordinates.
        """
        level_width, level_height = self.levels[level].size
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, level_width), min(y + height, level_height)
        if left >= right or top >= bottom:
            return self._blank(width, height)
        try:
            pixels = _on_background(
                self._backend.read(level, left, top, right - left, bottom - top), self.description.background
            )
        except Exception as error:
            down = self.levels[level].downsample
            place = f"x {round(left * down[0])}, y {round(top * down[1])}"
            extent = f"{round((right - left) * down[0])} x {round((bottom - top) * down[1])} px"
            raise RegionError(
                self.path,
                f"cannot read the region at {place} ({extent} of level 0, level {level}): {_first_line(error)}",
                "the file is damaged there: scan or copy it again",
            ) from error
        if pixels.shape[:2] == (height, width):
            return pixels
        whole = self._blank(width, height)
        whole[top - y : bottom - y, left - x : right - x] = pixels
        return whole

    def _blank(self, width: int, height: int) -> NDArray[np.uint8]:
        return np.full((height, width, 3), self.description.background, np.uint8)

    def thumbnail(self, mpp: float) -> tuple[NDArray[np.uint8], float]:
        """The whole slide at about `mpp` um/px, area-averaged from the coarsest level that is at least as fine.

        Read strip by strip, so that a slide without coarse levels is never held.

        Returns:
            uint8 (h, w, 3) RGB, and its um/px (of the x axis).
        """
        from PIL import Image

        level = max((n for n in range(len(self.levels)) if self.level_mpp(n) <= mpp * 1.01), default=0)
        factor = max(1, round(mpp / self.level_mpp(level)))
        width, height = self.levels[level].size
        strip = max(factor, 1024 // factor * factor)
        strips = []
        for y in range(0, height, strip):
            pixels = Image.fromarray(self.read(level, 0, y, width, min(strip, height - y)))
            strips.append(np.asarray(pixels.reduce(factor) if factor > 1 else pixels))
        return np.concatenate(strips), self.mpp[0] * self.levels[level].downsample[0] * factor

    def close(self) -> None:
        """Let go of the file."""
        self._backend.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _on_background(pixels: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """RGB of RGB or RGBA pixels, composed on the background (straight alpha)."""
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    rgb, alpha = pixels[..., :3], pixels[..., 3]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgb)
    part = alpha[..., None].astype(np.uint16)
    mixed = rgb * part + np.asarray(background, np.uint16) * (255 - part)
    return ((mixed + 127) // 255).astype(np.uint8)


def _resolve_mpp(
    path: Path, description: Description, asked: float | None, warnings: list[str]
) -> tuple[tuple[float, float], str]:
    """um/px in use and where it comes from: the manifest's before the file's."""
    found = description.mpp
    low, high = MPP_RANGE
    possible = found is not None and all(low <= value <= high for value in found)
    if asked is not None:
        if not low <= asked <= high:
            raise ResolutionError(path, f"um/px {asked:g} given is impossible", f"give one within {low} to {high:g}")
        if found is not None and max(abs(asked / value - 1) for value in found) > MPP_WARNING:
            warnings.append(f"um/px {asked:g} given, the file says {found[0]:.4g} ({description.mpp_source})")
        return (asked, asked), "manifest"
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
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _looks_like_ngff(path: Path) -> bool:
    texts = [file.read_text(errors="replace") for name in ("zarr.json", ".zattrs") if (file := path / name).is_file()]
    return any('"multiscales"' in text for text in texts)


def open_slide(path: Path, mpp: float | None = None) -> Slide:
    """Open a slide of any format.

    Args:
        path: a file; or a folder: DICOM, OME-NGFF, or an IDC patient's patches.
        mpp: um/px to use whatever the file says.

    Raises:
        SlideError: it is no slide, or a damaged one: one line says why.
        ResolutionError: um/px is absent or impossible, in the file and in `mpp`.
    """
    path = Path(path)
    if not path.exists():
        raise SlideError(path, "not found", "check the path")
    refusals: list[str] = []
    for opener in _openers(path):
        try:
            backend = opener(path)
        except WsiIdcError:
            raise
        except Exception as error:
            refusals.append(_first_line(error))
            continue
        try:
            return Slide(path, backend, mpp)
        except WsiIdcError:
            backend.close()
            raise
    if not refusals:
        raise SlideError(path, "not a slide", "see the formats in the README")
    raise SlideError(path, "cannot be opened as a slide", " / ".join(dict.fromkeys(refusals)))


def _openers(path: Path) -> list[Callable[[Path], Backend]]:
    """The readers to try, in order."""
    if path.is_dir():
        if is_patch_folder(path):
            return [PatchFolder]
        if (path / "zarr.json").is_file() or (path / ".zattrs").is_file() or (path / ".zgroup").is_file():
            return [open_ngff]
        return [_open_dicom_by_openslide, DicomBackend] if any(map(_is_dicom, _first_files(path))) else []
    suffix = path.suffix.lower()
    if suffix in _PICTURES:
        return [open_picture]
    if suffix in _JP2:
        return [open_jp2]
    if _is_dicom(path):
        return [OpenSlideBackend, DicomBackend]
    return [OpenSlideBackend, TiffBackend, _open_plain_tiff] if suffix in _TIFF else [OpenSlideBackend]


def _open_dicom_by_openslide(folder: Path) -> Backend:
    """OpenSlide is given one file of a DICOM folder and finds the others of its series itself."""
    first = next(child for child in _first_files(folder) if _is_dicom(child))
    return OpenSlideBackend(first)


def _open_plain_tiff(path: Path) -> Backend:
    """A TIFF that is neither tiled nor OME: a picture, if a small one."""
    from PIL import UnidentifiedImageError

    try:
        return open_picture(path)
    except (UnidentifiedImageError, OSError) as error:
        raise OSError("no reader knows this TIFF") from error


def _first_line(error: BaseException) -> str:
    """A reader's reason in one line, without addresses and paths."""
    text = str(error).strip() or type(error).__name__
    line = re.sub(r"^Reading \S+: ", "", text.splitlines()[0].strip())
    return re.sub(r"<([\w.]+) object at 0x[0-9a-f]+>", r"\1", line)[:200]
