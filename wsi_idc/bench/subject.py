"""What is measured: which slide, cut how, by which model; of a manifest, some slides that stand for the others."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_idc.bench.figures import Figure
from wsi_idc.config import InForce
from wsi_idc.errors import ModelError, SlideError, UsageError, WsiIdcError
from wsi_idc.files import standing
from wsi_idc.grid import Grid
from wsi_idc.manifest import Row, read_manifest
from wsi_idc.model.bundle import SHIPPED, Form, LoadedBundle, read_bundle
from wsi_idc.objects import is_url
from wsi_idc.settings import CutSettings, TileSpec, build
from wsi_idc.survey import Surveyed, import_all, look_at
from wsi_idc.units import Level0Px, Mpp

SAMPLE = 5
"""Slides of a manifest that are looked at."""


class Scratch:
    """What is made to measure with and must not stay: a folder, and a process that works in it.

    Attributes:
        folder: the folder, which is there from the beginning.

    Args:
        near: whose disk is meant; None: the system's folder for temporary files.

    Raises:
        UsageError: none can be made there.
    """

    def __init__(self, near: Path | None = None) -> None:
        place = None if near is None else standing(near.absolute().parent)
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=".wsi-idc-bench-", dir=place))
        except OSError as error:
            problem = f"cannot be written ({error.strerror or error})"
            raise UsageError(place or tempfile.gettempdir(), problem, "name another --store") from error
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str) -> None:
        """Run a command of ours in the folder, to its end, with none of the user's settings.

        Raises:
            WsiIdcError: it failed.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WSI_IDC_")}
        command = [sys.executable, "-m", "wsi_idc.cli", *arguments]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, cwd=self.folder, stdin=none, stdout=none, stderr=pipe, env=kept)
        _, told = self._process.communicate()
        if self._process.returncode:
            line = (told.decode(errors="replace").strip().splitlines() or ["it says nothing"])[-1]
            raise WsiIdcError(f"wsi-idc {arguments[0]}", f"failed while it was measured: {line}")

    def clear(self) -> None:
        """End the process and remove the folder."""
        if self._process is not None:
            with suppress(OSError):
                self._process.kill()
        for _ in range(20):
            shutil.rmtree(self.folder, ignore_errors=True)
            # What threads of the store have under way when the command is interrupted may make it anew.
            time.sleep(0.01)
            if not self.folder.exists():
                return


@dataclass(frozen=True)
class Model:
    """How tiles are cut, and the model that is measured.

    Attributes:
        cut: how.
        bundle: the model; None: the one that ships, which is for other tiles.
        form: in which a run takes it.
        forms: all that can run here, that one first.
        note: why there is none; "" where there is one.
    """

    cut: CutSettings
    bundle: LoadedBundle | None = None
    form: Form | None = None
    forms: Sequence[Form] = ()
    note: str = ""


def choose_model(settings: InForce) -> Model:
    """The model and the tiles that are meant: tiles are the model's, unless others were asked for.

    Raises:
        ModelError: the model that was named cannot be used, or is for other tiles than were asked for.
        UsageError: there are fewer GPUs than asked for.
    """
    cut, bundle = settings.extract_in_run.cut(), read_bundle(settings.model or SHIPPED)
    fields = bundle.fields
    if all(settings.origins[f"extract.{name}"] == "default" for name in ("tile_size", "mpp")):
        asked = settings.origins["extract.stride"] != "default"
        stride = cut.tile.stride_px if asked else None
        tile = build(TileSpec, size_px=fields.tile.size_px, mpp=fields.tile.mpp, stride_px=stride, last=cut.tile.last)
        cut = cut.model_copy(update={"tile": tile})
    try:
        bundle.check_fits(cut.tile)
    except ModelError:
        if settings.model is not None:
            raise
        own = f"{fields.tile.size_px} px at {fields.tile.mpp:g} um/px"
        note = f"No model was measured: {fields.name} is for {own}; name one for {cut.tile} with --model."
        return Model(cut, note=note)
    gpus = settings.infer.gpus
    if gpus:
        from wsi_idc.work.places import visible_gpus

        visible_gpus(gpus)
    form = bundle.form(settings.infer.precision, cuda=gpus > 0)
    others = [other for other in bundle.forms() if other != form and (gpus or other.device == "cpu")]
    return Model(cut, bundle, form, [form, *others])


@dataclass(frozen=True)
class Sampled:
    """A slide that was looked at.

    Attributes:
        row: its line of the manifest.
        surveyed: what it is, and how long it took to open it and to find its tissue.
        cells: of its tiles; int32 (n, 2) of row, column.
        size: bytes of its file; None of a folder.
        decode: decoding its tiles by one thread, where it is of another kind than the slide that is measured.
    """

    row: Row
    surveyed: Surveyed
    cells: NDArray[np.int32] = field(repr=False)
    size: int | None = None
    decode: Figure | None = None


@dataclass(frozen=True)
class Left:
    """What is left to do of a manifest.

    Attributes:
        rows: the slides that are to be cut, or to be scored.
        sizes: bytes of each one's file; None of what is no plain file here.
        done: how many of the manifest are up to date.
        every: all slides of the manifest that are there.
    """

    rows: Sequence[Row]
    sizes: Sequence[int | None]
    done: int
    every: Sequence[Row]


def left_to_do(manifest: Path, settings: InForce, model: Model) -> Left:
    """The slides of a manifest that a run would do something with, by the store that there is.

    Raises:
        ManifestError: the manifest has faults.
        StoreError: the store cannot be read.
    """
    from wsi_idc.extract import plan_slides
    from wsi_idc.infer import Planner
    from wsi_idc.store import find_store

    rows = [row for row in read_manifest(manifest, strict=settings.strict) if not row.missing]
    store = find_store(settings.store)
    done = set[str]()
    if store is not None:
        planned = plan_slides(rows, store, model.cut, force=False, keep_pixels=True)
        done = {slide.row.slide_id for slide in planned if slide.plan.action == "skip"}
        if model.bundle is not None and model.form is not None:
            planner = Planner(store, model.bundle, model.form, force=False)
            done -= set(planner.decide_all(sorted(done)))
    left = [row for row in rows if row.slide_id not in done]
    return Left(left, [_size(row) for row in left], len(done), rows)


def _size(row: Row) -> int | None:
    """Bytes of a slide's file; None where it is none."""
    if not isinstance(row.path, Path) or not row.path.is_file():
        return None
    return row.path.stat().st_size


def spread(sizes: Sequence[int | None], count: int) -> list[int]:
    """Places of some slides that stand for all: of as many equal parts, from small to large, the one in the middle."""
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place] or 0, place))
    count = min(count, len(order))
    return [order[(2 * number + 1) * len(order) // (2 * count)] for number in range(count)]


def sample(rows: Sequence[Row], cut: CutSettings) -> tuple[list[Sampled], dict[str, str]]:
    """Look at some slides.

    Returns:
        those that can be cut, first the one whose tiles are the median number; slide id -> why the others cannot.

    Raises:
        SlideError: there is one alone, and it cannot.
    """
    import_all()
    found, failures = list[Sampled](), dict[str, str]()
    for place in spread([_size(row) for row in rows], SAMPLE):
        row = rows[place]
        try:
            surveyed, cells = look_at(row, cut)
        except SlideError as error:
            if len(rows) == 1:
                raise
            failures[row.slide_id] = error.reason
            continue
        found.append(Sampled(row, surveyed, cells, _size(row)))
    with_tiles = sorted((one for one in found if len(one.cells)), key=lambda one: len(one.cells))
    if with_tiles:
        first = with_tiles[len(with_tiles) // 2]
        found = [first, *(one for one in found if one is not first)]
    return found, failures


def slide_at(what: str) -> Row | None:
    """The slide that a user names; None where a manifest is meant.

    Raises:
        UsageError: nothing is there, it lies in an object store, or it is a folder that is no slide.
    """
    from wsi_idc.slides import detect

    if is_url(what):
        raise UsageError(what, "lies in an object store", "copy it here: what is measured is this machine")
    path = Path(what).absolute()
    if not path.exists():
        raise UsageError(what, "no such slide or manifest", "check the path")
    if detect(path) is None and path.is_file():
        return None
    if detect(path) is None:
        raise UsageError(what, "is a folder, and no slide", f"make a manifest of it: wsi-idc manifest {what}")
    return Row(path.stem, path, path.stem)


def grid_of(one: Sampled, cut: CutSettings) -> Grid:
    """The grid of a slide that was looked at."""
    (width, height), (x, y) = one.surveyed.size, one.surveyed.mpp
    return Grid(cut.tile, (Level0Px(width), Level0Px(height)), (Mpp(x), Mpp(y)))


def made_mpp(tile: TileSpec) -> Mpp:
    """um/px of a slide that is made to be measured: its tiles are then read at twice the resolution and halved."""
    return Mpp(tile.mpp / 2)
