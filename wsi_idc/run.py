"""The night: extract, infer, exports and report of a manifest, each doing what is new or changed.

A stage is what its command is; extract and infer go side by side (`side_by_side.py`), the others follow. Here is only
what comes of doing them together: what is refused before the first of them, what became of each slide in all of them,
and the files that say so to those who were asleep.
"""

import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from wsi_idc import USE, __version__
from wsi_idc.config import InForce
from wsi_idc.console import columns, counts, duration, printable
from wsi_idc.errors import UsageError, WsiIdcError, system_reason
from wsi_idc.files import standing, starts_otherwise
from wsi_idc.plan import Plan
from wsi_idc.settings import ReportSettings
from wsi_idc.work.jobs import Listener, Outcome, Summary

Progress = Callable[[str], AbstractContextManager[Callable[[Sequence[str]], Listener]]]
"""Is given a stage's name, and gives what is told how its slides go on: `Console.progress`."""
_MOST_LINES = 200
"""Of one kind in a summary; it is to be read."""


@dataclass
class Stage:
    """What became of a stage, as far as it came.

    Attributes:
        name: the command.
        summary: what it did with each slide.
        finished: whether it came to its end.
    """

    name: str
    summary: Summary = field(default_factory=lambda: Summary({}, {}, 0.0))
    finished: bool = False

    @property
    def tiles_per_s(self) -> float:
        """Tiles a second."""
        return self.summary.tiles / self.summary.seconds if self.summary.seconds else 0.0


@dataclass
class Night:
    """What became of a run, as far as it came.

    Attributes:
        manifest: of which slides.
        store: the store's address.
        begun, ended: local time.
        model: the model's name, once it was read.
        slides: the manifest's slide ids, once it was read.
        stages: those that were begun.
        trouble: why the run could not go on; "" where it came to its end.
        exit_code: the process's.
    """

    manifest: Path
    store: str
    begun: datetime = field(default_factory=lambda: datetime.now().astimezone())
    ended: datetime | None = None
    model: str = ""
    slides: Sequence[str] = ()
    stages: list[Stage] = field(default_factory=list)
    trouble: str = ""
    exit_code: int = 0

    def end(self, trouble: str = "", exit_code: int = 0) -> None:
        """It is over: by itself, or because of something."""
        self.ended = datetime.now().astimezone()
        self.trouble, self.exit_code = trouble, exit_code or int(bool(self.failures))

    @property
    def seconds(self) -> float:
        """How long it took."""
        return ((self.ended or datetime.now().astimezone()) - self.begun).total_seconds()

    @property
    def failures(self) -> dict[str, tuple[str, str]]:
        """Slide id -> the first stage in which it failed, and why."""
        found: dict[str, tuple[str, str]] = {}
        for stage in self.stages:
            for slide, reason in stage.summary.failures.items():
                found.setdefault(slide, (stage.name, reason))
        return found

    @property
    def empty(self) -> list[str]:
        """The slides cut in this run that have no tissue."""
        outcomes = next((stage.summary.outcomes for stage in self.stages if stage.name == "extract"), {})
        return [slide for slide, outcome in outcomes.items() if outcome.status == "done" and not outcome.tiles]

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """Slide id and line, of all stages."""
        outcomes = [item for stage in self.stages for item in stage.summary.outcomes.items()]
        return [(slide, warning) for slide, outcome in outcomes for warning in outcome.warnings]

    @property
    def headline(self) -> str:
        """What became of it, in a line."""
        count, failed = len(self.slides), len(self.failures)
        if self.trouble and not self.stages:
            return "nothing was done"
        words = f"{count - failed:,} of {count:,} slides are up to date" if not self.trouble else "not finished"
        return f"{words}, {failed:,} failed" if failed else words


class _Kept:
    """A listener that keeps what became of each slide, so that it is known of a stage that was broken off.

    What failed in an earlier stage is not told again: without tiles there is no map, without a map no file.

    Args:
        outcomes: where it is kept.
        known: the slides of which nothing more is told.
        listener: who else is told; None: nobody.
    """

    def __init__(self, outcomes: dict[str, Outcome], known: Mapping[str, object], listener: Listener | None) -> None:
        self._outcomes, self._known, self._listener = outcomes, known, listener

    def prepared(self, job_id: str, tiles: int) -> None:
        """See `Listener.prepared`."""
        if self._listener:
            self._listener.prepared(job_id, tiles)

    def advanced(self, job_id: str, tiles: int) -> None:
        """See `Listener.advanced`."""
        if self._listener:
            self._listener.advanced(job_id, tiles)

    def ended(self, job_id: str, outcome: Outcome) -> None:
        """See `Listener.ended`."""
        self._outcomes[job_id] = outcome
        if self._listener and job_id not in self._known:
            self._listener.ended(job_id, outcome)

    def left_out(self, job_id: str) -> None:
        """See `Listener.left_out`."""
        if self._listener:
            self._listener.left_out(job_id)


def run(night: Night, settings: InForce, *, progress: Progress) -> None:
    """Bring tiles, maps and files of every slide of the manifest up to it.

    Args:
        night: is told what happens, as it happens: the run may be broken off.
        settings: of all stages.
        progress: is told how slides go on.

    Raises:
        UsageError: settings, manifest, model or places that cannot be used: nothing was done.
        WsiIdcError: what the stages raise; later stages are then not begun.
    """
    from wsi_idc.export.export import export
    from wsi_idc.extract import check_stage
    from wsi_idc.manifest import read_manifest
    from wsi_idc.model.bundle import SHIPPED, read_bundle
    from wsi_idc.side_by_side import extract_and_infer
    from wsi_idc.store import open_store
    from wsi_idc.work import places

    rows = read_manifest(night.manifest, strict=settings.strict)
    night.slides = [row.slide_id for row in rows]
    bundle = read_bundle(settings.model or SHIPPED)
    night.model = bundle.fields.name
    cut = settings.extract_in_run
    bundle.check_fits(cut.tile)
    bundle.form(settings.infer.precision, cuda=settings.infer.gpus > 0)
    check_stage(rows, cut)
    places.place(settings.infer)

    @contextmanager
    def stage(name: str) -> Iterator[tuple[Callable[[Summary], None], Callable[[Sequence[str]], Listener]]]:
        """A stage under way: what is told its summary in the end, and what gives who is told of its slides."""
        known, outcomes, start = night.failures, dict[str, Outcome](), time.monotonic()
        one = Stage(name, Summary(dict[str, Plan](), outcomes, 0.0))
        night.stages.append(one)

        def done(summary: Summary) -> None:
            said = {note for stage in night.stages for note in stage.summary.notes}
            notes = tuple(note for note in summary.notes if note not in said)
            one.summary, one.finished = replace(summary, notes=notes), True

        with progress(name) as factory:

            def listener(slides: Sequence[str]) -> Listener:
                return _Kept(outcomes, known, factory([slide for slide in slides if slide not in known]))

            try:
                yield done, listener
            finally:
                if not one.finished:
                    one.summary = Summary({}, outcomes, time.monotonic() - start)

    address, listed = settings.store, frozenset(night.slides)
    with stage("extract") as (cut_done, cut_told), stage("infer") as (score_done, score_told):
        of_cut, of_score = extract_and_infer(
            rows,
            address,
            bundle,
            cut,
            settings.infer,
            strict=settings.strict,
            cut_told=cut_told,
            score_told=score_told,
        )
        cut_done(of_cut)
        score_done(of_score)
    if listed & set(open_store(address).slide_ids()):
        with stage("export") as (done, told):
            done(export(address, str(bundle.folder), settings.export, listed=listed, listener=told))
    with stage("report") as (done, _):
        done(_report(address, bundle.folder, settings.report, listed))


def _report(address: str, model: Path, settings: ReportSettings, listed: Collection[str]) -> Summary:
    """Write the page, unless it is made from the same; a slide that it shows is done, whatever is shown of it."""
    from wsi_idc.report import write

    start, outcomes = time.monotonic(), dict[str, Outcome]()
    written = write(
        address,
        str(model),
        settings.out,
        threshold=settings.threshold,
        listed=listed,
        keep=True,
        listener=lambda slides: _Kept(outcomes, {}, None),
    )
    strange = written.counts.get("suspicious", 0)
    look = f"; {strange:,} slide{'s' if strange != 1 else ''} to look at" if strange else ""
    plans = dict.fromkeys(written.slides, Plan("skip", "already done")) if written.kept else {}
    return Summary(plans, outcomes, time.monotonic() - start, (f"the page is {written.page}{look}",))


def check_outputs(settings: InForce) -> None:
    """Refuse files and folders that could not be written in the end.

    Raises:
        UsageError: one cannot.
    """
    from wsi_idc.report import BEGINNING

    outputs = [
        (settings.run.metrics, b"# HELP wsi_idc_"),
        (settings.run.summary, b"wsi-idc run of "),
        (settings.report.out, BEGINNING),
    ]
    files = [path.absolute() for path in (settings.run.log_file, *(path for path, _ in outputs)) if path is not None]
    if twice := next((path for path in files if files.count(path) > 1), None):
        raise UsageError(twice, "two outputs are to be written there", "name a file for each")
    for path, beginning in outputs:
        _check_file(path, beginning)
    _check_folder(settings.export.out)


def _check_file(path: Path | None, beginning: bytes) -> None:
    """Refuse a file that cannot be written in the end, and one that is something else and would be lost.

    Raises:
        UsageError: it cannot.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(path, "is a folder", "name a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(path, "its folder is not there", "make it, or name another file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(path, "cannot be written", "check the rights of its folder")
    try:
        why = starts_otherwise(path, beginning)
    except OSError as error:
        raise UsageError(path, f"cannot be read ({system_reason(error)})", "name another file") from error
    if why:
        raise UsageError(path, why, "name another file")


def _check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written.

    Raises:
        UsageError: it cannot.
    """
    there = standing(path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "cannot be written" if there.is_dir() else f"{there} is no folder"
        raise UsageError(path, problem, "check its rights, or name another folder")


def stage_rows(night: Night) -> tuple[list[str], list[list[str]]]:
    """The closing table: a row a stage."""
    rows = []
    for stage in night.stages:
        numbers = counts(stage.summary)
        cells = [f"{numbers[name]:,}" for name in ("done", "skipped", "failed", "tiles")]
        name = stage.name if stage.finished else f"{stage.name} (not finished)"
        rows.append([name, *cells, f"{stage.tiles_per_s:,.0f}", duration(stage.summary.seconds)])
    return ["stage", "slides done", "skipped", "failed", "tiles", "tiles/s", "time"], rows


def summary_text(night: Night) -> str:
    """A run as a text to be mailed: its first line says how it went."""
    lines = [f"wsi-idc run of {night.manifest.name} on {socket.gethostname()}: {night.headline}", ""]
    lines.append(f"Begun {night.begun:%Y-%m-%d %H:%M}, took {duration(night.seconds)}, exit code {night.exit_code}.")
    if night.trouble:
        lines += ["The run could not go on:", *(f"  {line}" for line in night.trouble.splitlines())]
    header, rows = stage_rows(night)
    if rows:
        lines += ["", *columns(header, rows)]
    failed = [f"{slide}: {stage}: {reason}" for slide, (stage, reason) in night.failures.items()]
    told = [f"{slide}: {warning}" for slide, warning in night.warnings if slide not in night.empty]
    notes = [f"{stage.name}: {note}" for stage in night.stages for note in stage.summary.notes]
    for title, items in (("Failed", failed), ("Without tissue", night.empty), ("Warnings", told), ("Notes", notes)):
        if items:
            lines += ["", f"{title} ({len(items):,})", *(f"  {item}" for item in items[:_MOST_LINES])]
        if len(items) > _MOST_LINES:
            lines.append(f"  and {len(items) - _MOST_LINES:,} more: see wsi-idc status")
    lines += ["", f"Manifest: {night.manifest.absolute()}", f"Store: {night.store}"]
    lines += [f"Model: {night.model}", ""] if night.model else [""]
    return "\n".join(printable(line) for line in [*lines, f"wsi-idc {__version__}. {USE}"]) + "\n"


def metrics_text(night: Night) -> str:
    """A run in Prometheus's text format, as the node exporter's textfile collector takes it."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()

    def gauge(name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"wsi_idc_{name}", words, labels, registry=registry)

    info = gauge("run_info", "Which run this is of; always 1.", "version", "manifest", "store", "model")
    info.labels(__version__, str(night.manifest.absolute()), night.store, night.model).set(1)
    gauge("run_start_timestamp_seconds", "When the last run began.").set(night.begun.timestamp())
    ended = (night.ended or datetime.now().astimezone()).timestamp()
    gauge("run_end_timestamp_seconds", "When the last run ended, well or not.").set(ended)
    gauge("run_exit_code", "Its exit code: 0 where all slides are up to date.").set(night.exit_code)
    gauge("slides", "Slides of the manifest.").set(len(night.slides))
    gauge("slides_failed", "Slides that failed in one of the stages.").set(len(night.failures))
    gauge("slides_without_tissue", "Slides cut in the last run in which no tissue was found.").set(len(night.empty))
    slides = gauge("stage_slides", "Slides of a stage, by what became of them.", "stage", "outcome")
    numbers = {
        "tiles": gauge("stage_tiles", "Tiles that a stage wrote or scored.", "stage"),
        "seconds": gauge("stage_seconds", "Wall time of a stage.", "stage"),
    }
    rate = gauge("stage_tiles_per_second", "Tiles a second of a stage.", "stage")
    for stage in night.stages:
        found = counts(stage.summary)
        for outcome in ("done", "skipped", "failed"):
            slides.labels(stage.name, outcome).set(found[outcome])
        for name, one in numbers.items():
            one.labels(stage.name).set(found[name])
        rate.labels(stage.name).set(stage.tiles_per_s)
    return generate_latest(registry).decode()


def error_line(error: BaseException) -> tuple[str, int]:
    """What a run's files say of the error that ended it, and its exit code."""
    if isinstance(error, WsiIdcError):
        return str(error), error.exit_code
    return f"{type(error).__name__}: {error}", 1
