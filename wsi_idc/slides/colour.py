"""ICC profiles: what a slide's colours mean, and how they become sRGB."""

from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_idc.errors import SlideError


class Profile:
    """A slide's ICC profile.

    Args:
        path: the slide's, for messages.
        content: the profile.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content = path, content

    @property
    def name(self) -> str:
        """What it calls itself, in one line; says so where it cannot be read."""
        from PIL import ImageCms

        try:
            text = ImageCms.getProfileDescription(ImageCms.getOpenProfile(BytesIO(self._content)))
        except (ImageCms.PyCMSError, OSError):
            return "unreadable"
        return " ".join(text.split())[:100] or "without a name"

    @cached_property
    def _transform(self) -> Any:
        from PIL import ImageCms

        try:
            own = ImageCms.getOpenProfile(BytesIO(self._content))
            # Without its cache of the last pixel, threads may share a transform.
            return ImageCms.buildTransform(
                own,
                ImageCms.createProfile("sRGB"),
                "RGB",
                "RGB",
                ImageCms.Intent(ImageCms.getDefaultIntent(own)),
                ImageCms.Flags.NOCACHE,
            )
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            problem = f"its ICC profile ({self.name}) cannot be applied ({str(error).strip() or type(error).__name__})"
            raise SlideError(self._path, problem, "leave --icc out") from error

    def to_srgb(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same pixels in sRGB, by the intent that the profile names.

        Args:
            pixels: uint8 (h, w, 3), in the profile's colours.

        Returns:
            uint8 (h, w, 3). A pixel's colour depends on nothing but that pixel.

        Raises:
            SlideError: the profile is broken, or not of RGB.
        """
        from PIL import Image, ImageCms

        return np.array(ImageCms.applyTransform(Image.fromarray(pixels), self._transform))
