"""The page says of each slide what the store says, shows other people's text as text, and is written whole."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from wsi_idc import USE
from wsi_idc.errors import StoreBusyError, UsageError
from wsi_idc.extract import extract
from wsi_idc.flags import Flag
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.report import report, write
from wsi_idc.report.entry import entry, tile_pixels
from wsi_idc.report.page import html_page
from wsi_idc.report.pictures import Pictures, map_png
from wsi_idc.results import Choice, choose_model, look
from wsi_idc.settings import ExtractSettings, InferSettings
from wsi_idc.status import store_state
from wsi_idc.store import open_store
from wsi_idc.work.score import ScoreJob


class Read(HTMLParser):
    """A page's tags and texts; `rows` are those of the slides' table, by slide id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.rows = "", {}
        self._row = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "tr":
            self._row = {"kinds": found["data-kinds"].split(","), "text": ""} if "data-kinds" in found else None
        elif self._row is not None and tag == "th":
            self.rows[found["data-key"]] = self._row

    def handle_endtag(self, tag):
        if tag == "tbody":
            self._row = None

    def handle_data(self, data):
        self.text += data
        if self._row is not None:
            self._row["text"] += f"{data} "


def sources(page: Path) -> list[str]:
    return [found for _, tag in Read(page.read_text()).tags for name in ("src", "href") if (found := tag.get(name))]


def digest_of(folder: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        sha.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return sha.hexdigest()


def test_every_slide_is_filed_with_its_reason(page):
    rows = Read(page.read_text()).rows
    assert {name: row["kinds"][0] for name, row in rows.items()} == {
        "a": "done",
        "b": "done",
        "broken": "failed",
        "c'": "done",
        "glass": "empty",
        "new": "not scored",
        "old": "stale",
    }
    assert "the whole slide has one colour" in rows["glass"]["text"]
    assert "tiles changed" in rows["old"]["text"]
    assert "no map" in rows["new"]["text"]
    assert "cannot read the region" in rows["broken"]["text"]


def test_the_counts_are_those_of_the_table(kinds, tmp_path):
    written = write(kinds / "tiles.zarr", "mean", tmp_path / "report.html")
    expected = {"slides": 7, "done": 3, "failed": 1, "stale": 1, "empty": 1, "not scored": 1}
    assert {name: written.counts[name] for name in expected} == expected
    for name, count in written.counts.items():
        assert f"<li><b>{count}</b> {name}</li>" in written.page.read_text()


def test_what_status_flags_is_suspicious(kinds, page):
    flagged = [state.slide_id for state in store_state(kinds / "tiles.zarr").slides if state.flags]
    rows = Read(page.read_text()).rows
    assert flagged and [name for name, row in rows.items() if "suspicious" in row["kinds"]] == flagged


def test_what_others_wrote_is_text(page):
    found = Read(page.read_text())
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not [tag for tag, _ in found.tags if tag in ("b", "i", "a") and tag != "b"]
    assert '<script>document.title="run"</script>' in found.text
    assert "a \"quoted\" 'label' & <b>more</b>" in found.text
    assert "The <i>mean</i>" in found.text
    assert "\\x1b[31mred\\u202e" in found.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page.read_text())


def test_a_card_is_shown_without_what_it_would_load(page):
    found = Read(page.read_text())
    assert ("td", {}) in found.tags and "A card" in found.text
    assert "<script>document.title='run'</script>" in found.text
    assert not [source for source in sources(page) if "elsewhere" in source]


def test_the_page_needs_nothing_else(page):
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    assert {re.split("[:,#]", source)[0] for source in sources(page)} == {"data"}
    (policy,) = [tag["content"] for _, tag in Read(page.read_text()).tags if tag.get("http-equiv")]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_research_use_only_is_said_at_the_top_in_each_detail_and_in_print(page):
    text = page.read_text()
    assert text.index(USE, text.index("<h1>")) < text.index('<ul class="counts">')
    assert f'content: "{USE}"' in text
    details = text.split("<template ")[1:]
    assert len(details) == 7 and all(USE in detail for detail in details)


def test_numbers_and_regions_are_those_of_the_results(kinds, tmp_path):
    store = open_store(kinds / "tiles.zarr")
    for threshold in (None, 0.6):
        result = look(store, Choice("mean"), "b", threshold)
        with Pictures(tmp_path / "report.html") as pictures:
            found = entry(store, result, pictures)
        assert found.measures == result.measures
        assert sum(found.histogram) == result.measures.tiles
        assert [region for region, _ in found.regions] == result.regions[:5]
        assert found.threshold == (threshold or 0.55)
    write(store.address, "mean", tmp_path / "report.html", threshold=0.6)
    assert "0.6, given by --threshold (the model's: 0.55)" in Read((tmp_path / "report.html").read_text()).text


def test_the_map_lies_on_its_slide(kinds, tmp_path):
    from io import BytesIO

    store = open_store(kinds / "tiles.zarr")
    result = look(store, Choice("mean"), "b")
    with Pictures(tmp_path / "report.html") as pictures:
        found = entry(store, result, pictures)
    assert found.picture.size == pytest.approx((2.4, 2.0))
    assert found.picture.map_size == pytest.approx((2.4, 2.0))
    drawn = np.asarray(Image.open(BytesIO(map_png(result))).convert("RGBA"))
    assert drawn.shape[:2] == result.image.shape
    np.testing.assert_array_equal(drawn[..., 3] > 0, ~np.isnan(result.image))


def test_the_strongest_tiles_are_the_stores_own_pixels(kinds, make):
    slide = look(open_store(kinds / "tiles.zarr"), Choice("mean"), "b").slide
    pixels, chosen = make.pixels_of(slide), np.array([7, 0, slide.count - 1])
    found = tile_pixels(slide, chosen)
    assert set(found) == set(chosen.tolist())
    for place, tile in found.items():
        np.testing.assert_array_equal(tile, pixels[place])


def test_only_the_shards_that_hold_them_are_read():
    class Slide:
        """4,096-px tiles: a chunk each, 64 a shard."""

        count, read = 300, []

        class spec:  # noqa: N801
            size_px = 4096

        def read_tiles(self, start, stop):
            self.read.append((start, stop))
            for place in range(start, stop):
                yield np.full((1, 1, 1, 3), place, np.uint16)

    slide = Slide()
    found = tile_pixels(slide, np.array([299, 65, 70]))
    assert slide.read == [(64, 128), (256, 300)]
    assert {place: int(tile.flat[0]) for place, tile in found.items()} == {65: 65, 70: 70, 299: 299}


def test_a_store_without_pixels_has_those_of_the_strongest_tiles(slides, bundle, recorder, tmp_path):
    extract(read_manifest(slides), tmp_path / "bare.zarr", ExtractSettings(pixels=False), listener=recorder)
    infer(tmp_path / "bare.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
    extract(read_manifest(slides), tmp_path / "full.zarr", ExtractSettings(), listener=recorder)
    infer(tmp_path / "full.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
    (slides.parent / "b.tif").unlink()
    bare, full = (look(open_store(tmp_path / name), Choice("mean"), "b") for name in ("bare.zarr", "full.zarr"))
    theirs = tile_pixels(full.slide, np.array(full.strongest))
    assert full.strongest_pixels is None and bare.strongest == full.strongest
    np.testing.assert_array_equal(bare.strongest_pixels, [theirs[place] for place in full.strongest])
    with Pictures(tmp_path / "report.html") as pictures:
        found = entry(open_store(tmp_path / "bare.zarr"), bare, pictures)
    assert [tile.probability for tile in found.tiles] == sorted(bare.probability.tolist(), reverse=True)[:8]


def test_of_a_map_by_an_older_version_without_pixels_that_is_said(slides, bundle, recorder, tmp_path, monkeypatch):
    extract(read_manifest(slides), tmp_path / "bare.zarr", ExtractSettings(pixels=False), listener=recorder)
    monkeypatch.setattr(ScoreJob, "_strongest", lambda *_: {})
    infer(tmp_path / "bare.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
    out = write(tmp_path / "bare.zarr", None, tmp_path / "report.html").page
    assert out.read_text().count("The store holds no pixels of this slide") == 2


def test_damaged_pixels_are_named_and_the_others_shown(kinds, tmp_path):
    shutil.copytree(kinds / "tiles.zarr", tmp_path / "tiles.zarr")
    chunks = tmp_path / "tiles.zarr" / "slides" / "b" / "tiles" / "c"
    (shard,) = [path for path in chunks.rglob("*") if path.is_file()]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    rows = Read(write(tmp_path / "tiles.zarr", "mean", tmp_path / "report.html").page.read_text()).rows
    assert rows["b"]["kinds"][0] == "failed" and "damaged" in rows["b"]["text"]
    assert rows["a"]["kinds"][0] == "done"


def test_looking_changes_nothing_in_the_store(kinds, tmp_path):
    before = digest_of(kinds / "tiles.zarr")
    write(kinds / "tiles.zarr", "mean", tmp_path / "report.html")
    assert digest_of(kinds / "tiles.zarr") == before


def test_flags_are_shown_and_filed_as_suspicious(kinds, tmp_path):
    store = open_store(kinds / "tiles.zarr")
    with Pictures(tmp_path / "report.html") as pictures:
        one = entry(store, look(store, Choice("mean"), "a"), pictures)
        flagged = replace(one, flags=[Flag("stain", "unlike <b>those</b> of training")])
        text = html_page(
            [flagged],
            title="mean",
            positive="IDC",
            judged=None,
            card=[],
            card_text="",
            facts=[],
            notes=[],
            pictures=pictures,
            mark="",
        )
    row = Read(text).rows["a"]
    assert row["kinds"] == ["done", "suspicious"] and "stain: unlike <b>those</b> of training" in row["text"]
    assert "<li><b>1</b> suspicious</li>" in text


# --- labels --------------------------------------------------------------------------------------------------------


def test_the_evaluation_is_shown_where_the_model_may_be_judged(page):
    found = Read(page.read_text())
    assert "ROC AUC" in found.text and "mean does not say which patients it was trained on" in found.text
    plots = [tag["alt"] for name, tag in found.tags if name == "img" and tag["alt"]]
    assert plots[:2] == ["ROC curves", "Precision-recall curves"] and len([p for p in plots if "Tile" not in p]) == 4


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        ("trained", {}, "mean was trained on 1 of these 1 patients"),
        ("mean", {}, "The model is not at hand"),
        ("bundle", {"only": ["a"]}, "figures are of all of a store's"),
        ("bundle", {"threshold": 0.3}, "leave --threshold out"),
    ],
)
def test_figures_that_must_not_be_shown_are_not_and_why_is_said(kinds, make, tmp_path, model, options, why):
    make.write_bundle(tmp_path / "trained", threshold=0.55, training={"train_patients": ["p1"]})
    named = {"trained": str(tmp_path / "trained"), "bundle": str(kinds / "bundle"), "mean": "mean"}[model]
    text = write(kinds / "tiles.zarr", named, tmp_path / "report.html", **options).page.read_text()
    assert "Not evaluated." in text and why in Read(text).text
    assert "ROC AUC" not in text


def test_slides_that_left_the_manifest_are_named(kinds, tmp_path):
    write(kinds / "tiles.zarr", None, tmp_path / "r.html", listed=["a", "b", "c'", "broken", "glass", "old"])
    assert "1 of these slides is no longer in the manifest (new)" in (tmp_path / "r.html").read_text()


def test_without_labels_nothing_is_said_of_them(kinds, tmp_path):
    assert "labels" not in write(kinds / "tiles.zarr", "mean", tmp_path / "r.html", only=["b"]).page.read_text().lower()


# --- whole or not at all -------------------------------------------------------------------------------------------


def test_pictures_lie_beside_a_page_that_would_be_too_large(kinds, tmp_path, monkeypatch):
    for limit, held in ((1000, "from the first on"), (60_000, "when the page is made")):
        monkeypatch.setattr("wsi_idc.report.pictures.PAGE_BYTES", limit if limit < 60_000 else 10**9)
        monkeypatch.setattr(report, "PAGE_BYTES", limit)
        out = tmp_path / held / "a page.html"
        written = write(kinds / "tiles.zarr", "mean", out)
        assert written.folder is not None and written.folder.parent == tmp_path / held / "a page_files"
        shown = {unquote(source) for source in sources(out) if not source.startswith("data:,")}
        assert shown and all((out.parent / source).is_file() for source in shown)


def test_a_page_and_its_pictures_change_together(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr("wsi_idc.report.pictures.PAGE_BYTES", 1000)
    out = tmp_path / "report.html"
    first = write(kinds / "tiles.zarr", "mean", out).folder
    before = digest_of(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(report, "html_page", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(kinds / "tiles.zarr", "mean", out)
    assert digest_of(tmp_path) == before
    second = write(kinds / "tiles.zarr", "mean", out).folder
    assert second != first and not first.exists() and second.is_dir()
    monkeypatch.undo()
    assert write(kinds / "tiles.zarr", "mean", out).folder is None
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.fixture
def kept(kinds, tmp_path):
    """A folder with a store of its own, and its page; gives what looks again whether the page may stay."""
    shutil.copytree(kinds, tmp_path, dirs_exist_ok=True)

    def again(**options):
        options = {"model": str(tmp_path / "bundle"), "out": tmp_path / "report.html", "keep": True, **options}
        return write(tmp_path / "tiles.zarr", **options)

    again()
    return again


def test_a_page_that_was_made_from_the_same_is_left_as_it_is(kept, tmp_path):
    before = digest_of(tmp_path)
    first, second = kept(keep=False), kept()
    assert not first.kept and second.kept and kept().kept
    assert (second.counts, second.slides, second.folder) == (first.counts, first.slides, None)
    assert first.counts["slides"] == 7 and before != digest_of(tmp_path)  # the time when it was written
    (tmp_path / "report.html").write_text("<!doctype html>")
    assert not kept().kept and kept().kept


@pytest.mark.parametrize("change", ["a slide", "a map", "the card", "the model", "a threshold", "the manifest", "only"])
def test_a_page_that_would_be_another_is_written_again(kept, tmp_path, change):
    options = {
        "a threshold": {"threshold": 0.7},
        "the manifest": {"listed": ["a"]},
        "only": {"only": ["b"]},
    }.get(change, {})
    store = open_store(tmp_path / "tiles.zarr")
    if change in ("a slide", "a map"):
        node = store.slide_node("b") if change == "a slide" else store.map_node("mean", "b")
        path = tmp_path / "tiles.zarr" / node.path / "zarr.json"
        document = json.loads(path.read_text())
        document["attributes"]["committed"] = "2020-01-01T00:00:00+00:00"
        path.write_text(json.dumps(document))
    elif change in ("the card", "the model"):
        path = tmp_path / "bundle" / ("CARD.md" if change == "the card" else "bundle.json")
        path.write_text(path.read_text().replace("A card" if change == "the card" else "The <i>", "Another "))
    assert not kept(**options).kept
    assert kept(**options).kept


def test_a_page_whose_pictures_are_gone_is_written_again(kept, monkeypatch):
    monkeypatch.setattr("wsi_idc.report.pictures.PAGE_BYTES", 1000)
    first = kept(threshold=0.7)
    second = kept(threshold=0.7)
    assert second.kept and second.folder == first.folder
    next(first.folder.iterdir()).unlink()
    assert not kept(threshold=0.7).kept


def test_two_runs_do_not_write_pictures_of_one_page(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr("wsi_idc.report.pictures.PAGE_BYTES", 1000)
    with Pictures(tmp_path / "report.html") as pictures:
        folder = pictures.spill()
        with pytest.raises(StoreBusyError, match="another run writes there"):
            write(kinds / "tiles.zarr", "mean", tmp_path / "report.html")
        assert folder.is_dir() and not (tmp_path / "report.html").exists()


def test_a_folder_of_somebody_else_is_left_alone(kinds, tmp_path):
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "mine.txt").write_text("mine")
    write(kinds / "tiles.zarr", "mean", tmp_path / "report.html")
    assert [path.name for path in (tmp_path / "report_files").iterdir()] == ["mine.txt"]


# --- bad input -----------------------------------------------------------------------------------------------------


def test_a_store_without_maps_has_a_page(slides, recorder, tmp_path):
    extract(read_manifest(slides), tmp_path / "t.zarr", ExtractSettings(), listener=recorder)
    found = Read(write(tmp_path / "t.zarr", None, tmp_path / "report.html").page.read_text())
    filed = {name: row["kinds"][0] for name, row in found.rows.items()}
    assert filed == {"a": "not scored", "b": "not scored", "broken": "failed"}
    assert "The store has no maps: nothing was scored yet." in found.text


def test_what_cannot_be_done_is_one_line(kinds, make, recorder, tmp_path):
    store = kinds / "tiles.zarr"
    with pytest.raises(UsageError, match="is a folder; give the page's file"):
        write(store, "mean", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write(store, "mean", tmp_path / "file" / "report.html")
    with pytest.raises(UsageError, match="no such slide in the store"):
        write(store, "mean", tmp_path / "report.html", only=["zzz"])
    with pytest.raises(UsageError, match="no maps by 'meen'"):
        write(store, "meen", tmp_path / "report.html")
    with pytest.raises(UsageError, match="no such store"):
        write(tmp_path / "none.zarr", None, tmp_path / "report.html")
    shutil.copytree(store, tmp_path / "two.zarr")
    other = make.write_bundle(tmp_path / "other", name="other")
    infer(tmp_path / "two.zarr", read_bundle(other), InferSettings(), only=["a"], listener=recorder)
    with pytest.raises(UsageError, match="maps by mean, other"):
        write(tmp_path / "two.zarr", None, tmp_path / "report.html")
    shutil.rmtree(tmp_path / "two.zarr" / "slides")
    with pytest.raises(UsageError, match="has no slides"):
        write(tmp_path / "two.zarr", "mean", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_the_page_and_tells_the_counts(wsi_idc, kinds, tmp_path):
    ran = wsi_idc("report", "--store", kinds / "tiles.zarr", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (line,) = map(json.loads, ran.stdout.splitlines())
    assert line["event"] == "report" and line["page"] == "report.html" and (line["done"], line["failed"]) == (3, 1)
    assert (tmp_path / "report.html").is_file()
    ran = wsi_idc("report", "--store", kinds / "tiles.zarr", "--threshold", "1.5", cwd=tmp_path)
    assert ran.returncode == 2 and ran.stderr.startswith("wsi-idc: --threshold: ")


def test_the_model_that_ships_is_at_hand_by_its_files_and_not_by_its_name(kinds, make, recorder, tmp_path):
    named = make.write_bundle(tmp_path / "named", name="idc-resnet50")
    shutil.copytree(kinds / "tiles.zarr", tmp_path / "tiles.zarr")
    infer(tmp_path / "tiles.zarr", read_bundle(named), InferSettings(), only=["a"], listener=recorder)
    assert choose_model(open_store(tmp_path / "tiles.zarr"), "idc-resnet50").model == "idc-resnet50"
    text = write(tmp_path / "tiles.zarr", "idc-resnet50", tmp_path / "report.html").page.read_text()
    assert "not at hand: give the model" in Read(text).text
