"""From slides to tiles: exact, resumable, one slide's trouble its own."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wsi_idc.errors import StoreBusyError, StoreError, UsageError
from wsi_idc.extract import PlannedSlide, check_room, extract, plan_slides
from wsi_idc.manifest import Row, read_manifest
from wsi_idc.plan import Plan
from wsi_idc.settings import CutSettings, ExtractSettings, TileSpec
from wsi_idc.slides import open_slide
from wsi_idc.store import hold_store, open_store
from wsi_idc.work.cut import CutJob
from wsi_idc.work.jobs import Capacity, Work


def run(manifest, recorder, settings=None, **options):
    store = manifest.parent / "tiles.zarr"
    rows = read_manifest(manifest)
    return extract(rows, store, settings or ExtractSettings(), listener=recorder, **options), open_store(store)


def test_good_slides_are_done_and_the_broken_one_is_named(slides, recorder):
    summary, store = run(slides, recorder)
    assert (summary.done, list(summary.failures)) == (2, ["broken"])
    assert "cannot read the region at x " in summary.failures["broken"]
    assert store.slide_ids() == ["a", "b"]
    assert "cannot read" in store.slide_node("broken").record().failed


def test_the_stored_tiles_are_the_slides_pixels(slides, recorder, make):
    _, store = run(slides, recorder)
    slide = store.slide("a")
    with open_slide(slides.parent / "a.tif") as source:
        for (x, y), tile in zip(slide.position.tolist(), make.pixels_of(slide), strict=True):
            assert np.array_equal(tile, source.read(0, x, y, 50, 50))
    assert slide.count == len(slide.cell) == 6 * 4
    assert np.array_equal(slide.position, slide.cell[:, ::-1] * 50)
    assert np.allclose(slide.tissue, 1, atol=0.2)
    assert np.isnan(slide.idc).all()


def test_what_a_slide_is_stands_in_its_attributes(slides, recorder):
    _, store = run(slides, recorder)
    attributes = store.slide("a").attributes
    assert attributes["patient_id"] == "p1"
    assert attributes["metadata"] == {"site": "north"}
    assert attributes["size"] == [500, 400] and attributes["mpp"] == [4.0, 4.0]
    assert attributes["complete"]["versions"]["wsi-idc"]
    assert set(attributes["complete"]["checksums"]) == {
        "cell", "position", "tissue", "idc", "blur", "pen", "thumbnail", "tissue_mask", "tiles"
    }  # fmt: skip
    slide = store.slide("a")
    assert slide.blur.shape == slide.pen.shape == (24,)
    assert slide.blur.min() > 0
    assert slide.thumbnail.shape == (200, 250, 3)
    assert slide.tissue_mask.shape == (200, 250)


def test_the_second_run_does_nothing(slides, recorder):
    rows = slides.read_text().splitlines()
    slides.write_text("\n".join(rows[:3]))
    run(slides, recorder)
    before = {path: path.stat().st_mtime_ns for path in (slides.parent / "tiles.zarr").rglob("*") if path.is_file()}
    os.utime(slides.parent / "a.tif", (1, 1))
    summary, _ = run(slides, recorder)
    after = {path: path.stat().st_mtime_ns for path in (slides.parent / "tiles.zarr").rglob("*") if path.is_file()}
    assert (summary.done, summary.skipped, recorder.started) == (0, 2, [])
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path.parent.name for path in changed} <= {"lease"}


def test_a_failed_slide_is_tried_again_and_mended(slides, recorder, make):
    run(slides, recorder)
    make.tissue_slide(slides.parent / "broken.tif", seed=3)
    summary, store = run(slides, recorder)
    assert (recorder.started, summary.done, summary.skipped) == (["broken"], 1, 2)
    assert store.slide_ids() == ["a", "b", "broken"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tile": TileSpec(size_px=64)}, "tile size and stride changed"),
        ({"tile": TileSpec(mpp=8.0)}, "tile um/px changed"),
        ({"min_tissue": 0.5}, "min tissue changed"),
        ({"tissue": "none"}, "tissue changed"),
        ({"pixels": False}, "pixels changed"),
    ],
)
def test_changed_settings_are_a_reason_to_do_it_again(slides, recorder, change, reason):
    _, store = run(slides, recorder)
    rows = read_manifest(slides)
    planned = plan_slides(rows, store, ExtractSettings(**change).cut(), force=False)
    assert [slide.plan.reason for slide in planned] == [reason, reason, "failed last time"]
    summary, store = run(slides, recorder, ExtractSettings(**change))
    assert summary.done == 2
    assert {
        slide.plan.action for slide in plan_slides(rows[:2], store, ExtractSettings(**change).cut(), force=False)
    } == {"skip"}


def test_a_changed_file_is_a_reason_and_so_is_force(slides, recorder, make):
    run(slides, recorder)
    make.tissue_slide(slides.parent / "a.tif", seed=9)
    summary, _ = run(slides, recorder)
    assert [summary.plans[name].reason for name in "ab"] == ["source changed", "already done"]
    summary, _ = run(slides, recorder, force=True)
    assert [summary.plans[name].reason for name in "ab"] == ["forced", "forced"]


def test_the_manifests_words_are_brought_up_to_date_without_new_tiles(slides, recorder):
    run(slides, recorder)
    slides.write_text(slides.read_text().replace("p1", "p9").replace("site", "centre"))
    summary, store = run(slides, recorder)
    assert summary.plans["a"].action == "skip"
    assert store.slide("a").patient_id == "p9"
    assert store.slide("a").attributes["metadata"] == {"centre": "north"}


def test_a_redo_that_cannot_begin_keeps_the_old_tiles_out_of_sight(slides, recorder):
    _, store = run(slides, recorder)
    (slides.parent / "a.tif").write_bytes(b"no slide any more")
    summary, store = run(slides, recorder)
    assert "a" in summary.failures
    assert store.slide_ids() == ["b"]
    assert store.slide_node("a").record().complete["tiles"] == 24


def test_without_pixels_everything_else_is_the_same(slides, recorder):
    _, store = run(slides, recorder)
    with_pixels = {name: getattr(store.slide("b"), name) for name in ("cell", "position", "tissue")}
    _, store = run(slides, recorder, ExtractSettings(pixels=False))
    slide = store.slide("b")
    assert not slide.has_pixels
    assert all(np.array_equal(getattr(slide, name), values) for name, values in with_pixels.items())
    assert np.isnan(slide.blur).all()


def tiny_shards(monkeypatch, tiles=2, block=2):
    """One tile a chunk, a few chunks a shard, a few shards a block: a small slide is then shared as a large one is."""
    from wsi_idc.store import slide
    from wsi_idc.work import cut

    monkeypatch.setattr(slide, "CHUNK_BYTES", 1)
    monkeypatch.setattr(slide, "CHUNKS_PER_SHARD", tiles)
    monkeypatch.setattr(cut, "SHARDS_PER_BLOCK", block)


def test_processes_write_the_same_store_as_threads(slides, recorder):
    _, store = run(slides, recorder)
    before = {name: store.slide(name).attributes["complete"] for name in store.slide_ids()}
    summary, store = run(slides, recorder, ExtractSettings(workers=2), force=True)
    assert (summary.done, list(summary.failures)) == (2, ["broken"])
    assert {name: store.slide(name).attributes["complete"] for name in store.slide_ids()} == before


@pytest.mark.parametrize("capacity", [Capacity(), Capacity(workers=2), Capacity(workers=7, threads=3)])
def test_what_is_written_does_not_depend_on_who_shares_the_work(slides, recorder, make, monkeypatch, capacity):
    """Identity and checksums of a slide of many shards: the same for any workers, threads and order of the blocks."""
    tiny_shards(monkeypatch)
    _, store = run(slides, recorder, ExtractSettings(threads=1))
    before = store.slide("b")
    pixels, complete = make.pixels_of(before), before.attributes["complete"]
    assert len(complete["checksums"]["tiles"]) == 24
    row = read_manifest(slides)[1]
    with hold_store(store.address) as held:
        job = CutJob(row, held.ticket, CutSettings(), None)
        work = Work(capacity)
        prepared = job.prepare(work)
        assert (len(prepared.blocks) == 1) == (capacity.workers == 1)
        results = [job.run(block, prepared.info, work) for block in reversed(prepared.blocks)]
        job.finish(prepared, results[::-1], work)
    after = open_store(store.address).slide("b")
    assert after.attributes["complete"] == complete
    assert np.array_equal(make.pixels_of(after), pixels)


def test_annotations_label_the_tiles(slides, recorder):
    square = [[100, 100], [225, 100], [225, 200], [100, 200], [100, 100]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [square]},
        "properties": {"classification": {"name": "IDC"}},
    }
    (slides.parent / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    slides.write_text("path,annotation\na.tif,a.geojson\nb.tif,\n")
    _, store = run(slides, recorder)
    slide = store.slide("a")
    parts = {tuple(cell): part for cell, part in zip(slide.cell.tolist(), slide.idc.tolist(), strict=True)}
    assert parts[2, 2] == parts[3, 3] == 1.0
    assert parts[2, 4] == pytest.approx(0.5, abs=0.01)
    assert parts[4, 2] == 0.0
    assert np.isnan(store.slide("b").idc).all()


def test_an_annotation_that_changes_is_a_reason_and_a_broken_one_fails_its_slide_alone(slides, recorder):
    (slides.parent / "a.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    slides.write_text("path,annotation\na.tif,a.geojson\nb.tif,\n")
    run(slides, recorder)
    (slides.parent / "a.geojson").write_text("{")
    summary, _ = run(slides, recorder)
    assert summary.plans["a"].reason == "annotation changed"
    assert list(summary.failures) == ["a"]


def test_the_manifests_mask_decides_what_is_tissue(slides, recorder):
    from PIL import Image

    mask = np.zeros((40, 50), np.uint8)
    mask[:5, :5] = 255
    Image.fromarray(mask).save(slides.parent / "mask.png")
    slides.write_text("path,mask\na.tif,mask.png\n")
    _, store = run(slides, recorder)
    assert store.slide("a").cell.tolist() == [[0, 0]]


def test_a_slide_without_tissue_is_done_with_a_warning(slides, recorder, make):
    make.write_tiff(slides.parent / "a.tif", np.full((400, 500, 3), 244, np.uint8))
    slides.write_text("path\na.tif\n")
    summary, store = run(slides, recorder)
    assert summary.outcomes["a"].warnings == ("no tissue found",)
    assert store.slide("a").count == 0
    assert store.slide("a").node.array("tiles").shape == (0, 50, 50, 3)


def test_a_patch_folder_gives_its_patches_and_labels(tmp_path, recorder, make):
    from PIL import Image

    folder = tmp_path / "8863" / "1"
    folder.mkdir(parents=True)
    Image.new("RGB", (50, 50), (9, 8, 7)).save(folder / "8863_idx5_x51_y1_class1.png")
    Image.new("RGB", (50, 30), (9, 8, 7)).save(folder / "8863_idx5_x101_y1_class1.png")
    manifest = tmp_path / "m.csv"
    manifest.write_text("path\n8863\n")
    summary, store = run(manifest, recorder)
    assert summary.outcomes["8863"].warnings == ("1 file left out: not 50 x 50 px",)
    slide = store.slide("8863")
    assert (slide.cell.tolist(), slide.idc.tolist()) == ([[0, 1]], [1.0])
    assert (make.pixels_of(slide)[0] == (9, 8, 7)).all()
    summary, _ = run(manifest, recorder, ExtractSettings(tile=TileSpec(size_px=64)))
    assert "ready-cut" in summary.failures["8863"]


def test_the_store_of_another_run_is_left_alone(slides, recorder):
    _, store = run(slides, recorder)
    with hold_store(store.address), pytest.raises(StoreBusyError):
        run(slides, recorder, force=True)


def test_a_store_that_was_moved_is_still_whole(slides, recorder):
    _, store = run(slides, recorder)
    shutil.move(store.address, slides.parent / "moved.zarr")
    assert open_store(slides.parent / "moved.zarr").slide("a").count == 24


@pytest.mark.parametrize(
    "patient", ["8863", "14082", *(pytest.param(patient, marks=pytest.mark.slow) for patient in ("8865", "8867"))]
)
def test_default_settings_keep_the_real_tissue(idc_slide, tmp_path, recorder, make, patient):
    place = idc_slide(patient)
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        f"path,annotation\n{place}/idc-{patient}.tif,{place}/idc-{patient}.geojson\n{place}/{patient},\n"
    )
    _, store = run(manifest, recorder)
    folder, slide = store.slide(patient), store.slide(f"idc-{patient}")
    truth = {tuple(cell): label for cell, label in zip(folder.cell.tolist(), folder.idc.tolist(), strict=True)}
    pixels = dict(zip(truth, make.pixels_of(folder), strict=True))
    kept = [tuple(cell) for cell in slide.cell.tolist()]
    assert all(cell in set(kept) for cell, label in truth.items() if label)
    assert sum(cell in truth for cell in kept) >= 0.98 * len(truth)
    empty = len(slide.grid) - len(truth)
    assert sum(cell not in truth for cell in kept) <= 0.01 * empty
    for cell, tile, idc in zip(kept, make.pixels_of(slide), slide.idc.tolist(), strict=True):
        if cell in truth:
            assert np.array_equal(tile, pixels[cell])
            assert idc == truth[cell]


def test_a_slide_whose_metadata_are_damaged_is_done_again_and_the_others_are_left_alone(slides, recorder):
    _, store = run(slides, recorder)
    before = store.slide("a").attributes["complete"]
    (slides.parent / "tiles.zarr/slides/a/zarr.json").write_text('{"zarr_format": 3, "node_')
    assert store.slide_ids() == ["b"]
    summary, store = run(slides, recorder)
    assert "metadata are damaged" in summary.plans["a"].reason
    assert (summary.done, summary.plans["b"].action) == (1, "skip")
    assert store.slide("a").attributes["complete"] == before


def test_a_refused_run_changes_nothing_for_the_others(slides, recorder):
    """Before, the root's grid was rewritten by a run that was then refused, and infer refused every slide."""
    _, store = run(slides, recorder)
    before = (slides.parent / "tiles.zarr/zarr.json").read_bytes()
    with hold_store(store.address), pytest.raises(StoreBusyError):
        run(slides, recorder, ExtractSettings(tile=TileSpec(size_px=64)))
    assert (slides.parent / "tiles.zarr/zarr.json").read_bytes() == before
    assert open_store(store.address).slide("a").spec == TileSpec()


def test_a_store_of_the_first_format_is_brought_up_to_date_by_cutting_again(slides, recorder):
    run(slides, recorder)
    folder = slides.parent / "tiles.zarr"
    for file in (folder / "zarr.json", *folder.glob("slides/*/zarr.json")):
        document = json.loads(file.read_text())
        attributes = document["attributes"]
        if "complete" in attributes:
            del attributes["complete"]["format"]
        if "format" in attributes and file.parent == folder:
            attributes["format"] = "wsi-idc-store/1"
        file.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="brings it up to date"):
        open_store(folder)
    summary, store = run(slides, recorder)
    assert summary.plans["a"].reason == "made by an older version of the store's format"
    assert "it is brought up to date" in summary.notes[0]
    assert store.slide_ids() == ["a", "b"]
    assert run(slides, recorder)[0].notes == ()


def test_the_store_is_a_hierarchy_that_zarr_and_xarray_walk(slides, recorder):
    import warnings

    import xarray
    import zarr

    run(slides, recorder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(slides.parent / "tiles.zarr", mode="r")
        assert "tissue_mask" in str(group.tree())
        assert {"slides", "maps"} <= set(group.group_keys())
        assert list(group["maps"].group_keys()) == []
        slide = xarray.open_zarr(slides.parent / "tiles.zarr", group="slides/a", consolidated=False)
    assert slide["tiles"].dims == ("tile", "y", "x", "c")
    assert slide["thumbnail"].dims == ("thumbnail_y", "thumbnail_x", "c")


def test_one_missing_slide_fails_alone(slides, recorder):
    (slides.parent / "a.tif").unlink()
    summary, store = run(slides, recorder)
    assert "no such file or folder (looked for" in summary.failures["a"]
    assert summary.outcomes["b"].status == "done"
    assert "no such file" in store.slide_node("a").record().failed


def test_room_is_asked_for_by_what_slides_took_so_far():
    def planned(*actions, tiles=1_000_000):
        """A million tiles of 50 px take some 5 GB."""
        return [
            PlannedSlide(
                Row(f"s{n}", Path(f"s{n}"), "p"),
                Plan(action, ""),
                {},
                CutSettings(),
                tiles=tiles if action == "skip" else None,
            )
            for n, action in enumerate(actions)
        ]

    def check(slides, free, settings=CutSettings()):  # noqa: B008
        check_room(slides, SimpleNamespace(address="t.zarr", backing=SimpleNamespace(free=lambda: free)), settings)

    check(planned("skip", "run"), 3e9)
    with pytest.raises(UsageError, match=r"t\.zarr: 2\.0 GB free for 1 new slide, which take about 5\.2 GB; make room"):
        check(planned("skip", "run"), 2e9)
    with pytest.raises(UsageError, match=r"2 new slides, which take about 10\.5 GB"):
        check(planned("skip", "run", "run"), 5e9)
    check(planned("skip", "redo", "redo"), 0)
    check(planned("skip", "run"), None)
    check(planned("skip", "run"), 1e9, CutSettings(pixels=False))
    check(planned("run", "run"), 1e9)
    with pytest.raises(UsageError, match=r"about 0\.2 GB"):
        check(planned("run"), 1e8)
