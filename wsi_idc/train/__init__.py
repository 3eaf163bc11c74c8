"""Training: labelled tiles of a store in, a model bundle out. torch is imported when a run starts."""

from pathlib import Path
from typing import TYPE_CHECKING

from wsi_idc.train.settings import TrainSettings

if TYPE_CHECKING:
    from wsi_idc.train.data import Say
    from wsi_idc.train.result import TrainResult

__all__ = ["TrainSettings", "run"]


def run(
    store: str | Path,
    out: Path,
    settings: TrainSettings,
    *,
    say: "Say",
    resume: bool = False,
    progress: bool = False,
) -> "TrainResult | None":
    """Train, and write the bundle; see `wsi_idc.train.entry.run`."""
    from wsi_idc.train import entry

    return entry.run(store, out, settings, say=say, resume=resume, progress=progress)
