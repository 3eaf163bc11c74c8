"""Progress is drawn on a terminal alone, and tells slides, tiles, tiles a second and the time left."""

import json
import os
import pty
import re
import subprocess
import sys

from wsi_idc.console import Console, SlideListener
from wsi_idc.work.jobs import Outcome


def on_a_terminal(arguments, cwd):
    """What a command prints on a terminal, escape sequences included."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "wsi_idc.cli", *map(str, arguments)],
        cwd=cwd,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "COLUMNS": "110", "TERM": "xterm"},
    )
    os.close(follower)
    output = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(leader)
    return process.wait(), output.decode(errors="replace")


def test_a_terminal_gets_a_bar_and_a_drawn_table(slides):
    code, output = on_a_terminal(["extract", slides], slides.parent)
    assert code == 1
    assert re.search(r"\d/3", output)
    assert "tiles/s" in output
    assert "failed broken: cannot read the region" in output
    assert "┏" in output and "slides done" in output
    assert output.rstrip().endswith("┘")


def test_the_bar_knows_the_rate_and_the_time_left():
    class Bar:
        def add_task(self, verb, **fields):
            self.fields = fields
            return 0

        def update(self, task, **fields):
            self.fields = fields

    bar = Bar()
    listener = SlideListener(Console(), "extract", 2, bar)
    listener.prepared("a", 100)
    listener.advanced("a", 50)
    assert bar.fields["tiles"] == 50
    assert bar.fields["rate"] > 0
    assert bar.fields["left"].endswith(" s left")
    assert bar.fields["completed"] == 0


def test_a_slide_that_does_not_come_after_all_is_no_longer_waited_for(capsys):
    listener = SlideListener(Console(), "infer", 2, None)
    listener.left_out("a")
    listener.ended("b", Outcome("done", 5))
    assert capsys.readouterr().out == "done b: 5 tiles (infer, 1 of 1 slides)\n"


def test_what_a_worker_told_may_come_after_the_slide_has_ended():
    clock = Clock()
    listener = SlideListener(Console(), "infer", 2, None, clock)
    clock.now = 10.0
    listener.ended("a", Outcome("done", 5, seconds=10.0))
    listener.prepared("a", 5)
    listener.advanced("a", 5)
    assert listener.seconds_left == 10.0


class Clock:
    """A clock that stands until it is set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_one_quick_failure_says_nothing_of_the_time_left():
    """Before, it counted as a tenth of the work done in no time: 1,000 s of work were "9 s left"."""
    clock = Clock()
    listener = SlideListener(Console(), "extract", 10, None, clock)
    clock.now = 1.0
    listener.ended("a", Outcome("failed", reason="broken", seconds=0.1))
    assert listener.seconds_left is None
    clock.now = 101.0
    listener.ended("b", Outcome("done", 10, seconds=100.0))
    assert 800 <= listener.seconds_left <= 820
    clock.now = 102.0
    listener.ended("c", Outcome("failed", reason="broken", seconds=0.1))
    assert 700 <= listener.seconds_left <= 720


def test_a_slide_that_failed_after_long_counts_as_one():
    clock = Clock()
    listener = SlideListener(Console(), "extract", 4, None, clock)
    clock.now = 100.0
    listener.ended("a", Outcome("done", 10, seconds=100.0))
    clock.now = 200.0
    listener.ended("b", Outcome("failed", reason="broken", seconds=100.0))
    assert listener.seconds_left == 200.0


def test_off_a_terminal_it_is_said_every_so_often_how_far_it_is(capsys):
    clock = Clock()
    listener = SlideListener(Console(), "infer", 100, None, clock)
    listener.prepared("a", 100)
    for clock.now in (10.0, 59.0, 60.0, 61.0, 119.0):
        listener.advanced("a", 10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert re.match(
        r"infer: 0 of 100 slides, 30 tiles, 0 tiles/s; 5 h 32 min left, until (\w{3} )?\d\d:\d\d$", lines[0]
    )
    for clock.now in range(7200, 14400, 10):
        listener.advanced("a", 0)
    assert 5 <= len(capsys.readouterr().out.splitlines()) <= 20


def test_programs_are_told_how_far_it_is_too(capsys):
    clock = Clock()
    listener = SlideListener(Console(json_lines=True), "infer", 2, None, clock)
    clock.now = 60.0
    listener.ended("a", Outcome("done", 600, seconds=1.23456))
    done, progress = map(json.loads, capsys.readouterr().out.splitlines())
    assert (done["command"], done["seconds"], done["event"]) == ("infer", 1.235, "done")
    assert progress == {
        "event": "progress", "command": "infer", "slides": 2, "ended": 1, "failed": 0, "tiles": 0,
        "tiles_per_second": 0.0, "seconds_left": 60,
    }  # fmt: skip


def test_a_log_has_all_that_is_told_with_times_and_does_not_grow_for_ever(tmp_path, capsys):
    console = Console(json_lines=True, verbosity=-1)
    console.log_to(tmp_path / "run.log")
    console.line("a \x1b[31m line")
    console.line("only for those who ask", level=1)
    console.trouble("two\nlines")
    console.table(["slide"], [["a"]])
    lines = (tmp_path / "run.log").read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} "
    expected = [r"INFO    a \\x1b\[31m line", "WARNING two", "WARNING lines", "INFO    slide", "INFO    a"]
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert re.fullmatch(stamp + words, line), line
    console._log.maxBytes = 1000
    for _ in range(200):
        console.line("x" * 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.log", *(f"run.log.{n}" for n in range(1, 6))]
    assert capsys.readouterr().out == ""


def test_a_log_that_cannot_be_written_is_told_once_and_the_work_goes_on(tmp_path, capsys):
    console = Console()
    console.log_to(tmp_path / "run.log")
    console._log.stream.close()
    console._log.stream = (tmp_path / "run.log").open()
    console.line("one")
    console.line("two")
    told = capsys.readouterr()
    assert told.out == "one\ntwo\n"
    assert told.err.count("cannot be written") == 1 and "Traceback" not in told.err


def test_plain_lines_count_the_slides(capsys):
    listener = SlideListener(Console(), "extract", 2, None)
    listener.ended("a", Outcome("done", 1234, warnings=("odd",)))
    listener.ended("b", Outcome("failed", reason="broken"))
    output = capsys.readouterr()
    assert output.out == "done a: 1,234 tiles (extract, 1 of 2 slides)\n"
    assert output.err == "warning a: odd\nfailed b: broken\n"


def test_a_table_off_a_terminal_is_columns_of_text(capsys):
    Console().table(["slide", "tiles"], [["a", "12"], ["longer", "3"]])
    assert capsys.readouterr().out == "slide   tiles\na       12\nlonger  3\n"


def test_what_files_say_cannot_move_the_cursor_or_hide(capsys):
    """Before, escape sequences of paths, headers and tags reached the terminal raw."""
    nasty = "a\x1b[31m\x07\u202eb\x9bc\r\td"
    console = Console()
    console.line(nasty)
    console.trouble(nasty)
    console.table(["slide"], [[nasty]])
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err and "\r" not in output.out + output.err
    assert output.out.splitlines()[0] == r"a\x1b[31m\x07\u202eb\x9bc\r\td"


def test_text_in_any_language_is_left_as_it_is(capsys):
    Console().line("Größe 组织 [tissue] Ünal")
    assert capsys.readouterr().out == "Größe 组织 [tissue] Ünal\n"
