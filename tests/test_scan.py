"""A folder of slides becomes a manifest that reads back as the same rows."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsi_idc.errors import ManifestError, SlideError, UsageError
from wsi_idc.manifest import COLUMNS, SPLITS, Row, look_alike, read_manifest
from wsi_idc.names import check_slide_id, same_name
from wsi_idc.scan import Kind, _clean, fill_mpp, read_split_file, scan, write_manifest
from wsi_idc.units import MPP_RANGE

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def detect(path: Path) -> Kind | None:
    if path.is_dir():
        if any(path.glob("*.dcm")):
            return "folder-slide"
        return "patches" if (path / "0").is_dir() or (path / "1").is_dir() else None
    if path.suffix == ".broken":
        raise PermissionError(path)
    return "slide" if path.suffix in (".svs", ".mrxs", ".vms", ".jpg", ".tiff") else None


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def ids(rows: Sequence[Row]) -> list[str]:
    return [row.slide_id for row in rows]


def test_slides_are_found_in_the_order_of_their_paths(tmp_path: Path) -> None:
    make(tmp_path, "b.svs", "a/z.svs", "c/dicom/1.dcm", "c/dicom/deep/2.svs", "notes.txt", ".hidden.svs")
    found = scan(tmp_path, detect)
    assert [(row.slide_id, row.path) for row in found.rows] == [
        ("z", tmp_path / "a/z.svs"),
        ("b", tmp_path / "b.svs"),
        ("dicom", tmp_path / "c/dicom"),
    ]
    assert found.left_out.others == 1


def test_a_folder_that_is_one_slide_is_one_row(tmp_path: Path) -> None:
    make(tmp_path, "1.dcm")
    assert [row.path for row in scan(tmp_path, detect).rows] == [tmp_path]


def test_the_nested_copy_of_the_idc_data_set_is_left_out(tmp_path: Path) -> None:
    for patient in ("8863", "10253"):
        for top in ("", "IDC_regular_ps50_idx5/"):
            make(tmp_path, f"{top}{patient}/0/{patient}_idx5_x1_y1_class0.png")
    make(tmp_path, "IDC_regular_ps50_idx5/7/1/7_idx5_x1_y1_class1.png")
    found = scan(tmp_path, detect, {"8863": "test"})
    assert [(row.slide_id, row.patient_id, row.split) for row in found.rows] == [
        ("10253", "10253", ""),
        ("8863", "8863", "test"),
        ("7", "7", ""),
    ]
    assert found.left_out.copies == 2


def test_what_belongs_to_a_slide_is_no_slide(tmp_path: Path) -> None:
    make(
        tmp_path, "m.mrxs", "m/Data0001.jpg", "v.vms", "v-1.jpg", "w.svs", "tiles.zarr/zarr.json", "tiles.zarr/x/1.svs"
    )
    (tmp_path / "v.vms").write_text("[Virtual Microscope Specimen]\r\nImageFile=v-1.jpg\r\n")
    assert ids(scan(tmp_path, detect).rows) == ["m", "v", "w"]


def test_an_annotation_beside_its_slide_goes_with_it(tmp_path: Path) -> None:
    make(tmp_path, *(f"{stem}.svs" for stem in "abcd"), "a.geojson", "b.xml", "c.xml")
    (tmp_path / "b.xml").write_text("<ASAP_Annotations/>")
    found = scan(tmp_path, detect)
    annotations = [row.annotation and row.annotation.name for row in found.rows]
    assert annotations == ["a.geojson", "b.xml", None, None]
    assert found.left_out.others == 0


def test_equal_stems_get_ids_from_their_paths(tmp_path: Path) -> None:
    make(tmp_path, "p1/s.svs", "p2/S.svs", "p3/t.svs", "p3/t.tiff", "u.svs", "v:1.svs")
    assert ids(scan(tmp_path, detect).rows) == ["p1-s", "p2-S", "p3-t.svs", "p3-t.tiff", "u", "v_1"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path, "slides/a.svs", "elsewhere/b.svs")
    (tmp_path / "slides/loop").symlink_to(tmp_path / "slides")
    (tmp_path / "slides/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "slides/itself").symlink_to("itself")
    assert ids(scan(tmp_path / "slides", detect).rows) == ["a", "b"]


def test_what_cannot_be_read_or_written_is_counted(tmp_path: Path) -> None:
    make(tmp_path, "x.broken", "a.svs")
    (tmp_path / "odd ").mkdir()
    make(tmp_path, "odd /1.dcm")
    (tmp_path / "\udcff.svs").write_bytes(b"")
    found = scan(tmp_path, detect)
    assert ids(found.rows) == ["a"]
    assert found.left_out.unreadable == [tmp_path / "x.broken"]
    assert sorted(found.left_out.unwritable) == sorted([tmp_path / "odd ", tmp_path / "\udcff.svs"])


def test_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    make(tmp_path, "a.svs")
    for path in (tmp_path / "gone", tmp_path / "a.svs"):
        with pytest.raises(UsageError):
            scan(path, detect)


def test_a_scan_reads_back_as_it_was_written(tmp_path: Path) -> None:
    make(tmp_path, "a, b.svs", " c.svs", 'd"e.svs', "f\rg.svs", "h\n.svs", "sub/a, b.svs", "sub/x.svs", "sub/x.geojson")
    rows = scan(tmp_path, detect, {"x": "train"}).rows
    for target in (tmp_path / "m.csv", tmp_path / "sub" / "m.csv"):
        write_manifest(target, rows)
        assert [row.__dict__ | {"line": 0} for row in read_manifest(target)] == [row.__dict__ for row in rows]
    assert "sub/x.svs" in (tmp_path / "m.csv").read_text()
    assert not list(tmp_path.glob(".m.csv*"))


words = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20).map(str.strip)
keys = words.filter(lambda text: text and look_alike(text, COLUMNS) is None and not text.startswith("\ufeff"))


@quick
@given(st.data())
def test_any_rows_read_back_as_they_were_written(tmp_path: Path, data: st.DataObject) -> None:
    slide = tmp_path / "a.svs"
    slide.write_bytes(b"")
    names = data.draw(
        st.lists(words.filter(lambda text: check_slide_id(text) is None), min_size=1, unique_by=same_name)
    )
    columns = data.draw(st.lists(keys, max_size=3, unique=True))
    splits: dict[str, str] = {}
    rows = []
    for name in names:
        patient = data.draw(words.filter(bool))
        rows.append(
            Row(
                name,
                slide,
                patient,
                data.draw(st.none() | st.floats(*MPP_RANGE)),
                annotation=data.draw(st.sampled_from([None, slide])),
                split=splits.setdefault(patient, data.draw(st.sampled_from(["", *SPLITS]))),
                label=data.draw(words),
                metadata={column: data.draw(words) for column in columns},
            )
        )
    write_manifest(tmp_path / "m.csv", rows)
    assert [row.__dict__ | {"line": 0} for row in read_manifest(tmp_path / "m.csv")] == [row.__dict__ for row in rows]


def test_a_stream_gets_absolute_paths(tmp_path: Path) -> None:
    make(tmp_path, "a.svs")
    stream = io.StringIO()
    write_manifest(stream, scan(tmp_path, detect).rows)
    assert stream.getvalue() == f"path,slide_id,patient_id\n{tmp_path}/a.svs,a,a\n"


def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    make(tmp_path, "a.svs")
    for place in (tmp_path / "gone" / "m.csv", tmp_path / "a.svs" / "m.csv", tmp_path):
        with pytest.raises(UsageError):
            write_manifest(place, [])


@quick
@given(st.text(st.characters(), max_size=150))
def test_any_name_can_be_made_a_slide_id(text: str) -> None:
    clean = _clean(text)
    assert check_slide_id(clean) is None
    assert clean == text or check_slide_id(text)


def test_a_split_file_gives_the_split_of_each_patient(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    path.write_text("patient_id,slide_id,split\nP1,,train\nP2,s,\n,s3,Val\nP1,,train\nP4,,\nP4,,test\n")
    assert read_split_file(path) == {"P1": "train", "P2": "", "s3": "val", "P4": "test"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("patient_id\nP\n", "no column 'split'"),
        ("who,split\nP,train\n", "no column 'patient_id'"),
        ("patient_id,split\nP,train\n,val\nP,test\n", "line 3, column patient_id"),
        ("patient_id,split\nP,train\nP,test\n", "'P' is in 'train' at line 2"),
        ("", "is empty"),
        ("patient_id,split\nP,train\nQ,tset\n", "line 3, column split, 'tset': is not a split; did you mean 'test'?"),
        ("patient_id,split\nP,holdout\n", "line 2, column split, 'holdout': .*write train, val or test"),
        ("slide_id,pateint_id,split\ns,P,train\n", "column pateint_id, .*did you mean 'patient_id'?"),
    ],
)
def test_faults_of_a_split_file_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "splits.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=said):
        read_split_file(path)


def test_ids_of_a_split_file_that_fit_nothing_are_told_and_slides_left_without_a_split(tmp_path: Path) -> None:
    make(tmp_path, *(f"{stem}.svs" for stem in "abcdef"))
    found = scan(tmp_path, detect, {"a": "train", "B": "test", "c": "", "x1": "val", "x2": "val", "x3": "val"})
    assert found.lines() == [
        "4 ids of the split file are of no slide found: 'B', 'x1', 'x2', ...",
        "5 of 6 slides have no split: 'b', 'c', 'd', ...",
    ]
    assert scan(tmp_path, detect, dict.fromkeys("abcdef", "train")).lines() == []
    assert scan(tmp_path, detect).lines() == []


def test_mpp_is_for_slides_that_have_none(tmp_path: Path) -> None:
    rows = [Row(name, tmp_path / name, name) for name in ("good", "none", "broken")]

    def lacks(path: Path) -> bool:
        if path.name == "broken":
            raise SlideError(path, "not a slide", "see the formats")
        return path.name == "none"

    filled, lines = fill_mpp(rows, 0.25, lacks)
    assert [row.mpp for row in filled] == [None, 0.25, None]
    assert lines == [
        f"no um/px given to {str(tmp_path / 'broken')!r}: not a slide; see the formats",
        "0.25 um/px given to 1 of 3 slides; the others have their own or cannot be opened",
    ]


def test_an_mpp_that_no_slide_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mpp"):
        fill_mpp([], 250.0, lambda path: True)


def test_the_command_gives_mpp_only_where_it_is_needed(wsi_idc, make, tmp_path: Path) -> None:
    pixels = make.texture(64, 64)
    make.write_tiff(tmp_path / "has.tif", pixels, 4.0)
    make.write_tiff(tmp_path / "lacks.tif", pixels, None)
    make.write_tiff(tmp_path / "impossible.tif", pixels, 1000.0)
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    done = wsi_idc("manifest", ".", "--mpp", 0.5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.split(",")[1]: line.split(",")[3] for line in done.stdout.splitlines()}
    assert rows == {"slide_id": "mpp", "has": "", "lacks": "0.5", "impossible": "0.5", "broken": ""}
    assert "0.5 um/px given to 2 of 4 slides" in done.stderr and "broken.tif" in done.stderr


def test_the_command_tells_of_a_split_file_that_does_not_fit(wsi_idc, tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"")
    (tmp_path / "splits.txt").write_text("patient_id,split\nA,test\n")
    done = wsi_idc("manifest", ".", "--split-file", "splits.txt", cwd=tmp_path)
    assert "1 id of the split file is of no slide found: 'A'" in done.stderr
    assert "1 of 1 slides have no split: 'a'" in done.stderr


def test_a_manifest_that_is_there_is_replaced_only_when_asked(wsi_idc, tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"")
    (tmp_path / "m.csv").write_text("by hand")
    done = wsi_idc("manifest", ".", "-o", "m.csv", cwd=tmp_path)
    assert done.returncode == 2 and "m.csv: is there already; add --force" in done.stderr
    assert (tmp_path / "m.csv").read_text() == "by hand"
    assert wsi_idc("manifest", ".", "-o", "m.csv", "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "m.csv").read_text().startswith("path,")


def test_a_pipe_is_never_replaced_by_a_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a file"):
        write_manifest(tmp_path / "pipe", [])
    assert (tmp_path / "pipe").is_fifo()


def test_what_was_left_out_is_told_in_lines():
    from wsi_idc.scan import LeftOut

    left_out = LeftOut(copies=1, others=2, unreadable=[Path("a b")])
    assert left_out.lines() == [
        "left out 1 folder of patches: a second copy of a patient found nearer the top",
        "left out 2 files that no reader knows as a slide",
        "left out 'a b': cannot be read",
    ]
    assert LeftOut().lines() == []


def test_the_real_detect_finds_slides_patches_and_dicom_folders(tmp_path):
    from wsi_idc.slides import detect

    dicom = b"\0" * 128 + b"DICM"
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1").write_bytes(dicom)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "b.dcm").write_bytes(dicom)
    (tmp_path / "mixed" / "c.svs").write_bytes(b"")
    place = tmp_path / "8863" / "0"
    place.mkdir(parents=True)
    (place / "8863_idx5_x51_y1_class0.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    found = scan(tmp_path, detect)
    assert [str(row.path.relative_to(tmp_path)) for row in found.rows] == [
        "8863",
        "mixed/b.dcm",
        "mixed/c.svs",
        "series",
    ]
    assert found.left_out.others == 1
