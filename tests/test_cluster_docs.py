"""The scripts of docs/cluster.md: linted, and run on loopback with stand-ins for the batch system."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.work.clusters import Cluster
from tests.work.test_cluster import arrays, cohort

DOC = Path(__file__).parents[1] / "docs" / "cluster.md"
BIN = Path(sys.executable).parent
SRUN = """#!/usr/bin/env bash
for task in 1 2; do "$@" & done
wait
"""
SBATCH = """#!/usr/bin/env bash
for script; do :; done
cp "$script" "$STAND_IN/job.$$"
setsid bash "$STAND_IN/job.$$" > "$STAND_IN/job.$$.log" 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/usr/bin/env bash
for job; do kill -- "-$job" 2>/dev/null; done
true
"""


def block(language):
    """The page's one block of a language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", DOC.read_text(), re.DOTALL | re.MULTILINE)
    return text


@pytest.fixture
def here(tmp_path, make):
    """A folder with a manifest of two slides, and an environment with stand-ins for SLURM's commands."""
    cohort(tmp_path, make, 2)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "sbatch": SBATCH, "scancel": SCANCEL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WSI_IDC_")}
    path = f"{tools}:{BIN}:{os.environ['PATH']}"
    return tmp_path, {**kept, "PATH": path, "SLURM_NTASKS": "2", "STAND_IN": str(tools)}


def assert_done(folder):
    found = arrays(folder / "tiles.zarr")
    assert {name.split("/")[2] for name in found if name.startswith("maps/")} == {"s00", "s01"}
    assert not list(folder.glob("dask-*"))


def lint(script):
    subprocess.run(["bash", "-n", script], check=True)
    result = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_the_slurm_script_is_clean_and_does_the_work(here):
    folder, environment = here
    script = folder / "slurm.sh"
    script.write_text(block("bash"))
    lint(script)
    script.write_text(block("bash").replace("interface=eth0", "interface=lo"))
    result = subprocess.run(
        ["bash", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert_done(folder)


@pytest.mark.slow
def test_the_jobqueue_script_is_clean_and_does_the_work(here):
    folder, environment = here
    script = folder / "jobqueue.py"
    script.write_text(block("python").replace('"eth0"', '"lo"').replace("WORKERS = 20", "WORKERS = 2"))
    subprocess.run([BIN / "ruff", "check", "--isolated", script], check=True)
    result = subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert_done(folder)
    job = next(path for path in (folder / "tools").glob("job.*") if not path.name.endswith(".log"))
    assert "#SBATCH --cpus-per-task=8" in job.read_text()
    lint(job)


@pytest.mark.slow
def test_the_kubernetes_manifest_starts_a_cluster_that_does_the_work(here, tmp_path):
    folder, environment = here
    job = yaml.safe_load(block("yaml"))
    assert (job["apiVersion"], job["kind"]) == ("kubernetes.dask.org/v1", "DaskJob")
    cluster = job["spec"]["cluster"]["spec"]

    def container(spec):
        (only,) = spec["spec"]["containers"]
        mounted = {mount["name"] for mount in only.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in spec["spec"].get("volumes", [])}
        return only

    ports = {port["name"] for port in container(cluster["scheduler"])["ports"]}
    assert ports == {port["targetPort"] for port in cluster["scheduler"]["service"]["ports"]}
    assert container(cluster["scheduler"])["args"] == ["dask", "scheduler"]
    assert container(cluster["worker"])["args"][:2] == ["dask", "worker"]
    # The operator starts the same commands, with the names in their environment.
    one = Cluster(tmp_path / "pods")
    try:
        arguments = [
            "worker-1" if argument == "$(DASK_WORKER_NAME)" else argument
            for argument in container(cluster["worker"])["args"][2:]
        ]
        one.add(1, *arguments)
        shell, option, commands = container(job["spec"]["job"])["args"]
        address = f'$({sys.executable} -c \'import json; print(json.load(open("{one.file}"))["address"])\')'
        commands = commands.replace('"$DASK_SCHEDULER_ADDRESS"', f'"{address}"').replace("/data/", f"{folder}/")
        subprocess.run([shell, option, commands], cwd=folder, env=environment, timeout=240, check=True)
    finally:
        one.close()
    assert_done(folder)
