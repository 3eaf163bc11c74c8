"""wsi-idc: probability maps of invasive ductal carcinoma from whole-slide images. Research use only."""

__version__ = "0.1.0"

USE = "Research use only. Not for diagnosis."
"""Said wherever results are shown."""
