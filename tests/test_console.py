"""Progress is drawn on a terminal alone, and tells slides, tiles, tiles a second and the time left."""

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


def test_plain_lines_count_the_slides(capsys):
    listener = SlideListener(Console(), "extract", 2, None)
    listener.ended("a", Outcome("done", 1234, warnings=("odd",)))
    listener.ended("b", Outcome("failed", reason="broken"))
    output = capsys.readouterr()
    assert output.out == "done a: 1,234 tiles (1 of 2 slides)\n"
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
