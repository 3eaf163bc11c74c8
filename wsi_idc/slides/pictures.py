"""Pictures, whose size is checked before anything of them is decoded: a small file can claim any size.

Pillow's own guard, a limit of the whole process, is left as it is: it warns above 89 million pixels and refuses twice
as many.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_idc.sources import check_source

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURE_PIXELS = 170_000_000
"""Pixels that are decoded in one piece (3 bytes each, 4 with transparency); Pillow's guard refuses 5 % more."""


def rgb_profile(picture: "Image") -> bytes:
    """The ICC profile of a picture that is kept in RGB; another's colours are converted without it."""
    return picture.info.get("icc_profile") or b"" if picture.mode in ("RGB", "RGBA", "P") else b""


class PictureSizeError(ValueError):
    """A picture of more pixels than are wanted; says how many it has."""


@contextmanager
def opened_picture(path: Path, limit: int) -> Iterator["Image"]:
    """A picture of which only the header was read.

    Args:
        path: the file.
        limit: pixels that it may have, at most `MAX_PICTURE_PIXELS`.

    Raises:
        PictureSizeError: it has more.
        OSError: it cannot be read (then with an errno), or is no picture.
        ValueError, SyntaxError: its header is broken.
    """
    import warnings

    from PIL import Image

    check_source(path)
    # The limit given here stands in the place of the warning.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        picture = Image.open(path)
    except Image.DecompressionBombError as error:
        raise PictureSizeError(f"more than {limit / 1e6:.0f} million pixels") from error
    with picture:
        width, height = picture.size
        if width * height > limit:
            raise PictureSizeError(f"{width} x {height} pixels, more than {limit / 1e6:.0f} million")
        yield picture
