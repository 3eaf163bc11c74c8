"""What people see: progress on a terminal, plain lines under cron, one JSON object a line for programs."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wsi_idc.errors import FaultsError, WsiIdcError

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

    @property
    def draws(self) -> bool:
        """Whether progress is drawn: on a terminal, unless quiet or in JSON."""
        return sys.stderr.isatty() and not self.json_lines and self.verbosity >= 0

    def line(self, text: str, *, level: int = 0) -> None:
        """A line of result, unless quieter than its level."""
        if not self.json_lines and self.verbosity >= level:
            print(printable(text), flush=True)

    def trouble(self, text: str) -> None:
        """A line about something wrong; never silenced."""
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
        self.trouble(f"wsi-idc: {error}")

    def plans(self, plans: "Mapping[str, Plan]") -> None:
        """What would be done (`--dry-run`)."""
        for name, plan in plans.items():
            self.record("plan", slide=name, action=plan.action, reason=plan.reason)
            self.line(f"{plan.action:5} {name}: {plan.reason}")

    @contextmanager
    def progress(self, verb: str) -> "Iterator[ProgressFactory]":
        """Progress of the slides that a command runs."""
        factory = ProgressFactory(self, verb)
        try:
            yield factory
        finally:
            factory.close()

    def summary(self, command: str, summary: "Summary") -> None:
        """The closing table."""
        fields = {
            "done": summary.done,
            "skipped": summary.skipped,
            "failed": len(summary.failures),
            "tiles": summary.tiles,
            "seconds": round(summary.seconds, 1),
        }
        self.record("summary", command=command, **fields)
        for note in summary.notes:
            self.record("note", text=note)
            self.line(f"note: {note}")
        for name, plan in summary.plans.items():
            if plan.action == "skip":
                self.record("skipped", slide=name, reason=plan.reason)
                self.line(f"skipped {name}: {plan.reason}", level=1)
        if self.json_lines or self.verbosity < 0:
            return
        if not summary.outcomes and not summary.failures:
            count = len(summary.plans)
            self.line(f"{command}: nothing to do, {count} slide{'s are' if count != 1 else ' is'} up to date")
            return
        self.table(["slides done", "skipped", "failed", "tiles", "seconds"], [[f"{v:,}" for v in fields.values()]])

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """A table on stdout: drawn on a terminal, columns of text otherwise."""
        if self.json_lines or self.verbosity < 0:
            return
        header, rows = [printable(name) for name in header], [[printable(str(cell)) for cell in row] for row in rows]
        if not sys.stdout.isatty():
            widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
            for row in [header, *rows]:
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            return
        from rich.console import Console as RichConsole
        from rich.table import Table

        table = Table(title=title)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        RichConsole().print(table)


class ProgressFactory:
    """Makes the listener once the number of slides is known."""

    def __init__(self, console: Console, verb: str) -> None:
        self._console, self._verb = console, verb
        self._bar: Progress | None = None

    def __call__(self, slides: Sequence[str]) -> "Listener":
        """The listener for the slides that will be run."""
        if slides and self._console.draws:
            self._bar = _make_bar()
            self._bar.start()
        return SlideListener(self._console, self._verb, len(slides), self._bar)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


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
    """Tells how slides go on; see `jobs.Listener`. Called from Dask's thread and the main one."""

    def __init__(self, console: Console, verb: str, slides: int, bar: "Progress | None") -> None:
        self._console, self._slides, self._bar = console, slides, bar
        self._start = time.monotonic()
        self._tiles = self._ended = 0
        self._known: dict[str, int] = {}
        self._partial: dict[str, int] = {}
        self._task = None if bar is None else bar.add_task(verb, total=slides, tiles=0, rate=0.0, left="")

    def prepared(self, job_id: str, tiles: int) -> None:
        """See `Listener.prepared`."""
        self._known[job_id] = tiles

    def advanced(self, job_id: str, tiles: int) -> None:
        """See `Listener.advanced`."""
        self._tiles += tiles
        self._partial[job_id] = self._partial.get(job_id, 0) + tiles
        self._draw()

    def ended(self, job_id: str, outcome: "Outcome") -> None:
        """See `Listener.ended`."""
        self._ended += 1
        self._known.pop(job_id, None)
        self._partial.pop(job_id, None)
        self._draw()
        self._console.record(
            outcome.status, slide=job_id, tiles=outcome.tiles, reason=outcome.reason, warnings=list(outcome.warnings)
        )
        for warning in outcome.warnings:
            self._trouble(f"warning {job_id}: {warning}")
        if outcome.status == "failed":
            self._trouble(f"failed {job_id}: {outcome.reason}")
            if os.environ.get("WSI_IDC_DEBUG"):
                self._trouble(outcome.detail)
        elif self._bar is None:
            self._console.line(f"done {job_id}: {outcome.tiles:,} tiles ({self._ended} of {self._slides} slides)")

    def _trouble(self, line: str) -> None:
        """A line above the bar, or plain."""
        if self._bar is None:
            self._console.trouble(line)
        else:
            self._bar.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        if self._bar is None or self._task is None:
            return
        seconds = time.monotonic() - self._start
        begun = sum(min(1.0, self._partial.get(name, 0) / tiles) for name, tiles in self._known.items() if tiles)
        share = (self._ended + begun) / self._slides
        left = f"{seconds * (1 / share - 1):,.0f} s left" if share > 0 else ""
        rate = self._tiles / seconds if seconds else 0.0
        self._bar.update(self._task, completed=self._ended, tiles=self._tiles, rate=rate, left=left)
