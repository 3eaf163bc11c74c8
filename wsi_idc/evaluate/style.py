"""What our pages look like."""

from importlib.resources import files


def base_style() -> str:
    """The style that all of our pages have in common."""
    return files("wsi_idc.evaluate").joinpath("base.css").read_text("utf-8")
