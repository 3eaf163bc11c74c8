"""Every command that README and docs show is one that exists, and those of a first day are run as they stand there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from wsi_idc.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh|)\n(.*?)^```", re.S | re.M)
INLINE = re.compile(r"(?<!`)`(wsi-idc [^`\n]+)`(?!`)")

FIRST_DAY = ("README.md", "index.md", "manifest.md", "evaluation.md")
"""Pages whose commands are run here, in their order; those of others by the tests of what they are about."""
NOT_RUN = {
    "wsi-idc view": "serves until Ctrl-C: test_view.py",
    "wsi-idc demo demo": "test_demo.py",
}
OTHER_WORDS = {
    "/data/slides": "slides",
    "-o manifest.csv": "-o made.csv",
    "/scratch/stage --stage-gb 100": "stage --stage-gb 1",
    "--model my-model --model another-model": "--model my-model",
}
"""What stands on no machine but the reader's."""
QUICK = "--network idc-2016 --input 16 --batch-size 16 --epochs 1 --threads 1"
"""Added to a training, which would take hours."""


def commands(page: Path) -> list[str]:
    """The commands in a page's blocks, each on one line, without comments."""
    found = []
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            start = re.search(r"(?:^|[;&|] ?|/)(wsi-idc .*)", line)
            if start and not line.startswith("#"):
                found += [part.strip() for part in re.split(r" #|;|&&|\|\|", start[1])[:1]]
    return [" ".join(command.split()) for command in found]


def parsed(command: str) -> None:
    """Have the command line read a command, and do nothing; raises what is wrong with it."""
    words = [word for word in shlex.split(command)[1:] if word not in ("...", "…")]
    found = typer.main.get_command(app)
    context = None
    while hasattr(found, "commands"):
        if not words or words[0].startswith("-"):
            return
        name = words.pop(0)
        assert name in found.commands, f"{command}: no command {name}"
        found = found.commands[name]
    context = found.make_context(found.name, words)
    context.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_exists(page):
    text = page.read_text(encoding="utf-8")
    for command in [*commands(page), *INLINE.findall(text)]:
        # A synopsis names what may be left out in brackets, and alternatives by a bar.
        plain = re.sub(r"\[[^\]]*\]|\|\S+", "", command)
        words = shlex.split(plain)
        numbers = {"N": "2", "SECONDS": "60", "PX": "50", "$SLURM_NTASKS": "2"}
        try:
            parsed(" ".join(shlex.quote(numbers.get(word, word)) for word in words))
        except typer.Exit:
            continue
        except Exception as error:
            if "Missing" in str(error):  # `wsi-idc extract` in running text names the command, not a way to call it.
                continue
            raise AssertionError(f"{command}: {error}") from error


@pytest.fixture
def world(tmp_path, make, monkeypatch):
    """A folder as a reader has it: slides of six patients with annotations, and their manifest."""
    (tmp_path / "slides").mkdir()
    rows = []
    for number, split in enumerate(["train", "train", "train", "val", "test", "test"]):
        name = f"s{number}"
        make.tissue_slide(tmp_path / "slides" / f"{name}.tif", seed=number)
        square = [[100, 100], [250, 100], [250, 300], [100, 300], [100, 100]]
        feature = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [square]},
            "properties": {"objectType": "annotation", "classification": {"name": "IDC", "color": [200, 0, 0]}},
        }
        annotation = tmp_path / "slides" / f"{name}.geojson"
        annotation.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        rows.append(f"slides/{name}.tif,p{number},slides/{name}.geojson,{split}\n")
    (tmp_path / "manifest.csv").write_text("path,patient_id,annotation,split\n" + "".join(rows))
    monkeypatch.chdir(tmp_path)
    for name in ("WSI_IDC_STORE", "WSI_IDC_MODEL", "WSI_IDC_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("name", FIRST_DAY)
def test_a_first_days_commands_do_what_the_page_says(name, world):
    page = next(page for page in PAGES if page.name == name)
    ran = []
    for command in commands(page):
        if command in NOT_RUN or command.startswith("docker"):
            continue
        for words, ours in OTHER_WORDS.items():
            command = command.replace(words, ours)
        if name == "evaluation.md" and "my-model" in command:
            continue  # README.md trains it, and judges it.
        if command.startswith("wsi-idc train"):
            command = f"{command} {QUICK}"
        if command.startswith("wsi-idc manifest"):
            (world / "made.csv").unlink(missing_ok=True)
        done = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{command}: {done.output}"
        ran.append(command)
    assert ran


def test_the_site_is_built_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # An advertisement.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "Research use only" in page and not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", page)


def test_the_image_is_linted():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not here: make setup")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
