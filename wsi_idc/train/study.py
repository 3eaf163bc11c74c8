"""A finished cross-validation, read and checked, as another training uses it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_idc.errors import UsageError
from wsi_idc.evaluate.held_out import read_held_out
from wsi_idc.train.calibrate import Judges
from wsi_idc.train.data import LabelledTiles
from wsi_idc.train.settings import TrainSettings

SUMMARY = "cross-validation.json"
"""Written last: a folder that has it holds a finished cross-validation."""


@dataclass(frozen=True)
class Study:
    """A cross-validation that is done, as another training uses it.

    Attributes:
        judges: a part a fold, the held-out patients.
        recorded: name, counts and figures, for the card.
    """

    judges: list[Judges]
    recorded: dict[str, Any]


def read_study(folder: Path, tiles: LabelledTiles, settings: TrainSettings) -> Study:
    """A cross-validation of the recipe that is being trained, on the same store.

    Raises:
        UsageError: none is there, it is damaged, or it is of other settings or another store.
    """
    option = f"--cross-validation {folder}"
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        known, identity = dict(summary["settings"]), summary["data_identity"]
        counts = {"patients": int(summary["patients"]), "folds": len(summary["folds"])}
        figures, alone = summary["pooled"], summary["pooled_alone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "give the folder of a finished train --folds; run that again if an older version made it"
        raise UsageError(option, "holds no finished cross-validation", advice) from error
    if identity != tiles.identity:
        raise UsageError(option, "was made on another store", "cross-validate on the store that is trained on")
    # A final training starts from other weights than a fold, and may look at another number of folds.
    apart = {"folds", "init", "teacher"}
    if other := [name for name in settings.unlike(known) if name not in apart]:
        raise UsageError(option, f"was made with other settings ({', '.join(other)})", "give the same ones")
    columns = read_held_out(folder).columns
    place = {key: index for index, key in enumerate(zip(tiles.slide.tolist(), tiles.row.tolist(), strict=True))}
    judges = []
    for fold in np.unique(columns["fold"]):
        own = np.flatnonzero(columns["fold"] == fold)
        keys = zip(columns["slide"][own].tolist(), columns["row"][own].tolist(), strict=True)
        places = np.array([place[key] for key in keys])
        truth = tiles.positive(settings.positive_from)[places]
        judges.append(Judges(columns["logit"][own], tiles.cell[places], tiles.slide[places], truth))
    recorded = {
        "name": folder.resolve().name,
        **counts,
        "tiles": len(columns["fold"]),
        "interval": f"95 %, bootstrap over {counts['patients']} patients",
        "figures": figures,
    }
    return Study(judges, recorded | ({"figures_alone": alone} if alone != figures else {}))
