"""What a person should look at before a slide's map is believed: said from what the store knows, without a pixel.

What is usual was measured on the public IDC patches and lies in `flags.json` (`make flags` measures it again);
docs/flags.md has what each flag means, where its limit was set, and how often it is a false alarm.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from wsi_idc.store import StoredMap, StoredSlide
from wsi_idc.tissue import DARK, PLAIN

Kind = Literal[
    "no tissue",
    "nearly all tissue",
    "stain",
    "um/px",
    "damage",
    "ICC profile",
    "one value",
    "high on blur",
    "high on ink",
    "beyond validation",
]

NEARLY_ALL = 0.95
"""Part of a slide from which it is nearly all tissue."""
MPP_DIFFERS = 0.05
"""Part by which the um/px in use may differ from the file's."""
ONE_VALUE = 0.5
"""Part of a slide's tiles that share a probability, from which the map is implausible."""
ONE_VALUE_TILES = 50
"""Tiles from which that is asked: a handful may well be alike."""
SAME_LOGIT = 0.1
"""Tiles whose log odds lie within this share a probability: 0.50 and 0.52, or 0.010 and 0.011."""
HIGH_PART = 0.1
"""Part of the tiles above the threshold that may be blurred, or inked."""
HIGH_TILES = 5
"""Tiles above the threshold from which that is asked."""
EXTREME = 0.99
"""The quantile of a slide's log odds that is held against the validation slides'."""


@dataclass(frozen=True)
class Flag:
    """Something that a person should look at.

    Attributes:
        kind: which of the flags it is.
        reason: why, in one line, as a user reads it.
    """

    kind: Kind
    reason: str

    @property
    def suspicious(self) -> bool:
        """Whether it speaks against the slide or its map; an ICC profile is only to be known of."""
        return self.kind != "ICC profile"

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Part):
    """How many slides a limit flagged where nothing was wrong."""

    flagged: int
    of: int


class Stains(_Part):
    """The stain of slides that a model learnt from; optical densities of red, green and blue as `tissue.stain` says."""

    median: tuple[float, float, float]
    covariance: tuple[tuple[float, float, float], ...]
    slides: int
    limit: float
    """The largest distance of a validation slide."""
    false_alarms: Measured


class HighTiles(_Part):
    """What IDC tiles look like at one resolution."""

    mpp: float
    tiles: int
    least_blur: float
    """The least sharp of them."""
    most_pen: float
    """The part of ink-coloured pixels of the one that has most."""
    blur_false_alarms: Measured
    pen_false_alarms: Measured


class Maps(_Part):
    """What one model said of slides that it never saw."""

    model: str
    digests: tuple[str, ...]
    """Of the files that it runs from."""
    slides: int
    highest: float
    """The largest `EXTREME` quantile of log odds that one of these slides had."""


class Usual(_Part):
    """The contents of `flags.json`."""

    stain: Stains
    high: HighTiles
    maps: Maps


USUAL = Path(__file__).with_name("flags.json")


@lru_cache(maxsize=1)
def usual() -> Usual:
    """What was measured."""
    return Usual.model_validate_json(USUAL.read_text())


def flags(slide: StoredSlide, map: StoredMap | None = None) -> list[Flag]:
    """What a person should look at on a slide and its map, by their records alone.

    A map that is not current is left alone. What is to be said of a map was found when it was made (`of_map`), with the
    arrays at hand: many slides can then be asked in no time.
    """
    found = [*_of_slide(slide)]
    if map is not None and map.state(slide).kind == "current":
        found += of_record(map)
    return found


def of_record(map: StoredMap) -> list[Flag]:
    """What was said of a map when it was made; nothing by a version that did not say."""
    known = map.attributes.get("flags")
    return [Flag(kind, str(reason)) for kind, reason in known] if isinstance(known, list) else []


# --- the slide ----------------------------------------------------------------------------------------------------


def _of_slide(slide: StoredSlide) -> Iterator[Flag]:
    known = slide.attributes
    steps = known.get("tissue_steps") or {}
    if not slide.count:
        yield Flag("no tissue", _why_none(steps))
    elif steps.get("method") not in (None, "none", "patches") and steps["tissue"] >= NEARLY_ALL:
        yield Flag("nearly all tissue", _why_all(steps))
    if (own := known.get("stain")) is not None and (far := stain_distance(own)) > usual().stain.limit:
        yield Flag("stain", _unlike(own, far))
    if (file := known.get("mpp_file")) is not None and known.get("mpp_source") == "given":
        given, differs = slide.mpp[0], max(abs(slide.mpp[0] / value - 1) for value in file)
        if differs > MPP_DIFFERS:
            times = f"{max(given / file[0], file[0] / given):.3g} times"
            yield Flag("um/px", f"the manifest says {given:.4g} um/px and the file {file[0]:.4g}, {times} apart")
    for line in known.get("damage") or []:
        yield Flag("damage", str(line))
    if (icc := known.get("icc")) is not None:
        what = "it was applied" if icc["applied"] else "it was not applied (extract --icc applies it)"
        yield Flag("ICC profile", f"the file has the profile {icc['profile']!r}; {what}")


def _why_none(known: Mapping[str, Any]) -> str:
    """Why a slide has no tile, by the step of the mask that left none."""
    method, steps = known.get("method"), known.get("steps", {})
    if known.get("tiles_with_tissue"):
        return f"{known['tissue']:.2%} of the slide is tissue, and no tile has as much of it as --min-tissue asks"
    if DARK in steps:
        return "its background is dark, where the mask looks for bright glass: fluorescence, or a colour inverted?"
    if PLAIN in steps:
        return "the whole slide has one colour"
    if not steps:
        ways = {None: "cut by a version that kept no reason", "mask": "the manifest's mask marks none"}
        return ways.get(method, f"the method {method!r} of the mask found none")
    (_, coloured), *others = steps.items()
    if coloured <= 0:
        return "nothing on it has the colours of tissue"
    step, change = min(others, key=lambda item: item[1])
    return f"{coloured:.2%} of the slide has the colours of tissue, and most was taken off as {step} ({-change:.2%})"


def _why_all(known: Mapping[str, Any]) -> str:
    part, filled = f"{known['tissue']:.0%} of the slide is tissue", known["steps"].get("holes filled", 0.0)
    by = f", {filled:.0%} by filling holes" if filled >= 0.05 else ""
    if known["method"] == "mask":
        return f"{part} by the manifest's mask{by}"
    return f"{part}{by}: a piece of a slide, or glass that was taken for tissue"


def stain_distance(stain: list[float]) -> float:
    """How far a stain is from those of the slides that were learnt from, in standard deviations (Mahalanobis).

    Args:
        stain: as `tissue.stain` gives it.
    """
    known = usual().stain
    away = np.asarray(stain) - known.median
    return float(np.sqrt(away @ np.linalg.solve(np.asarray(known.covariance), away)))


def _unlike(stain: list[float], distance: float) -> str:
    known = usual().stain
    spread = np.sqrt(np.diag(known.covariance))
    by = (np.asarray(stain) - known.median) / spread
    most = int(np.abs(by).argmax())
    colour = ("red", "green", "blue")[most]
    # Each may be usual, and what they are together not.
    which = f"it absorbs {'more' if by[most] > 0 else 'less'} {colour}" if abs(by[most]) > 2 else "its hue is another"
    return (
        f"unlike that of the {known.slides} training patients: {which}"
        f" (distance {distance:.1f}, validation slides have up to {known.limit:.1f})"
    )


# --- the map ------------------------------------------------------------------------------------------------------


def log_odds(probability: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64, the shape of probability: its logit, within +-14."""
    p = np.clip(probability.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.asarray(np.log(p / (1 - p)), dtype=np.float64)


def sharing(values: NDArray[np.float64], width: float = SAME_LOGIT) -> tuple[float, float]:
    """The largest part of the values that lies within `width`, and the middle of where it does."""
    values = np.sort(values)
    counts = np.searchsorted(values, values + width, side="right") - np.arange(len(values))
    first = int(counts.argmax())
    return float(counts[first] / len(values)), float(np.median(values[first : first + counts[first]]))


def of_map(
    slide: StoredSlide,
    model: Mapping[str, Any],
    probability: NDArray[np.float32],
    alone: NDArray[np.float32],
    blur: NDArray[np.float32],
    pen: NDArray[np.float32],
) -> Iterator[Flag]:
    """What a person should look at on a map that has just been made.

    Args:
        slide: its tiles.
        model: name, digest and threshold, as the map's attributes have them.
        probability: float32 (n,), P(positive).
        alone: float32 (n,), the same by each tile's own pixels: where neighbours take part, a smooth map is usual.
        blur, pen: float32 (n,), as `tissue.tile_quality` gives them.
    """
    if not slide.count:
        return
    own = log_odds(alone)
    part, middle = sharing(own)
    if part > ONE_VALUE and len(own) >= ONE_VALUE_TILES:
        reason = f"{part:.0%} of {len(own):,} tiles have the same probability ({1 / (1 + np.exp(-middle)):.3g})"
        yield Flag("one value", reason)
    yield from _high(slide.spec.mpp, probability >= model["threshold"], blur, pen)
    known = usual().maps
    if model["name"] == known.model and model["digest"] in known.digests:
        extreme = float(np.quantile(own, EXTREME))
        if extreme > known.highest:
            own_p, their_p = (1 / (1 + np.exp(-value)) for value in (extreme, known.highest))
            reason = f"its surest hundredth of tiles is above {own_p:.4f}, no validation slide's above {their_p:.4f}"
            yield Flag("beyond validation", reason)


def _high(mpp: float, high: NDArray[np.bool_], blur: NDArray[np.float32], pen: NDArray[np.float32]) -> Iterator[Flag]:
    """Tiles above the threshold that are less sharp than any IDC tile, or more inked."""
    known, count = usual().high, int(high.sum())
    if count < HIGH_TILES:
        return
    # The sharpness of a picture is another at another resolution; the colour of ink is not.
    if abs(mpp / known.mpp - 1) < 0.01:
        blurred = int((blur[high] < known.least_blur).sum())
        if blurred > HIGH_PART * count:
            reason = f"{blurred:,} of {count:,} tiles above the threshold are less sharp than any IDC tile of training"
            yield Flag("high on blur", reason)
    inked = int((pen[high] > known.most_pen).sum())
    if inked > HIGH_PART * count:
        reason = f"{inked:,} of {count:,} tiles above the threshold have more of the colour of ink than any IDC tile"
        yield Flag("high on ink", f"{reason} of training")
