"""A folder of IDC patches as a slide at 4.0 um/px, whose tiles come ready-cut, each with its label.

The data set "Breast Histopathology Images" (Cruz-Roa 2014, doi:10.1117/12.2043872) ships a folder a patient, in it a
folder a class, in it `<patient>_idx5_x<x>_y<y>_class<c>.png`: x is the column and y the row of the top-left pixel,
1-based, in steps of 50 px.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import SlideError
from wsi_idc.slides.backends import Description, Level
from wsi_idc.units import LevelPx, Mpp, TilePx

SIDE = TilePx(50)
"""Pixels of a patch's side."""
MPP = Mpp(4.0)
"""um/px of the data set: 40x scans reduced 16:1."""
BACKGROUND = (245, 245, 245)

_NAME = re.compile(r"(?P<patient>.+)_idx\d+_x(?P<x>\d+)_y(?P<y>\d+)_class(?P<label>[01])\.png", re.IGNORECASE)


class Patch(NamedTuple):
    """One patch of the folder."""

    path: Path
    label: int


def is_patch_folder(folder: Path) -> bool:
    """Whether a folder holds class folders 0 or 1 with patches in them; looks at a few names of each."""
    for label in ("0", "1"):
        inner = folder / label
        if inner.is_dir():
            names = (child.name for _, child in zip(range(20), inner.iterdir(), strict=False))
            if any(_NAME.fullmatch(name) for name in names):
                return True
    return False


class PatchFolder:
    """The backend of a patch folder.

    Attributes:
        cells: (row, column) -> patch, of every patch that is usable.
        left_out: reason -> number of files that are not.
    """

    shared = True

    def __init__(self, folder: Path) -> None:
        self.cells: dict[tuple[int, int], Patch] = {}
        self.left_out: dict[str, int] = {}
        for label in ("0", "1"):
            for path in sorted((folder / label).glob("*")) if (folder / label).is_dir() else []:
                self._add(path)
        if not self.cells:
            raise SlideError(folder, "no usable 50 x 50 patch in it", "give the folder of one patient")
        rows = 1 + max(row for row, _ in self.cells)
        columns = 1 + max(column for _, column in self.cells)
        self.description = Description(
            format="IDC patches",
            reader="Pillow",
            levels=(
                Level((LevelPx(columns * SIDE), LevelPx(rows * SIDE)), (1.0, 1.0), (LevelPx(SIDE), LevelPx(SIDE))),
            ),
            mpp=(MPP, MPP),
            mpp_source="the data set (2.5x)",
            background=BACKGROUND,
        )

    def _add(self, path: Path) -> None:
        from PIL import Image, UnidentifiedImageError

        name = _NAME.fullmatch(path.name)
        if name is None:
            return self._leave_out("another name than <patient>_idx5_x.._y.._class...png")
        x, y = int(name["x"]) - 1, int(name["y"]) - 1
        if x % SIDE or y % SIDE or x < 0 or y < 0:
            return self._leave_out("not on the 50-px grid")
        try:
            with Image.open(path) as picture:
                size = picture.size
        except (UnidentifiedImageError, OSError):
            return self._leave_out("not a readable picture")
        if size != (SIDE, SIDE):
            return self._leave_out("not 50 x 50 px")
        cell = (y // SIDE, x // SIDE)
        if cell in self.cells:
            return self._leave_out("a second patch of the same place")
        self.cells[cell] = Patch(path, int(name["label"]))
        return None

    def _leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def ready_cells(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The cells that have a patch, row by row, and the label of each.

        Returns:
            int32 (n, 2) of row, column; float32 (n,) of 0 or 1.
        """
        cells = np.array(sorted(self.cells), np.int32)
        labels = np.array([self.cells[row, column].label for row, column in cells.tolist()], np.float32)
        return cells, labels

    def read(self, level: int, x: LevelPx, y: LevelPx, width: LevelPx, height: LevelPx) -> NDArray[np.uint8]:
        """See `Backend.read`; patches are decoded as they are met."""
        from PIL import Image

        canvas = np.full((height, width, 3), BACKGROUND, np.uint8)
        for row in range(y // SIDE, -(-(y + height) // SIDE)):
            for column in range(x // SIDE, -(-(x + width) // SIDE)):
                patch = self.cells.get((row, column))
                if patch is None:
                    continue
                with Image.open(patch.path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                left, top = column * SIDE - x, row * SIDE - y
                across = slice(max(left, 0), min(left + SIDE, width))
                down = slice(max(top, 0), min(top + SIDE, height))
                canvas[down, across] = pixels[
                    down.start - top : down.stop - top, across.start - left : across.stop - left
                ]
        return canvas

    def close(self) -> None:
        """Nothing is held open."""
