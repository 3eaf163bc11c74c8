"""Settings: the command line before variables, before the file, before defaults; and what cannot be is told."""

import re
from pathlib import Path

import pytest

from wsi_idc import config
from wsi_idc.config import KEYS, in_force
from wsi_idc.errors import FaultsError, UsageError
from wsi_idc.settings import ExtractSettings, InferSettings, TileSpec

DOC = Path(__file__).parents[1] / "docs" / "cron.md"


def written(folder, text):
    """A settings file in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "wsi-idc.toml").write_text(text)
    return folder / "wsi-idc.toml"


def origins(found, *keys):
    values = {key: (value, origin) for key, value, origin in found.rows()}
    return [values[key] for key in keys]


def test_with_nothing_said_the_defaults_are_those_of_the_stages():
    found = in_force(environment={})
    assert (found.extract, found.infer) == (ExtractSettings(), InferSettings())
    assert (found.store, found.model, found.file) == ("tiles.zarr", None, None)
    origins = {key: origin for key, _, origin in found.rows()}
    assert origins.pop("extract.pixels") == "default (of extract; run keeps none)"
    assert set(origins.values()) == {"default"}
    assert found.extract.pixels and not found.extract_in_run.pixels
    assert in_force({"extract.pixels": True}, environment={}).extract_in_run.pixels


def test_the_command_line_goes_before_variables_before_the_file(tmp_path):
    file = written(tmp_path, "[extract]\ntile_size = 100\nmpp = 2.0\nlast = 'drop'\nmin_tissue = 0.3\n")
    found = in_force(
        {"extract.tile_size": 64},
        file=file,
        environment={"WSI_IDC_EXTRACT_TILE_SIZE": "80", "WSI_IDC_EXTRACT_MPP": "1.0"},
    )
    assert found.extract == ExtractSettings(tile=TileSpec(size_px=64, mpp=1.0, last="drop"), min_tissue=0.3)
    assert origins(found, "extract.tile_size", "extract.mpp", "extract.last", "extract.stride") == [
        (64, "command line"),
        (1.0, "WSI_IDC_EXTRACT_MPP"),
        ("drop", str(file)),
        (64, "default"),
    ]


def test_the_file_beside_the_manifest_is_read_unless_another_one_is_named(tmp_path):
    beside = written(tmp_path / "slides", "store = 'beside.zarr'\n")
    other = written(tmp_path / "other", "store = 'other.zarr'\n")
    third = written(tmp_path / "third", "store = 'third.zarr'\n")
    manifest, variable = beside.with_name("m.csv"), {"WSI_IDC_CONFIG": str(third)}
    for options, expected in (
        ({"manifest": manifest, "environment": {}}, beside),
        ({"manifest": manifest, "environment": variable}, third),
        ({"manifest": manifest, "environment": variable, "file": other}, other),
    ):
        found = in_force(**options)
        assert (found.file, Path(found.store).parent) == (expected, expected.parent)
    assert in_force(manifest=tmp_path / "m.csv", environment={}).store == "tiles.zarr"


def test_what_two_stages_share_can_be_said_once_and_the_stronger_source_decides(tmp_path):
    file = written(tmp_path, "workers = 2\nwait = 5\n[infer]\nwait = 9\n")
    found = in_force({}, file=file, environment={})
    assert (found.extract.workers, found.infer.workers) == (2, 2)
    assert (found.extract.wait, found.infer.wait) == (5, 9)
    found = in_force({"wait": 1.0}, file=file, environment={})
    assert (found.extract.wait, found.infer.wait) == (1, 1)


def test_workers_for_both_stages_are_extracts_where_infer_has_gpus(tmp_path):
    found = in_force({"workers": 4, "infer.gpus": 1}, environment={})
    assert (found.extract.workers, found.infer.workers, found.infer.gpus) == (4, 0, 1)
    assert in_force({"infer.workers": 4, "infer.gpus": 1}, environment={}).infer.workers == 4


def test_paths_of_a_file_start_at_its_folder_and_those_of_the_command_line_do_not(tmp_path):
    text = "store = 't.zarr'\nmodel = 'm'\nstage = '/s'\n[export]\nout = 'o'\n[run]\nsummary = '../s.txt'\n"
    found = in_force({"run.metrics": "m.prom"}, file=written(tmp_path, text), environment={})
    assert (found.store, found.model) == (str(tmp_path / "t.zarr"), tmp_path / "m")
    assert (found.extract.stage, found.export.out) == ("/s", tmp_path / "o")
    assert (found.run.summary, found.run.metrics) == (tmp_path / "../s.txt", Path("m.prom"))
    url = written(tmp_path, "store = 's3://bucket/store'\n")
    assert in_force(file=url, environment={}).store == "s3://bucket/store"


def test_all_faults_are_told_at_once_each_with_where_it_stands_and_what_to_do(tmp_path):
    extract = "[extract]\ntile_sise = 50\ngpus = 1\nmpp = 0\n"
    file = written(tmp_path, f"stor = 'x'\nbatch_size = 8\n{extract}[infr]\na = 1\n[export]\nformats = 'cvs'\n")
    with pytest.raises(FaultsError) as caught:
        in_force({"infer.gpus": -1}, file=file, environment={"WSI_IDC_INFER_WAIT": "long", "WSI_IDC_STROE": "x"})
    assert caught.value.exit_code == 2
    expected = [
        "WSI_IDC_STROE: no such variable; did you mean WSI_IDC_STORE?",
        f"{file}: stor: no such setting; did you mean store?",
        f"{file}: batch_size: no such setting; it belongs in [infer]",
        f"{file}: [extract] tile_sise: no such setting; did you mean tile_size?",
        f"{file}: [extract] gpus: no such setting; it belongs in [infer]",
        f"{file}: infr: no such setting; did you mean [infer]?",
        f"{file}: [extract] mpp: 0: ",
        "--gpus: -1: ",
        "WSI_IDC_INFER_WAIT: 'long': ",
        f"{file}: [export] formats: 'cvs': ",
    ]
    assert len(caught.value.faults) == len(expected)
    for fault, start in zip(caught.value.faults, expected, strict=True):
        assert fault.startswith(start), fault


def test_variables_of_others_are_left_alone():
    others = {
        "WSI_IDC_PORT_8080_TCP": "x",
        "WSI_IDC_SERVICE_HOST": "10.0.0.1",
        "WSI_IDC_DEBUG": "1",
        "WSI_IDC_MODELS": "models",
        "WSI_IDC_STORE": "",
    }
    assert in_force(environment=others).store == "tiles.zarr"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"store = [", "is not TOML"),
        (b"store = '\xff'", "is not UTF-8"),
        (b"extract = 5", "extract: is a section; write [extract] on a line"),
        (b"[store]\na = 1", "store: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        in_force(file=tmp_path / "x.toml", environment={})
    assert f"{tmp_path / 'x.toml'}: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("how", ["--config", "WSI_IDC_CONFIG"])
def test_a_file_that_was_named_and_is_not_there_is_told(tmp_path, how):
    file = tmp_path / "none.toml"
    options = {"file": file} if how == "--config" else {"environment": {how: str(file)}}
    with pytest.raises(UsageError, match=f"no such settings file; correct {how}"):
        in_force(**options)


@pytest.mark.parametrize("command", ["extract", "infer"])
def test_every_setting_of_a_stage_is_an_option_of_its_command(command):
    from typer.main import get_command

    from wsi_idc.cli import app

    options = {option for one in get_command(app).commands[command].params for option in one.opts}
    for key in KEYS:
        if key.startswith(f"{command}."):
            assert config._option(key) in options, key


def test_the_settings_on_the_page_are_settings(tmp_path):
    (text,) = re.findall(r"^```toml\n(.*?)^```$", DOC.read_text(), re.DOTALL | re.MULTILINE)
    found = in_force(file=written(tmp_path, text), environment={})
    assert found.extract.stage == found.infer.stage == "/scratch/stage"
    assert (found.infer.precision, found.export.formats) == ("float32", ("csv", "parquet"))
    assert found.run.summary == tmp_path / "summary.txt"
