"""What people see: progress on a terminal, plain lines under cron, one JSON object a line for programs."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_idc.errors import FaultsError, UsageError, WsiIdcError, system_reason

if TYPE_CHECKING:
    from rich.progress import Progress

    from wsi_idc.plan import Plan
    from wsi_idc.work.jobs import Listener, Outcome, Summary


def printable(text: str) -> str:
    """A text whose control characters, and those that turn or hide others, are shown as escapes.

    Paths, headers and tags of files are other people's: raw, they could move the cursor or recolour a terminal.
    """
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text
    )


class Console:
    """Where a command's lines go: results to stdout, progress and trouble to stderr.

    Args:
        json_lines: one JSON object a line instead of text and tables.
        verbosity: -1 quiet (only what failed), 0, or 1 (also what was skipped, and why).
    """

    def __init__(self, *, json_lines: bool = False, verbosity: int = 0) -> None:
        self.json_lines, self.verbosity = json_lines, verbosity
        self._log: _LogFile | None = None
        self._bar: Progress | None = None
        self._telling = 0

    def log_to(self, path: Path) -> None:
        """Also keep what is told, whatever of it is shown, in a file with the time of each line.

        From 10 MB on it is renamed to `<name>.1`, and so on to `.5`.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            self._log = _LogFile(path)
        except OSError as error:
            raise UsageError(path, f"cannot be written ({system_reason(error)})", "choose another log file") from error

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Lines for the log file alone."""
        if self._log is not None:
            for line in printable(text).splitlines():
                self._log.handle(logging.LogRecord("wsi-idc", level, "", 0, line, (), None))

    @property
    def draws(self) -> bool:
        """Whether progress is drawn: on a terminal, unless quiet or in JSON."""
        return sys.stderr.isatty() and not self.json_lines and self.verbosity >= 0

    def line(self, text: str, *, level: int = 0) -> None:
        """A line of result, unless quieter than its level."""
        if level <= max(0, self.verbosity):
            self.log(text)
        if not self.json_lines and self.verbosity >= level:
            print(printable(text), flush=True)

    def trouble(self, text: str) -> None:
        """A line about something wrong; never silenced."""
        self.log(text, logging.WARNING)
        print(printable(text), file=sys.stderr, flush=True)

    def record(self, kind: str, **fields: Any) -> None:
        """A JSON line, where JSON was asked for."""
        if self.json_lines:
            print(json.dumps({"event": kind, **fields}, default=str), flush=True)

    def error(self, error: WsiIdcError) -> None:
        """An error that ends the command."""
        if self.json_lines:
            faults = {"faults": error.faults} if isinstance(error, FaultsError) else {}
            self.record("error", subject=error.subject, reason=error.reason, exit_code=error.exit_code, **faults)
        self.log(str(error), logging.ERROR)
        print(printable(f"wsi-idc: {error}"), file=sys.stderr, flush=True)

    def plans(self, plans: "Mapping[str, Plan]") -> None:
        """What would be done (`--dry-run`)."""
        for name, plan in plans.items():
            self.record("plan", slide=name, action=plan.action, reason=plan.reason)
            self.line(f"{plan.action:5} {name}: {plan.reason}")

    @contextmanager
    def progress(self, verb: str) -> "Iterator[ProgressFactory]":
        """Progress of the slides that a command runs."""
        self._telling += 1
        try:
            yield ProgressFactory(self, verb)
        finally:
            self._telling -= 1
            if self._bar is not None and not self._telling:
                self._bar.stop()
                self._bar = None

    @contextmanager
    def doing(self) -> Iterator[Callable[[str], None]]:
        """What takes a call for each thing that is begun, and draws it until the next one, or the end."""
        if not self.draws:
            yield lambda words: None
            return
        from rich.console import Console as RichConsole

        with RichConsole(stderr=True).status("") as status:
            yield lambda words: status.update(printable(words).replace("[", "\\["))

    def bar(self) -> "Progress":
        """What is drawn, one for all that is under way: a terminal has room for one."""
        if self._bar is None:
            self._bar = _make_bar()
            self._bar.start()
        return self._bar

    def summary(self, command: str, summary: "Summary") -> None:
        """The closing table."""
        self.notes(command, summary)
        if not summary.outcomes:
            count = len(summary.plans)
            if not self.json_lines:
                self.line(f"{command}: nothing to do, {count} slide{'s are' if count != 1 else ' is'} up to date")
            return
        cells = [f"{value:,}" for value in counts(summary).values()]
        self.table(["slides done", "skipped", "failed", "tiles", "seconds"], [cells])

    def notes(self, command: str, summary: "Summary") -> None:
        """What is told of a command at its end, besides the table."""
        self.record("summary", command=command, **counts(summary))
        for note in summary.notes:
            self.record("note", text=note)
            self.line(f"note: {note}")
        for name, plan in summary.plans.items():
            if plan.action == "skip":
                self.record("skipped", slide=name, reason=plan.reason)
                self.line(f"skipped {name}: {plan.reason}", level=1)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """A table on stdout: drawn on a terminal, columns of text otherwise."""
        header, rows = [printable(name) for name in header], [[printable(str(cell)) for cell in row] for row in rows]
        lines = columns(header, rows)
        self.log("\n".join(lines))
        if self.json_lines or self.verbosity < 0:
            return
        if not sys.stdout.isatty():
            print("\n".join(lines), flush=True)
            return
        from rich.console import Console as RichConsole
        from rich.table import Table

        table = Table(title=title)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        RichConsole().print(table)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of text."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def counts(summary: "Summary") -> dict[str, Any]:
    """A summary in numbers: slides done, skipped and failed, tiles, seconds."""
    return {
        "done": summary.done,
        "skipped": summary.skipped,
        "failed": len(summary.failures),
        "tiles": summary.tiles,
        "seconds": round(summary.seconds, 1),
    }


class _LogFile(RotatingFileHandler):
    """The log file: lines with the time and how grave they are; one that cannot be written is told once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=10_000_000, backupCount=5, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        self._broken = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say once that the log has a hole, and go on: the work is worth more."""
        if not self._broken:
            reason = sys.exc_info()[1]
            print(f"warning: the log {self.baseFilename} cannot be written ({reason})", file=sys.stderr, flush=True)
        self._broken = True


class ProgressFactory:
    """Makes the listener once the number of slides is known."""

    def __init__(self, console: Console, verb: str) -> None:
        self._console, self._verb = console, verb

    def __call__(self, slides: Sequence[str]) -> "Listener":
        """The listener for the slides that will be run."""
        bar = self._console.bar() if slides and self._console.draws else None
        return SlideListener(self._console, self._verb, len(slides), bar)


def _make_bar() -> "Progress":
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("slides"),
        TextColumn("{task.fields[tiles]:,} tiles, {task.fields[rate]:,.0f} tiles/s"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=RichConsole(stderr=True),
        transient=True,
    )


class SlideListener:
    """Tells how slides go on; see `jobs.Listener`. Called from Dask's thread and the main one.

    Args:
        console: where it is told.
        verb: the command.
        slides: how many will be run.
        bar: what is drawn; None: off a terminal, a line every so often.
        clock: seconds.
    """

    def __init__(
        self,
        console: Console,
        verb: str,
        slides: int,
        bar: "Progress | None",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._verb, self._slides, self._bar, self._clock = console, verb, slides, bar, clock
        self._start = self._told = clock()
        self._tiles = self._failed = 0
        self._known: dict[str, int] = {}
        self._partial: dict[str, int] = {}
        self._over: set[str] = set()
        self._done_s: list[float] = []
        self._failed_s: list[float] = []
        self._task = None if bar is None else bar.add_task(verb, total=slides, tiles=0, rate=0.0, left="")

    @property
    def _ended(self) -> int:
        return len(self._done_s) + len(self._failed_s)

    def prepared(self, job_id: str, tiles: int) -> None:
        """See `Listener.prepared`."""
        if job_id not in self._over:
            self._known[job_id] = tiles

    def advanced(self, job_id: str, tiles: int) -> None:
        """See `Listener.advanced`."""
        self._tiles += tiles
        if job_id not in self._over:
            self._partial[job_id] = self._partial.get(job_id, 0) + tiles
        self._tell()

    def left_out(self, job_id: str) -> None:
        """See `Listener.left_out`."""
        self._slides -= 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self._slides)

    def ended(self, job_id: str, outcome: "Outcome") -> None:
        """See `Listener.ended`."""
        (self._done_s if outcome.status == "done" else self._failed_s).append(outcome.seconds or 0.0)
        # What its worker told comes by another way, and may come later.
        self._over.add(job_id)
        self._known.pop(job_id, None)
        self._partial.pop(job_id, None)
        self._console.record(
            outcome.status,
            command=self._verb,
            slide=job_id,
            tiles=outcome.tiles,
            reason=outcome.reason,
            warnings=list(outcome.warnings),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=None if outcome.seconds is None else round(outcome.seconds, 3),
        )
        for warning in outcome.warnings:
            self._trouble(f"warning {job_id}: {warning}")
        if outcome.status == "failed":
            self._trouble(f"failed {job_id}: {outcome.reason}")
            if os.environ.get("WSI_IDC_DEBUG"):
                self._trouble(outcome.detail)
        else:
            line = f"done {job_id}: {outcome.tiles:,} tiles ({self._verb}, {self._ended} of {self._slides} slides)"
            (self._console.line if self._bar is None else self._console.log)(line)
        self._tell()

    def _trouble(self, line: str) -> None:
        """A line above the bar, or plain."""
        if self._bar is None:
            self._console.trouble(line)
        else:
            self._console.log(line, logging.WARNING)
            self._bar.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    @property
    def seconds_left(self) -> float | None:
        """How long it will go on, by what slides took so far; None: nothing is known of that yet.

        One that failed counts as much of a slide as it took of a slide's time: one that fails at once says nothing of
        the others.
        """
        mean = sum(self._done_s) / len(self._done_s) if self._done_s else 0.0
        worked = len(self._done_s) + sum(min(1.0, seconds / mean) for seconds in self._failed_s if mean)
        begun = sum(min(1.0, self._partial.get(name, 0) / tiles) for name, tiles in self._known.items() if tiles)
        if not worked + begun:
            return None
        return (self._clock() - self._start) * (self._slides - self._ended - begun) / (worked + begun)

    def _tell(self) -> None:
        """Draw how far it is, or say so where it was not said for long."""
        now, left = self._clock(), self.seconds_left
        seconds = now - self._start
        rate = self._tiles / seconds if seconds else 0.0
        if self._bar is not None and self._task is not None:
            words = "" if left is None else f"{duration(left)} left"
            self._bar.update(self._task, completed=self._ended, tiles=self._tiles, rate=rate, left=words)
        if self._ended == self._slides or now - self._told < max(_EVERY_S, seconds / 20):
            return
        self._told = now
        self._console.record(
            "progress",
            command=self._verb,
            slides=self._slides,
            ended=self._ended,
            failed=len(self._failed_s),
            tiles=self._tiles,
            tiles_per_second=round(rate, 1),
            seconds_left=None if left is None else round(left),
        )
        end = "" if left is None else f"; {duration(left)} left, until {_clock_time(left)}"
        line = (
            f"{self._verb}: {self._ended:,} of {self._slides:,} slides, {self._tiles:,} tiles, {rate:,.0f} tiles/s{end}"
        )
        (self._console.line if self._bar is None else self._console.log)(line)


_EVERY_S = 60
"""Between two lines on how far it is; later on, a twentieth of the time that has passed."""


def duration(seconds: float) -> str:
    """A length of time as a person says it."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def _clock_time(seconds: float) -> str:
    """The time of day in so many seconds; with the day, where that is another one."""
    now = datetime.now()
    then = now + timedelta(seconds=seconds)
    return then.strftime("%H:%M" if then.date() == now.date() else "%a %H:%M")
