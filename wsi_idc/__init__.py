"""wsi-idc: probability maps of invasive ductal carcinoma from whole-slide images. Research use only."""

__version__ = "0.1.0"
