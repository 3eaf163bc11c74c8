"""The page of a run: one file of HTML that shows each slide with its map, and needs nothing else."""

from wsi_idc.report.report import Written, write

__all__ = ["Written", "write"]
