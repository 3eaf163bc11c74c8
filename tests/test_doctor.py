"""Doctor tries things for real, says what to do, and changes nothing."""

import builtins
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from wsi_idc import doctor
from wsi_idc.cli import app
from wsi_idc.model import check as check_module
from wsi_idc.store import hold_store


def found(check, *arguments):
    return {each.name: each for each in check(*arguments)}


def test_every_reader_and_codec_works_here():
    checks = found(doctor._slides)
    assert len(checks) == len(doctor._KINDS)
    assert {name: str(check) for name, check in checks.items() if check.state != "ok"} == {}
    assert checks["DICOM"].found == "read by OpenSlide"
    assert checks["TIFF with WebP"].found == "read by tiatoolbox TIFF"


def test_a_codec_that_gives_other_pixels_or_none_is_a_fault(monkeypatch):
    from PIL import Image

    def other(folder, name, pixels):
        Image.fromarray(255 - pixels).save(folder / "x.png")
        return folder / "x.png"

    def none(folder, name, pixels):
        raise ImportError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor, "_KINDS", [("inverted", "auto", other), ("lost", "auto", none)])
    checks = found(doctor._slides)
    assert (checks["inverted"].state, checks["lost"].state) == ("fault", "fault")
    assert "gives other pixels" in checks["inverted"].found
    assert "libfoo.so.1" in checks["lost"].found and "such slides cannot be read here" in checks["lost"].advice


def test_a_missing_libgl_is_named_with_the_package_that_has_it(monkeypatch):
    imported = builtins.__import__

    def without(name, *arguments, **options):
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    (check,) = doctor._opencv()
    assert check.state == "fault" and "libGL.so.1" in check.found and "libgl1" in check.advice


def test_the_model_that_ships_gives_its_known_answers_and_another_is_a_fault(monkeypatch):
    (check,) = doctor._model()
    assert check.state == "ok", check
    monkeypatch.setattr(check_module, "known_answers", lambda bundle, tiles: np.full(len(tiles), 0.5))
    (check,) = doctor._model()
    assert check.state == "fault" and "do not use its maps" in check.advice


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"avx2", "avx512_vnni"}, "avx512_vnni: int8 graphs run about four times"),
        ({"avx2", "avx512_vnni", "amx_int8"}, "avx512_vnni, amx_int8: int8 graphs run about seven times"),
        ({"avx2"}, "AVX2 without VNNI: int8 graphs run about three times as fast as float32, half as fast"),
        ({"sse4_2"}, "no AVX2"),
        (set(), "what int8 graphs gain on it is not known"),
    ],
)
def test_what_the_processor_means_for_int8(monkeypatch, flags, told):
    monkeypatch.setattr(doctor, "_cpu", lambda: ("a processor", flags))
    assert told in found(doctor.processor)["processor"].found


def test_a_disk_that_is_nearly_full_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LEAST_STORE", 2**60)
    checks = found(doctor._disks, str(tmp_path / "none" / "yet.zarr"))
    assert checks["store's disk"].state == "warning" and str(tmp_path) in checks["store's disk"].found
    assert "store's disk" not in found(doctor._disks, "s3://bucket/store")


def test_versions_that_are_not_those_it_is_tested_with_are_told(monkeypatch):
    wanted = ["numpy<2", "no-such-package", "uv; extra == 'dev'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: wanted)
    checks = found(doctor._installation)
    assert (checks["numpy"].state, checks["no-such-package"].state) == ("warning", "fault")
    assert "uv" not in checks


def test_the_state_of_a_store(tmp_path):
    address = str(tmp_path / "tiles.zarr")
    (check,) = doctor._store(address)
    assert check.state == "ok" and "none yet" in check.found and not (tmp_path / "tiles.zarr").exists()
    with hold_store(address, create=True) as store:
        assert "a run holds the store (host " in found(doctor._store, address)["lease"].found
        store.slide_node("a").fail("broken")
    checks = found(doctor._store, address)
    assert checks[f"store {address}"].state == "warning" and "1 failed" in checks[f"store {address}"].found
    (tmp_path / "tiles.zarr" / "slides" / "a" / "zarr.json").write_text("{")
    check = found(doctor._store, address)[f"store {address}"]
    assert check.state == "fault" and "damaged records: a" in check.found and "verify --repair" in check.advice
    (tmp_path / "tiles.zarr" / "lease" / "holder.json").write_text("{}")
    assert "left by a run that was killed" in found(doctor._store, address)["lease"].found
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert found(doctor._store, str(tmp_path / "other"))[f"store {tmp_path / 'other'}"].state == "fault"


def test_the_command_exits_with_1_on_a_fault_alone_and_goes_on_after_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    quick = {"_slides": list, "_model": list, "_gpus": list}
    for name, check in quick.items():
        monkeypatch.setattr(doctor, name, check)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].endswith(" 0 fault")

    def broken():
        raise RuntimeError("no memory to be seen")

    monkeypatch.setattr(doctor, "_memory", broken)
    done = CliRunner().invoke(app, ["doctor", "-q"])
    assert done.exit_code == 1
    assert "fault    memory: RuntimeError: no memory to be seen; reinstall" in done.stdout
    assert "ok " not in done.stdout
    events = [json.loads(line) for line in CliRunner().invoke(app, ["doctor", "--json"]).stdout.splitlines()]
    assert {"event", "name", "state", "found", "advice"} == set(events[0])
    assert events[-1]["fault"] == 1
    assert list(tmp_path.iterdir()) == []
