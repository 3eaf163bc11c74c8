"""A slide as square pictures of any zoom, by OpenSlide's Deep Zoom, whatever the slide's format.

OpenSlide's generator asks a slide for regions. It is given one that reads through `slides`, so that what is shown is
what was cut, and one more level: the store's thumbnail. Without that, the whole of a slide that has no coarse levels
would be read for the first picture.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openslide import AbstractSlide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from wsi_idc.digests import fingerprint
from wsi_idc.errors import SlideError, WsiIdcError
from wsi_idc.slides import Slide, open_slide
from wsi_idc.sources import Url, source_of
from wsi_idc.store import StoredSlide

TILE = 256
"""Side of a picture in pixels."""
_QUALITY = 85
"""Of JPEG."""


class _Levels(AbstractSlide):  # type: ignore[misc]
    """What OpenSlide's generator reads: a slide's levels, and its thumbnail as the coarsest.

    Args:
        slide: the open slide; None: its thumbnail is all there is.
        thumbnail: uint8 (h, w, 3) RGB of the whole slide.
    """

    def __init__(self, slide: Slide | None, thumbnail: NDArray[np.uint8]) -> None:
        super().__init__()
        self._slide, self._thumbnail = slide, thumbnail
        height, width = thumbnail.shape[:2]
        sizes = [level.size for level in slide.levels] if slide else []
        if not sizes or sizes[-1][0] > width:
            sizes.append((width, height))
        self._sizes = tuple((int(across), int(down)) for across, down in sizes)
        self._lock = Lock()

    @classmethod
    def detect_format(cls, filename: object) -> str | None:
        """Not used: the slide is open."""
        return None

    def close(self) -> None:
        """Let go of the file."""
        if self._slide is not None:
            self._slide.close()

    @property
    def level_count(self) -> int:
        """Levels, the thumbnail counted."""
        return len(self._sizes)

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each, finest first."""
        return self._sizes

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Of each level's width."""
        return tuple(self._sizes[0][0] / size[0] for size in self._sizes)

    @property
    def properties(self) -> Mapping[str, str]:
        """None that matter: bounds and background are dealt with by the slide."""
        return {}

    @property
    def associated_images(self) -> Mapping[str, Any]:
        """None: a label can name a patient."""
        return {}

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """The coarsest level that is at least as fine, to a hundredth."""
        fine = [number for number, down in enumerate(self.level_downsamples) if down <= downsample * 1.01]
        return fine[-1] if fine else 0

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """RGBA of a region; `location` in level-0 pixels, `size` in those of the level."""
        across, down = self._sizes[0], self._sizes[level]
        x, y = (int(place * own / whole) for place, own, whole in zip(location, down, across, strict=True))
        width, height = size
        if self._slide is None or level == len(self._slide.levels):
            pixels = self._thumbnail[y : y + height, x : x + width]
        else:
            # One handle is no more than one thread's.
            with self._lock:
                pixels = self._slide.read(level, x, y, width, height)  # type: ignore[arg-type]
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGBA")


class Pixels:
    """Pictures of one slide.

    Attributes:
        mpp: um a pixel of the finest pictures, along x and along y.
        size: (width, height) of the slide in such pixels.
        note: why the slide itself is not shown, or what to beware of; "" where nothing is.
    """

    def __init__(self, stored: StoredSlide) -> None:
        slide, self.note = _open(stored)
        thumbnail = stored.thumbnail
        levels = _Levels(slide, thumbnail)
        self.size = levels.dimensions
        width, height = stored.grid.size
        self.mpp = stored.mpp[0] * width / self.size[0], stored.mpp[1] * height / self.size[1]
        self._levels = levels
        self._zoom = DeepZoomGenerator(levels, tile_size=TILE, overlap=0)
        self._first = max(0, self._zoom.level_count - 1 - self.zooms)

    @property
    def zooms(self) -> int:
        """The finest zoom; at zoom 0 the slide fits into one picture."""
        return max(0, int(self._zoom.level_count) - TILE.bit_length())

    def picture(self, zoom: int, column: int, row: int) -> bytes:
        """A square of the slide as JPEG; white beyond it.

        Raises:
            SlideError: the file cannot be read there.
        """
        square = Image.new("RGB", (TILE, TILE), "white")
        level = self._first + zoom
        if 0 <= zoom <= self.zooms:
            columns, rows = self._zoom.level_tiles[level]
            if 0 <= column < columns and 0 <= row < rows:
                square.paste(self._zoom.get_tile(level, (column, row)).convert("RGB"), (0, 0))
        content = BytesIO()
        square.save(content, "jpeg", quality=_QUALITY)
        return content.getvalue()

    def close(self) -> None:
        """Let go of the file."""
        self._levels.close()


def _open(stored: StoredSlide) -> tuple[Slide | None, str]:
    """The slide, where it is at hand; and what a user must know of it."""
    source = source_of(stored.path)
    shown = "its thumbnail is shown"
    if isinstance(source, Url):
        return None, f"The slide lies in an object store: {shown}."
    made_from = stored.made_from
    try:
        if fingerprint(Path(source)) != made_from["source"]:
            return None, f"The slide's file is not, or no longer, the one that was extracted: {shown}."
        return open_slide(
            Path(source), made_from["slide um/px"], made_from["reader"], icc=made_from.get("icc", False)
        ), ""
    except OSError as error:
        return None, f"The slide's file cannot be read ({error.strerror or error}): {shown}."
    except (SlideError, WsiIdcError) as error:
        return None, f"The slide's file cannot be read ({error.problem}): {shown}."
