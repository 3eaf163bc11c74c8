"""What a killed export left counts for nothing."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import zarr

from wsi_idc.export import export as module
from wsi_idc.export.export import export
from wsi_idc.settings import ExportSettings


@pytest.fixture
def run(store, tmp_path, recorder):
    def run(*formats, threshold=None, **options):
        settings = ExportSettings(formats=formats, out=tmp_path / "out", threshold=threshold)
        return export(store.address, None, settings, listener=recorder, **options)

    return run


def image(folder):
    return zarr.open_group(folder, mode="r")["0"][:]


def test_killed_while_it_writes_it_leaves_no_file_by_its_name(store, run, tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        import zarr
        from wsi_idc.export.export import export
        from wsi_idc.settings import ExportSettings

        class Listener:
            def ended(self, *_): pass

        def killed(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        zarr.Array.__setitem__ = killed
        export({store.address!r}, None, ExportSettings(formats=("ngff",), out=Path({str(tmp_path / "out")!r})),
               listener=lambda _: Listener())
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ, check=False)
    assert found.returncode == -9
    (left,) = (tmp_path / "out/ngff").iterdir()
    assert left.name == ".part-a.ome.zarr" and (left / "zarr.json").is_file()
    assert run("ngff").done == 2
    assert sorted(path.name for path in (tmp_path / "out/ngff").iterdir()) == ["a.ome.zarr", "b.ome.zarr"]
    assert not np.isnan(image(tmp_path / "out/ngff/a.ome.zarr")).all()


@pytest.mark.parametrize("lost", ["zarr.json", "0/zarr.json", "0/c/0/0"])
def test_a_torn_folder_is_written_again(run, tmp_path, lost):
    run("ngff")
    whole = image(tmp_path / "out/ngff/a.ome.zarr")
    assert run("ngff").skipped == 2
    (tmp_path / "out/ngff/a.ome.zarr" / lost).unlink()
    summary = run("ngff")
    assert (list(summary.outcomes), summary.skipped) == (["a"], 1)
    assert np.array_equal(image(tmp_path / "out/ngff/a.ome.zarr"), whole, equal_nan=True)


def test_a_file_that_was_put_in_its_place_and_not_noted_is_written_again(run, tmp_path, monkeypatch):
    run("csv", threshold=0.5)
    file = tmp_path / "out/csv/a.csv"
    before = file.read_text()
    with monkeypatch.context() as patched:
        patched.setattr(module._Index, "write", lambda self: None)
        run("csv", threshold=0.99)
    assert file.stat().st_size == len(before) and file.read_text() != before
    assert run("csv", threshold=0.5).done == 2
    assert file.read_text() == before


def test_what_an_export_writes_outlives_a_power_cut(run, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    run("ngff", "csv", only=["a"])
    names = {name.removeprefix(f"{tmp_path}/out/") for name in flushed}
    assert {"ngff/.part-a.ome.zarr/0/c/0/0", "ngff/.part-a.ome.zarr/0", "ngff", "csv/.part-a.csv", "csv"} <= names
