"""What docs/cron.md gives to cron, systemd and SLURM: read by their own checkers, and run with stand-ins."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOC = Path(__file__).parents[1] / "docs" / "cron.md"
README = DOC.parents[1] / "README.md"
BIN = Path(sys.executable).parent
COMMAND, MAIL = "/opt/wsi-idc/.venv/bin/wsi-idc", "/usr/bin/mail"
STAND_INS = {
    "wsi-idc": f'#!/usr/bin/env bash\nexec {sys.executable} -m wsi_idc.cli "$@"\n',
    "srun": '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "sbatch": '#!/usr/bin/env bash\necho "$@" > "$STAND_IN/sbatch.log"\n',
    "mail": '#!/usr/bin/env bash\n{ printf "%s\\n" "$@"; cat; } > "$STAND_IN/mail.log"\n',
}


def blocks(language, page=DOC):
    """A page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tmp_path, make):
    """A folder with a manifest of one slide, and an environment with stand-ins."""
    make.tissue_slide(tmp_path / "a.tif")
    make.write_bundle(tmp_path / "bundle")
    (tmp_path / "manifest.csv").write_text("path\na.tif\n")
    (tmp_path / "wsi-idc.toml").write_text("model = 'bundle'\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in STAND_INS.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WSI_IDC_")}
    path = f"{tools}:{os.environ['PATH']}"
    return tmp_path, {**kept, "PATH": path, "STAND_IN": str(tools), "SLURM_SUBMIT_DIR": str(tmp_path)}


def placed(text, folder):
    """A text of the page, for this folder and the stand-ins."""
    for there, name in ((COMMAND, "wsi-idc"), (MAIL, "mail")):
        text = text.replace(there, str(folder / "tools" / name))
    return text.replace("/data/slides", str(folder))


def shell(command, environment, **options):
    return subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=240, check=False, **options
    )


def test_the_crontab_line_says_nothing_where_all_is_well_and_keeps_the_exit_code(here):
    folder, environment = here
    (text,) = blocks("cron")
    line = text.splitlines()[-1]
    assert line in README.read_text()
    schedule, command = re.match(r"((?:\S+\s+){5})(.*)", line).groups()
    assert schedule.split() == ["0", "2", "*", "*", "*"]
    done = shell(placed(command, folder), environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "export" / "csv" / "a.csv").is_file()
    (folder / "a.tif").unlink()
    assert shell(placed(command, folder), environment).returncode == 2


def test_the_units_are_ones_that_systemd_takes_and_their_commands_do_the_work(here):
    folder, environment = here
    names = ("wsi-idc.service", "wsi-idc.timer", "wsi-idc-mail.service")
    units = dict(zip(names, (placed(text, folder) for text in blocks("ini")), strict=True))
    for name, text in units.items():
        assert f"`/etc/systemd/system/{name}`" in DOC.read_text()
        (folder / name).write_text(text)
    service, mail = (re.search(r"^ExecStart=(.*)$", units[name], re.MULTILINE)[1] for name in names[::2])
    done = shell(service, environment, cwd=re.search(r"^WorkingDirectory=(.*)$", units[names[0]], re.MULTILINE)[1])
    assert done.returncode == 0, done.stderr
    summary = re.search(r"^StandardInput=file:(.*)$", units[names[2]], re.MULTILINE)[1]
    with Path(summary).open() as stream:
        assert shell(mail, environment, stdin=stream).returncode == 0
    sent = (folder / "tools/mail.log").read_text()
    assert "1 of 1 slides are up to date" in sent and "pathology-it@example.org" in sent
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not here: the units' commands were run, their syntax was not checked")
    found = subprocess.run(
        ["systemd-analyze", "verify", *(folder / name for name in names)], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_the_slurm_script_is_clean_does_the_work_and_submits_the_next_night(here):
    folder, environment = here
    script = folder / "nightly.sh"
    (text,) = blocks("bash")
    script.write_text(text)
    found = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    script.write_text(placed(text, folder).replace("--workers 4", "--workers 0"))
    done = shell(f"bash {script}", {**environment, "SLURM_CPUS_PER_TASK": "2"}, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "exit code 0" in (folder / "summary.txt").read_text()
    assert (folder / "tools/sbatch.log").read_text() == "--begin=02:00 --dependency=singleton nightly.sh\n"
