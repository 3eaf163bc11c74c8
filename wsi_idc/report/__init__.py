"""The page of a run: one file of HTML that shows each slide with its map, and needs nothing else."""

from wsi_idc.report.report import BEGINNING, Written, write

__all__ = ["BEGINNING", "Written", "write"]
