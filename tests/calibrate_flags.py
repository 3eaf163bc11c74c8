"""Measures what is usual, for `wsi_idc/flags.py`, on the public IDC patches; run by `make flags` (two minutes).

Training patients (82) say what is usual, validation patients (29) where a limit lies, and the patients who are in no
published list (119) how often it is a false alarm. Maps are those that the shipped model makes of the validation
patients, the only ones whom it never saw; of those a limit's false alarms cannot be measured again.
"""

import argparse
import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from wsi_idc.extract import extract
from wsi_idc.files import write_whole
from wsi_idc.flags import EXTREME, HIGH_PART, HIGH_TILES, USUAL, Usual, log_odds
from wsi_idc.infer import infer
from wsi_idc.manifest import Row
from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import StoredSlide, open_store

MPP = 4.0


class Silent:
    """Hears how slides go on, and says nothing."""

    def __call__(self, slides: Any) -> "Silent":
        return self

    def prepared(self, *_: Any) -> None: ...

    def advanced(self, *_: Any) -> None: ...

    def ended(self, *_: Any) -> None: ...


def measure(data: Path, work: Path) -> Usual:
    """What `flags.json` should say.

    Args:
        data: the folder of `patches.zip`, `unpack.py` and `patients.csv`.
        work: an empty folder for the unpacked patches and a store.
    """
    with (data / "patients.csv").open() as stream:
        splits = {row["patient_id"]: row["split"] for row in csv.DictReader(stream)}
    subprocess.run([sys.executable, data / "unpack.py", work / "patches"], check=True, capture_output=True)
    rows = [Row(name, work / "patches" / name, name) for name in splits]
    summary = extract(rows, work / "tiles.zarr", ExtractSettings(), listener=Silent())
    assert not summary.failures, summary.failures
    store = open_store(work / "tiles.zarr")
    slides = {
        split: [store.slide(name) for name, own in splits.items() if own == split]
        for split in ("train", "val", "extra")
    }
    names = [slide.slide_id for slide in slides["val"]]
    infer(work / "tiles.zarr", read_bundle(SHIPPED), InferSettings(), only=names, listener=Silent())
    return Usual.model_validate({"stain": stain(slides), "high": high(slides), "maps": maps(store, names)})


def stain(slides: dict[str, list[StoredSlide]]) -> dict[str, Any]:
    """See `flags.Stains`."""
    stains = {
        split: np.array([own for slide in some if (own := slide.attributes["stain"]) is not None])
        for split, some in slides.items()
    }
    median = np.median(stains["train"], axis=0).round(4)
    covariance = np.cov(stains["train"].T).round(8)

    def distances(values: Any) -> Any:
        away = values - median
        return np.sqrt(np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away))

    limit = round(float(distances(stains["val"]).max()) + 5e-4, 3)
    flagged = int((distances(stains["extra"]) > limit).sum())
    return {
        "median": median.tolist(),
        "covariance": covariance.tolist(),
        "slides": len(stains["train"]),
        "limit": limit,
        "false_alarms": {"flagged": flagged, "of": len(stains["extra"])},
    }


@dataclass(frozen=True)
class Idc:
    """Sharpness and ink of a patient's IDC tiles, by the pathologist's label."""

    blur: Any
    pen: Any


def high(slides: dict[str, list[StoredSlide]]) -> dict[str, Any]:
    """See `flags.HighTiles`."""
    tiles = {
        split: [Idc(slide.blur[mask], slide.pen[mask]) for slide in some if (mask := slide.idc >= 0.5).any()]
        for split, some in slides.items()
    }
    blur = np.concatenate([patient.blur for patient in tiles["train"]])
    pen = np.concatenate([patient.pen for patient in tiles["train"]])
    least, most = round(float(blur.min()), 2), round(float(pen.max()), 4)
    others = [patient for split in ("val", "extra") for patient in tiles[split] if len(patient.blur) >= HIGH_TILES]
    blurred = sum(bool((patient.blur < least).mean() > HIGH_PART) for patient in others)
    inked = sum(bool((patient.pen > most).mean() > HIGH_PART) for patient in others)
    return {
        "mpp": MPP,
        "tiles": len(blur),
        "least_blur": least,
        "most_pen": most,
        "blur_false_alarms": {"flagged": blurred, "of": len(others)},
        "pen_false_alarms": {"flagged": inked, "of": len(others)},
    }


def maps(store: Any, names: list[str]) -> dict[str, Any]:
    """See `flags.Maps`."""
    bundle = read_bundle(SHIPPED)
    model = bundle.fields.name
    alone = [log_odds(store.map(model, name).read("alone")) for name in names]
    highest = max(float(np.quantile(values, EXTREME)) for values in alone)
    return {
        "model": model,
        "digests": sorted(bundle.digests()),
        "slides": len(names),
        "highest": round(highest + 5e-4, 3),
    }


def main() -> None:
    """Write `wsi_idc/flags.json` anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder of the IDC data")
    data = parser.parse_args().data.absolute()
    with TemporaryDirectory(prefix="wsi-idc-flags-") as folder:
        found = measure(data, Path(folder))
    write_whole(USUAL, (found.model_dump_json(indent=2) + "\n").encode())
    print(found.model_dump_json(indent=2))


if __name__ == "__main__":
    main()
