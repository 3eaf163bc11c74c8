"""The report's files are whole, parse, agree with each other, and say what every output must."""

import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from wsi_idc import USE
from wsi_idc.errors import UsageError
from wsi_idc.evaluate import report
from wsi_idc.evaluate.metrics import FIGURES, evaluate
from wsi_idc.evaluate.predictions import predictions
from wsi_idc.evaluate.report import as_json, difference_rows, summary_rows, write_report

NOTE = '12 of these patients were trained on by <b>first</b> & co, "so" beware'
PLOTS = ["roc", "precision_recall", "reliability", "per_patient"]


@pytest.fixture(scope="module")
def results(some):
    return evaluate([some("first", seed=1), some("second", seed=2)], resamples=30)


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    context = {"store": Path("/data/tiles.zarr"), "split": "test", "nothing": float("nan"), "n": np.int64(3)}
    write_report(out, results, notes=[NOTE], context=context)
    return out


def rows(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_file_is_written_and_named(results, tmp_path):
    paths = write_report(tmp_path, results)
    tables = ["metrics.csv", "per_slide.csv", "per_patient.csv", "confusion.csv", "differences.csv", "metrics.json"]
    pictures = [f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")]
    assert {path.name for path in paths} == {*tables, *pictures, "report.html"}
    assert paths[-1].name == "report.html"
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_every_table_row_says_research_use_and_the_note(folder):
    for path in folder.glob("*.csv"):
        table = rows(path)
        assert table
        for row in table:
            assert list(row)[-1] == "note"
            assert row["note"].startswith(f"{USE} {NOTE}")


def test_metrics_csv_holds_every_figure_exactly(folder, results):
    table = rows(folder / "metrics.csv")
    assert list(table[0]) == ["model", "figure", "value", "low", "high", "tiles", "patients", "note"]
    assert len(table) == 2 * len(FIGURES)
    for row in table:
        evaluation = next(e for e in results.evaluations if e.predictions.model == row["model"])
        figure = evaluation.figures[row["figure"]]
        assert (float(row["value"]), float(row["low"]), float(row["high"])) == (figure.value, figure.low, figure.high)
        assert (int(row["tiles"]), int(row["patients"])) == (len(evaluation.predictions), 25)


def test_the_other_tables_agree_with_the_results(folder, results):
    for cells in rows(folder / "confusion.csv"):
        assert sum(int(cells[name]) for name in ("tp", "fp", "tn", "fn")) == int(cells["tiles"]) == 400
    for name, wanted in (("per_slide", "per_slide"), ("per_patient", "per_patient")):
        table = rows(folder / f"{name}.csv")
        assert len(table) == sum(len(getattr(e, wanted)) for e in results.evaluations)
        first = getattr(results.evaluations[0], wanted)[0]
        assert float(table[0]["brier"]) == first.figures["brier"]
        assert int(table[0]["tiles"]) == first.tiles
    differences = rows(folder / "differences.csv")
    assert [float(row["value"]) for row in differences] == [row.value.value for row in results.differences]


def test_json_is_strict_and_agrees(folder, results):
    def refuse(word):
        raise AssertionError(word)

    content = json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)
    assert content["research_use_only"] == USE
    assert content["notes"][0] == NOTE
    assert content["context"] == {"store": "/data/tiles.zarr", "split": "test", "nothing": None, "n": 3}
    assert content["interval"]["resamples"] == 30
    for model, evaluation in zip(content["models"], results.evaluations, strict=True):
        assert model["figures"]["f1"]["value"] == evaluation.figures["f1"].value
    assert len(content["differences"]) == len(FIGURES)


class Page(HTMLParser):
    """Tags still open, references, and text."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.text, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_page_stands_alone(folder):
    page = read(folder / "report.html")
    assert len(page.references) == len(PLOTS)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"url\(|@import|https?://", (folder / "report.html").read_text())


def test_the_page_says_its_notes_before_its_figures_and_escapes_them(folder):
    page = read(folder / "report.html")
    text = " ".join("".join(page.text).split())
    assert "b" not in page.tags
    assert text.index(USE) < text.index(NOTE) < text.index("ROC AUC")


def test_the_page_escapes_names(tmp_path):
    evil = '<script>alert("1")</script>'
    data = predictions(evil, [0.1, 0.9], [0, 1], [evil, "t"], [evil, "q"], threshold=0.5, title=evil)
    write_report(tmp_path, [data], resamples=5, notes=[evil], context={evil: evil})
    page = read(tmp_path / "report.html")
    assert "script" not in page.tags
    assert evil in "".join(page.text)


def test_undefined_figures_are_na_on_the_page_empty_in_csv_and_null_in_json(tmp_path):
    data = predictions("m", [0.1, 0.9], [0, 0], ["s", "t"], ["p", "p"], threshold=0.5)
    write_report(tmp_path, [data], resamples=5)
    auc = next(row for row in rows(tmp_path / "metrics.csv") if row["figure"] == "roc_auc")
    assert (auc["value"], auc["low"], auc["high"]) == ("", "", "")
    assert "4 figures are undefined, since all 2 tiles are non-IDC" in auc["note"]
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["models"][0]["figures"]["roc_auc"] == {"value": None, "low": None, "high": None}
    text = "".join(read(tmp_path / "report.html").text)
    assert "n/a" in text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert rows(tmp_path / "differences.csv") == []


def test_long_tables_are_cut_on_the_page_and_whole_in_csv(tmp_path, monkeypatch, some):
    monkeypatch.setattr("wsi_idc.evaluate.page.SHOWN_ROWS", 3)
    write_report(tmp_path, [some(patients=8)], resamples=5)
    text = "".join(read(tmp_path / "report.html").text)
    assert "5 more rows are in per_patient.csv" in text
    assert len(rows(tmp_path / "per_patient.csv")) == 8


def test_terminal_rows_are_words(results):
    table = summary_rows(results)
    assert list(table[0]) == ["Figure", "first", "second"]
    assert table[0]["Figure"] == "ROC AUC"
    assert re.fullmatch(r"0\.\d{3} \(0\.\d{3} to [01]\.\d{3}\)", table[0]["first"])
    assert table[-1] == {"Figure": "Tiles / patients", "first": "400 / 25", "second": "400 / 25"}
    differences = difference_rows(results)
    assert re.match(r"[+-]\d\.\d{3} \(", differences[0]["first - second"])


def test_many_models_are_compared_in_a_matrix(some, tmp_path):
    many = evaluate([some(f"a-model-with-a-long-name-{n}", seed=n, noise=0.2 * n) for n in range(1, 5)], resamples=30)
    table = difference_rows(many)
    assert [len(row) for row in table] == [5] * 4
    assert len({*table[0]}) == 5
    assert [next(iter(row.values())) for row in table] == [e.predictions.model for e in many.evaluations]
    assert list(table[0].values())[-1].endswith(" *") and list(table[0].values())[-1].startswith("+")
    assert list(table[-1].values())[1].startswith("-")
    write_report(tmp_path, many)
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="matrix"') == len(FIGURES) and page.count("<details open>") == 1
    assert len(rows(tmp_path / "differences.csv")) == 6 * len(FIGURES)


def test_a_difference_reads_the_same_both_ways(results):
    there, back = results.difference("brier", "first", "second"), results.difference("brier", "second", "first")
    assert (back.value.value, back.value.low, back.value.high) == (
        -there.value.value,
        -there.value.high,
        -there.value.low,
    )
    assert back.favours == there.favours
    assert results.difference("brier", "first", "first") is None


def test_what_few_patients_favour_is_never_said_without_a_word_on_that(some, tmp_path):
    few = evaluate([some("good", patients=6, noise=0.01), some("bad", patients=6, noise=2)], resamples=30)
    assert few.differences[0].favours == "good"
    write_report(tmp_path, few)
    for words in (difference_rows(few)[0]["Favours"], "".join(read(tmp_path / "report.html").text)):
        assert "good (6 patients only)" in words
    assert all("6 patients only" in row["note"] for row in rows(tmp_path / "differences.csv"))
    assert json.loads((tmp_path / "metrics.json").read_text())["few_patients"] is True
    many = evaluate([some("good", noise=0.01), some("bad", noise=2)], resamples=30)
    assert difference_rows(many)[0]["Favours"] == "good"


def test_models_are_told_apart_by_name_where_their_titles_are_alike(tmp_path):
    twins = [
        predictions(name, [0.1, 0.9], [0, 1], ["s", "t"], ["p", "q"], threshold=0.5, title="ResNet-50")
        for name in ("monday", "friday")
    ]
    write_report(tmp_path, twins, resamples=5)
    captions = re.findall(r"<caption><strong>(.*?)</strong>, from", (tmp_path / "report.html").read_text())
    assert captions == ["monday", "friday"]


def test_what_is_so_of_all_models_is_said_once(some):
    notes = evaluate([some("a", patients=6), some("b", patients=6)], resamples=5).notes()
    assert [note for note in notes if "6 patients only" in note] == [
        "all models: 6 patients only, so intervals are rough and likely too narrow"
    ]
    assert any(note.startswith("a: 6 patients") for note in evaluate([some("a", patients=6)], resamples=5).notes())


def test_a_text_that_a_spreadsheet_would_run_is_none_in_any_table(tmp_path):
    data = predictions("=1+1", [0.1, 0.9], [0, 1], ["=s", "t"], ["@p", "q"], threshold=0.5)
    write_report(tmp_path, [data], resamples=5)
    row = rows(tmp_path / "per_slide.csv")[0]
    assert (row["model"], row["slide"], row["patient"]) == ("'=1+1", "'=s", "'@p")


def test_json_turns_numbers_without_a_value_into_null(results):
    content = as_json(results, context={"a": [np.float32("nan"), math.inf, np.arange(2)], 3: {"x": {1}}})
    assert content["context"] == {"a": [None, None, [0, 1]], "3": {"x": [1]}}


def test_predictions_are_evaluated_on_the_way(tmp_path, some):
    data = some()
    write_report(tmp_path, [data], resamples=7, seed=5)
    wanted = evaluate([data], resamples=7, seed=5).evaluations[0].figures["f1"]
    found = next(row for row in rows(tmp_path / "metrics.csv") if row["figure"] == "f1")
    assert (float(found["low"]), float(found["high"])) == (wanted.low, wanted.high)


def test_a_second_report_replaces_the_first(results, tmp_path, some):
    write_report(tmp_path, results, notes=["old news"])
    write_report(tmp_path, [some(tiles=80, patients=6)], resamples=5)
    for path in tmp_path.iterdir():
        assert b"old news" not in path.read_bytes()


def test_a_write_that_fails_is_one_line_and_leaves_no_part(results, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        write_report(tmp_path / "out", results)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_is_a_file_is_one_line(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: cannot be written: File exists"):
        write_report(tmp_path / "file", results)


def test_a_failed_report_leaves_the_earlier_one_readable(results, tmp_path, monkeypatch):
    write_report(tmp_path, results, notes=["first"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(report, "html_page", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, results, notes=["second"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_can_be_read_by_others(results, tmp_path):
    (tmp_path / "plain").write_text("")
    for path in write_report(tmp_path, results):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_importing_the_package_is_light():
    code = (
        "import sys, wsi_idc, wsi_idc.evaluate, wsi_idc.evaluate.metrics; "
        "sys.exit(bool({'matplotlib', 'sklearn', 'pandas', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
