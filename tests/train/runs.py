"""Trainings that are quick, and what came out of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wsi_idc.train import TrainSettings

QUICK = {"network": "idc-2016", "input_px": 16, "batch_size": 16, "epochs": 3, "lr": 0.002, "threads": 1}

SCRIPT = """
import sys
from pathlib import Path
from wsi_idc.train import TrainSettings, run

if __name__ == "__main__":
    store, out, settings = sys.argv[1:]
    run(Path(store), Path(out), TrainSettings.model_validate_json(settings), say=lambda line: print(line, flush=True))
"""


def quiet(line: str) -> None:
    """Takes lines and drops them."""


def output_of(tmp_path: Path, store: Path, out: Path, settings: TrainSettings, seconds: int) -> str:
    """What a training says that is a process of its own; it must end well, and is ended where it takes too long."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(store), str(out), settings.model_dump_json()]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"not done after {seconds} s: {process.communicate()[0]}")
    assert process.returncode == 0, output
    return output


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
