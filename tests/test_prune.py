"""What left the manifest leaves the store when that is asked for, with its maps, and nothing else does."""

import json

import pytest
from typer.testing import CliRunner

from wsi_idc.cli import app
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.store import hold_store, open_store


@pytest.fixture
def store(slides, bundle, recorder):
    """Of the slides a, b and one that failed, with maps: the address. The manifest then has a alone."""
    path = slides.parent / "tiles.zarr"
    extract(read_manifest(slides), path, ExtractSettings(), listener=recorder)
    infer(path, read_bundle(bundle), InferSettings(), listener=recorder)
    slides.write_text("path\na.tif\n")
    return path


def prune(*arguments):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_dry_run_says_what_would_go_and_touches_nothing(store, slides):
    before = contents(store)
    done = prune(slides, "--store", store, "--dry-run")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "would remove b and its maps by mean",
        "would remove broken",
        "prune: would remove 2 slides and 1 maps; 1 slides stay",
    ]
    assert contents(store) == before


def test_slides_that_left_the_manifest_go_with_their_maps_and_the_rest_stays(store, slides):
    kept = {path: content for path, content in contents(store).items() if "a" in path.parts}
    events = [json.loads(line) for line in prune(slides, "--store", store, "--json").stdout.splitlines()]
    assert [(event.get("slide"), event.get("maps")) for event in events[:2]] == [("b", ["mean"]), ("broken", [])]
    found = open_store(store)
    assert (found.all_slide_ids(), found.backing.folders("maps/mean")) == (["a"], ["a"])
    assert {path: content for path, content in contents(store).items() if "a" in path.parts} == kept
    assert (slides.parent / "b.tif").exists()
    assert prune(slides, "--store", store).stdout == "prune: removed 0 slides and 0 maps; 1 slides stay\n"


def test_a_manifest_that_has_none_of_the_slides_is_not_believed(store, slides):
    slides.write_text("path,slide_id\na.tif,other\n")
    done = prune(slides, "--store", store)
    assert done.exception.exit_code == 2
    assert "none of the 3 slides in" in str(done.exception) and "--force" in str(done.exception)
    assert len(open_store(store).all_slide_ids()) == 3
    assert prune(slides, "--store", store, "--force").exit_code == 0
    assert open_store(store).all_slide_ids() == []


def test_slides_whose_files_are_away_stay_by_whatever_name_they_had(store, slides):
    """Of a folder with a dot in its name only the folder itself says that it is one."""
    with hold_store(store) as held:
        node = held.slide_node("case.v2")
        node.fail("x")
    slides.write_text("path\ngone/case.v2\ngone/b.tif\n")
    done = prune(slides, "--store", store)
    assert done.exit_code == 0, done.output
    assert open_store(store).all_slide_ids() == ["b", "case.v2"]


def test_what_is_somebody_elses_is_left_alone(store, slides):
    others = [store / place / ".ipynb_checkpoints" / "x" for place in ("slides", "maps/mean")]
    for file in others:
        file.parent.mkdir(parents=True)
        file.write_text("x")
    assert prune(slides, "--store", store).exit_code == 0
    assert open_store(store).all_slide_ids() == ["a"] and all(file.exists() for file in others)


def test_a_store_that_a_run_holds_is_not_pruned(store, slides):
    with hold_store(store):
        assert prune(slides, "--store", store).exception.exit_code == 75
        assert prune(slides, "--store", store, "--dry-run").exit_code == 0
    assert len(open_store(store).all_slide_ids()) == 3


def test_slides_that_left_the_manifest_are_shown_as_such_and_left_out_of_infer(store, slides, bundle):
    def invoke(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments), "--store", str(store)])

    done = invoke("infer", slides, "--model", bundle, "--force", "--json")
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["slide"] for event in events if event["event"] == "done"] == ["a"]
    assert [event["text"] for event in events if event["event"] == "note"] == [
        "2 slides no longer in the manifest left out: see wsi-idc prune"
    ]
    assert invoke("infer", slides, "--model", bundle, "--dry-run").stdout == "skip  a: already done\n"
    done = invoke("infer", slides, "--model", bundle, "--only", "b")
    assert done.exception.exit_code == 2 and "no such slide_id in the manifest" in str(done.exception)
    lines = invoke("status", slides).stdout.splitlines()
    assert lines[1].split()[:4] == ["a", "yes", "24", "mean"]
    assert "no longer in the manifest" in lines[2]
    assert any(line.startswith("1 slide: 1 extracted (24 tiles), 0 failed, 0 not yet; ") for line in lines)
    assert lines[-1] == "2 more no longer in the manifest: wsi-idc prune removes them"


def test_pruning_an_object_store(objects, slides, bundle, recorder):
    url = f"s3://{objects.bucket()}/store"
    extract(read_manifest(slides)[:2], url, ExtractSettings(), listener=recorder)
    infer(url, read_bundle(bundle), InferSettings(), listener=recorder)
    slides.write_text("path\nb.tif\n")
    assert prune(slides, "--store", url).exit_code == 0
    found = open_store(url)
    assert (found.all_slide_ids(), found.backing.folders("maps/mean")) == (["b"], ["b"])
