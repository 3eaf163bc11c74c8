"""Whether a bundle still answers what it answered, in each of its forms, and how fast it is here."""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_idc.digests import checksum
from wsi_idc.errors import ModelError
from wsi_idc.model.bundle import Form, LoadedBundle
from wsi_idc.model.known import made_tiles
from wsi_idc.model.runtime import Runtime, load_runtime

TOLERANCES = {"float32": 0.001, "float16": 0.02, "int8": 0.1}
"""The largest difference of a probability that is allowed, by precision. The shipped int8 graph differs from its
float32 weights by up to 0.007 on the made tiles, and by up to 0.24 on 16,749 real ones (0.0034 in the mean)."""
_SECONDS = 1.0
"""How long the rate is measured."""


@dataclass(frozen=True)
class FormCheck:
    """What became of one form.

    Attributes:
        form: the form.
        rate: tiles per second.
        largest: largest difference of a probability from what it is held against; None where that is the form itself.
        mean: of the differences.
        fault: why it is not usable: "" where it is.
    """

    form: Form
    rate: float | None
    largest: float | None
    mean: float | None
    fault: str = ""

    @property
    def tolerance(self) -> float:
        """The largest difference that is allowed."""
        return TOLERANCES[self.form.precision]


@dataclass(frozen=True)
class BundleCheck:
    """What became of a bundle.

    Attributes:
        against: what its forms were held against, in words.
        forms: one a form.
        notes: lines for the user.
    """

    against: str
    forms: tuple[FormCheck, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every form is usable and agrees."""
        return not any(check.fault for check in self.forms)


def check_bundle(bundle: LoadedBundle, threads: int = 0) -> BundleCheck:
    """Run every form of a bundle that can run here on the made tiles.

    Args:
        bundle: the model.
        threads: of the CPU; 0 for one a core.

    Raises:
        ModelError: the bundle has no form at all.
    """
    tiles = made_tiles(bundle.fields.tile.size_px)
    forms, notes = _forms(bundle)
    against, expected = "", known_answers(bundle, tiles)
    if expected is not None:
        against = "the answers that the bundle was written with"
    elif bundle.fields.known is not None:
        notes.append("the bundle's known answers are to other tiles than this version makes: they say nothing here")
    checks = []
    for form in forms:
        try:
            runtime = load_runtime(bundle, form, threads)
            found = runtime.predict(tiles)
        except ModelError as error:
            checks.append(FormCheck(form, None, None, None, error.reason))
            continue
        rate = _rate(runtime, tiles)
        if expected is None:
            against, expected = f"{form.file} in {form.precision}", found.astype(np.float64)
            fault = "" if np.isfinite(found).all() else "a probability is not a number"
            checks.append(FormCheck(form, rate, None, None, fault))
            continue
        checks.append(_held(form, rate, found, expected))
    if len(forms) == 1 and checks[0].largest is None:
        notes.append("one form and no known answers: there is nothing to hold it against")
    return BundleCheck(against, tuple(checks), tuple(notes))


def known_answers(bundle: LoadedBundle, tiles: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """What the bundle answered to the made tiles when it was written; None where it says nothing of these."""
    known = bundle.fields.known
    return np.array(known.probability) if known is not None and known.tiles == checksum(tiles) else None


def _forms(bundle: LoadedBundle) -> tuple[list[Form], list[str]]:
    """The forms to try, the most exact first, and what is left out."""
    found, notes = [bundle.form("float32")], []
    weights = bundle.weights_form()
    if weights is not None and weights not in found:
        found.append(weights)
    if bundle.fields.graph.int8 is not None:
        found.append(bundle.form("int8"))
    cuda = [form for form in bundle.forms() if form.device == "cuda"]
    if cuda:
        import torch

        if torch.cuda.is_available():
            found += cuda
        else:
            notes.append("no GPU that torch can use here: its forms for CUDA were not tried")
    return found, notes


def _held(form: Form, rate: float, found: NDArray[np.float32], expected: NDArray[np.float64]) -> FormCheck:
    if found.shape != expected.shape:
        return FormCheck(form, rate, None, None, f"it gave {found.shape}, the known answers are {expected.shape}")
    gaps = np.abs(found - expected)
    largest, mean = float(gaps.max()), float(gaps.mean())
    tolerance = TOLERANCES[form.precision]
    # Not `largest > tolerance`: of NaN that would be false.
    fault = "" if largest <= tolerance else f"a probability differs by {largest:.2g}, {tolerance:g} is allowed"
    return FormCheck(form, rate, largest, mean, fault)


def _rate(runtime: Runtime, tiles: NDArray[np.uint8]) -> float:
    """Tiles per second, over about a second, after a first batch."""
    batch = np.resize(tiles, (runtime.batch, *tiles.shape[1:]))
    runtime.predict(batch)
    start, done, seconds = time.perf_counter(), 0, 0.0
    begun = deque(runtime.begin(batch) for _ in range(runtime.ahead))
    while begun:
        begun.popleft().result()
        done, seconds = done + len(batch), time.perf_counter() - start
        if seconds < _SECONDS:
            begun.append(runtime.begin(batch))
    return done / seconds
