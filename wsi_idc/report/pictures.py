"""The page's pictures: made from arrays, kept in the page or, where it would be too large, in a folder beside it."""

import base64
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image

from wsi_idc.errors import StoreBusyError, UsageError, system_reason
from wsi_idc.export.pictures import overlay
from wsi_idc.results import Result

PAGE_BYTES = 25_000_000
"""A page with its pictures inside is not larger than this."""
THUMB_PX = 176
"""Longest side of the table's pictures: twice what is shown, for dense screens."""
PICTURE_PX = 900
"""Longest side of a slide's picture."""
TILE_PX = 200
"""Longest side of a tile's picture."""

Kind = Literal["jpeg", "png"]


def smaller(pixels: NDArray[np.uint8], longest: int) -> NDArray[np.uint8]:
    """uint8 (h, w, 3) whose longest side is at most `longest` pixels."""
    import cv2

    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def jpeg(pixels: NDArray[np.uint8], quality: int = 82, *, subsampling: int = 2) -> bytes:
    """A picture of uint8 (h, w, 3): WebP's would be a fifth smaller, and takes twenty times as long.

    Args:
        pixels: the picture.
        quality: JPEG's.
        subsampling: of colour, as Pillow counts: 0 keeps all of it, 2 a quarter.
    """
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=subsampling)
    return stream.getvalue()


def map_png(result: Result) -> bytes:
    """A slide's map, a pixel a cell of its grid; clear where there is no tile."""
    stream = BytesIO()
    Image.fromarray(overlay(result)).save(stream, "PNG")
    return stream.getvalue()


def thumb_with_map(thumb: NDArray[np.uint8], result: Result, opacity: float) -> bytes:
    """A small picture of a slide, uint8 (h, w, 3), under its map."""
    height, width = thumb.shape[:2]
    layer = Image.fromarray(overlay(result, opacity, (height, width)))
    whole = Image.alpha_composite(Image.fromarray(thumb).convert("RGBA"), layer)
    return jpeg(np.asarray(whole.convert("RGB")))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writes of the page and its pictures.

    Raises:
        UsageError: the system refused.
    """
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({system_reason(error)})"
        raise UsageError(path, problem, "free space, or choose another --out") from error


def folders_of(page: Path) -> Path:
    """Beside a page, where the folder of its pictures is."""
    return page.with_name(f"{page.stem}_files")


class Pictures:
    """The pictures of one page: held here as long as the page can carry them, then written to a folder beside it.

    Several threads may add to them.

    The folder is `<page>_files/<a new name>/`: a page and its pictures change together when the page is renamed into
    its place, and a run that is killed leaves the old page with its own.

    Args:
        page: where the page will be.
    """

    def __init__(self, page: Path) -> None:
        self._all = folders_of(page)
        self._run = uuid.uuid4().hex
        self._held: dict[str, bytes] = {}
        self._names: list[str] = []
        self._bytes = 0
        self._lock = FileLock(self._all / ".lock", timeout=0, thread_local=False)
        self._adding = threading.RLock()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def folder(self) -> Path | None:
        """Where they are; None: in the page."""
        return self._all / self._run if self._lock.is_locked else None

    def add(self, content: bytes, kind: Kind) -> str:
        """Keep a picture; gives its name.

        Raises:
            UsageError: the folder cannot be written.
            StoreBusyError: another run writes pictures of the same page.
        """
        with self._adding:
            name = f"{len(self._names) + 1:05}.{kind}"
            self._names.append(name)
            self._held[name] = content
            self._bytes += len(content)
            if self.folder is not None or self._bytes * 4 / 3 > PAGE_BYTES:
                self.spill()
            return name

    def spill(self) -> Path:
        """Put what is held into the folder, and so whatever comes later.

        Raises:
            UsageError, StoreBusyError: see `add`.
        """
        folder = self._all / self._run
        with writing(folder):
            if self.folder is None:
                self._all.mkdir(parents=True, exist_ok=True)
                try:
                    self._lock.acquire()
                except Timeout as error:
                    advice = "wait for it, or use another --out"
                    raise StoreBusyError(self._all, "another run writes there", advice) from error
                folder.mkdir()
            for name, content in self._held.items():
                (folder / name).write_bytes(content)
        self._held.clear()
        return folder

    def source(self, name: str) -> str:
        """The address of a picture, as the page has it; nothing in it needs escaping."""
        if self.folder is not None:
            return quote(f"{self._all.name}/{self._run}/{name}")
        return f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(self._held[name]).decode()}"

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove what no page shows: what is of earlier ones; or, where this one failed, what is of this one."""
        runs = self._runs()
        try:
            if runs:
                with self._lock:
                    for old in runs:
                        if (old.name == self._run) == (kind is not None):
                            shutil.rmtree(old)
        except (Timeout, OSError):
            return  # Whoever writes there now, or next, tidies up.
        finally:
            self._lock.release(force=True)
        if runs and not self._runs():
            with suppress(OSError):
                (self._all / ".lock").unlink(missing_ok=True)
                self._all.rmdir()

    def _runs(self) -> list[Path]:
        """Folders of pictures that are there, this one's among them."""
        return [path for path in self._all.iterdir() if _RUN.fullmatch(path.name)] if self._all.is_dir() else []


_RUN = re.compile("[0-9a-f]{32}")
