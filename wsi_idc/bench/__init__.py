"""`wsi-idc bench`: what a run costs on this machine, with a slide and a model; what binds; how long a manifest takes.

Measuring (`measure.py`, with the tools in `figures.py`) knows nothing of what its figures mean; what they mean
(`advice.py`) is said without measuring anything; `subject.py` chooses what is measured.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from wsi_idc.bench.advice import Looked, Measured, advice, estimate_manifest, estimate_slide
from wsi_idc.bench.figures import HEADER, Figure
from wsi_idc.bench.measure import Bench, form_name, measure_kinds
from wsi_idc.bench.subject import Left, Sampled, Scratch, choose_model, left_to_do, made_mpp, sample, slide_at
from wsi_idc.config import InForce
from wsi_idc.console import Console
from wsi_idc.cores import cores
from wsi_idc.doctor import memory, processor
from wsi_idc.errors import UsageError
from wsi_idc.manifest import Row
from wsi_idc.objects import is_url

__all__ = ["Scratch", "near", "run_bench"]


def near(settings: InForce) -> Path | None:
    """The store on whose disk is to be written: where one was named, or is there already; None: anywhere."""
    store = Path(settings.store)
    if is_url(settings.store) or (settings.origins["store"] == "default" and not store.exists()):
        return None
    return store


def run_bench(what: str | None, settings: InForce, seconds: float, scratch: Scratch, console: Console) -> None:
    """Measure, and tell.

    Args:
        what: a slide, or a manifest; None: a slide is made.
        settings: of a run.
        seconds: how long each measurement goes on.
        scratch: where is written.
        console: where it is told.

    Raises:
        UsageError: slide, manifest, model or settings that cannot be used.
        SlideError: the slide cannot be read.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    model, free = choose_model(settings), memory()[0]
    with console.doing() as tell:
        left: Left | None = None
        if what is None:
            from wsi_idc.demo import make_slide

            tell("painting a slide")
            path = scratch.folder / "painted.tif"
            make_slide(path, made_mpp(model.cut.tile))
            rows: Sequence[Row] = [Row("painted", path, "painted")]
        elif (row := slide_at(what)) is not None:
            rows = [row]
        else:
            tell("asking what is left to do")
            left = left_to_do(Path(what), settings, model)
            rows = left.rows or left.every
        tell("looking at slides" if len(rows) > 1 else "looking at the slide")
        found, failures = sample(rows, model.cut)
        for slide, reason in failures.items():
            console.trouble(f"left out {slide}: {reason}")
        if not found or not len(found[0].cells):
            problem = "no slide that was looked at has a tile" if len(rows) > 1 else "has no tile that can be measured"
            raise UsageError(what or "the painted slide", problem, "give another slide")
        one, gpus = found[0], settings.infer.gpus
        for check in processor():
            console.line(f"{check.name}: {check.found}")
            console.record("machine", name=check.name, found=check.found)
        told = "painted here: no real slide costs the same, give one of yours" if what is None else one.row.slide_id
        console.line(f"slide: {told}: {one.surveyed.line}")
        console.record("slide", slide=one.row.slide_id, path=str(one.row.path), tiles=len(one.cells))
        bench = Bench(one, model, scratch, seconds=seconds, batch=settings.infer.batch_size, gpus=gpus, free=free)
        figures: list[Figure] = []
        for words, step in bench.steps():
            tell(words)
            for figure in step():
                figures.append(figure)
                console.record("figure", **figure.fields())
        tell("decoding tiles of other slides")
        found = [one, *measure_kinds(found, model.cut, settings.infer.batch_size, seconds)]
    console.table(HEADER, [figure.cells() for figure in figures])
    measured = Measured(
        figures,
        "" if model.form is None else form_name(model.form),
        len(one.cells),
        cores(),
        load,
        free,
        gpus,
        settings.extract_in_run.pixels,
    )
    for line in [*([model.note] if model.note else []), *bench.notes, *advice(measured)]:
        console.line(line)
        console.record("advice", text=line)
    if left is not None and not left.rows:
        console.line(f"Nothing is left to do of {what}.")
    else:
        if left is None:
            estimate = estimate_slide(measured)
        else:
            looked = [_looked(each, measured) for each in found]
            estimate = estimate_manifest(measured, looked, left.sizes, done=left.done)
        console.line(estimate.text)
        console.record("estimate", **estimate.fields())
    console.record("summary", command="bench", figures=len(figures))


def _looked(one: Sampled, measured: Measured) -> Looked:
    """What is known of a slide of a manifest."""
    own, usual = (None if one.decode is None else one.decode.median), measured.median("decode", threads=1)
    more = 0.0 if own is None or usual is None else 1 / own - 1 / usual
    surveyed = one.surveyed
    return Looked(len(one.cells), surveyed.seconds, one.size, more * len(one.cells), surveyed.exact)
