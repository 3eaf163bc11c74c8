"""A manifest is read whole, or refused with every fault named."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsi_idc.errors import ManifestError
from wsi_idc.manifest import Row, read_manifest
from wsi_idc.names import check_slide_id, same_name
from wsi_idc.units import MPP_RANGE

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.svs", "b.svs", "c.ome.tiff", "a.geojson", "mask.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "dicom.1").mkdir()
    return tmp_path


def read(folder: Path, text: str | bytes, **how: bool) -> list[Row]:
    path = folder / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(path, **how)


def faults(folder: Path, text: str | bytes, **how: bool) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read(folder, text, **how)
    assert caught.value.exit_code == 2
    return caught.value.faults


def test_only_a_path_is_needed(folder: Path) -> None:
    assert read(folder, "path\na.svs\ndicom.1\nc.ome.tiff\n") == [
        Row("a", folder / "a.svs", "a", line=2),
        Row("dicom.1", folder / "dicom.1", "dicom.1", line=3),
        Row("c.ome", folder / "c.ome.tiff", "c.ome", line=4),
    ]


def test_every_column_is_read_and_others_are_metadata(folder: Path) -> None:
    header = "grade, path ,slide_id,patient_id,mpp,annotation,mask,split,label"
    text = f"{header}\n 3 , a.svs ,S1,P1,0.25,a.geojson,mask.png,val,x\n"
    row = Row(
        "S1", folder / "a.svs", "P1", 0.25, folder / "a.geojson", folder / "mask.png", "val", "x", {"grade": "3"}, 2
    )
    assert read(folder, text) == [row]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_byte_order_marks_line_ends_and_blank_lines_change_nothing(folder: Path, mark: bytes, end: bytes) -> None:
    lines = [b"path,mpp", b"", b"a.svs,1", b" , ", b"b.svs,2", b""]
    rows = read(folder, mark + end.join(lines))
    assert [(row.slide_id, row.mpp, row.line) for row in rows] == [("a", 1.0, 3), ("b", 2.0, 5)]


def test_relative_paths_start_at_the_manifest_and_absolute_ones_stand(folder: Path, tmp_path: Path) -> None:
    below = folder / "lists"
    below.mkdir()
    rows = read(below, f"path\n../a.svs\n{folder}/b.svs\n")
    assert [row.path for row in rows] == [folder / "a.svs", folder / "b.svs"]


def test_dots_are_followed_as_the_system_does(folder: Path) -> None:
    real = folder / "real" / "lists"
    real.mkdir(parents=True)
    (folder / "real" / "x.svs").write_bytes(b"")
    (folder / "lists").symlink_to(real)
    assert read(folder / "lists", "path\n../x.svs\n")[0].path == folder / "real" / "x.svs"


def test_all_faults_are_reported_together_with_line_column_and_value(folder: Path) -> None:
    text = (
        "path,slide_id,patient_id,mpp,annotation,split\n"
        'a.svs,"quoted\nid",P1,nan,gone.geojson,train\n'
        "gone.svs,B,P1,fast,,val\n"
        "b.svs,b,P2,1e9,dicom.1,trainn\n"
        "b.svs\n"
    )
    found = faults(folder, text, strict=True)
    assert [tuple(fault.split(": ")[0].split(", ", 2)) for fault in found] == [
        ("line 2", "column annotation", "'gone.geojson'"),
        ("line 2", "column slide_id", "'quoted\\nid'"),
        ("line 2", "column mpp", "'nan'"),
        ("line 4", "column path", "'gone.svs'"),
        ("line 4", "column mpp", "'fast'"),
        ("line 4", "column split", "'val'"),
        ("line 5", "column annotation", "'dicom.1'"),
        ("line 5", "column mpp", "'1e9'"),
        ("line 5", "column split", "'trainn'"),
        ("line 5", "column slide_id", "'b'"),
        ("line 6", "too few fields"),
    ]
    assert all("; " in fault for fault in found)
    assert "did you mean 'train'" in found[8]
    assert "differs only in case from the slide_id of line 4" in found[9]


def test_a_slide_that_is_not_there_is_its_own_failure(folder: Path) -> None:
    rows = read(folder, "path,annotation,mask\na.svs,,\ngone.svs,,\nb.svs,gone.xml,\nc.ome.tiff,,dicom.1\n")
    assert [row.slide_id for row in rows] == ["a", "gone", "b", "c.ome"]
    assert [row.missing for row in rows] == [
        "",
        f"no such file or folder (looked for {folder}/gone.svs)",
        f"annotation 'gone.xml': no such file or folder (looked for {folder}/gone.xml)",
        "mask 'dicom.1': is a folder",
    ]


def test_a_manifest_of_which_no_slide_is_there_is_refused(folder: Path) -> None:
    found = faults(folder, "path,annotation\ngone.svs,\na.svs,gone.xml\n")
    assert [fault.split(": ")[0] for fault in found] == [
        "line 2, column path, 'gone.svs'",
        "line 3, column annotation, 'gone.xml'",
    ]


def test_a_fault_of_a_column_is_one_whatever_is_missing(folder: Path) -> None:
    (found,) = faults(folder, "path,split\na.svs,tset\ngone.svs,\n")
    assert "did you mean 'test'" in found


def test_strict_takes_no_manifest_with_a_missing_slide(folder: Path) -> None:
    (found,) = faults(folder, "path\na.svs\ngone.svs\n", strict=True)
    assert found.startswith("line 3, column path, 'gone.svs': no such file or folder")


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [("x.svs", "x"), ("x.ome.tif", "x.ome"), ("1.2.840.113", "1.2.840.113"), ("x.zarr", "x.zarr"), ("8863", "8863")],
)
def test_the_default_id_of_a_missing_slide_is_that_it_has_when_it_is_there(folder: Path, name: str, slide_id: str):
    assert read(folder, f"path\na.svs\n{name}\n")[1].slide_id == slide_id
    (folder / name).mkdir() if slide_id == name else (folder / name).touch()
    assert read(folder, f"path\na.svs\n{name}\n")[1].slide_id == slide_id


def test_what_is_neither_file_nor_folder_is_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.svs")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.svs"))
        rows = read(folder, "path,mask\na.svs,\npipe.svs,\nsocket.svs,\n/dev/null,\nb.svs,pipe.svs\n")
    reason = "is not a file or folder"
    assert [row.missing for row in rows] == ["", reason, reason, reason, f"mask 'pipe.svs': {reason}"]
    with pytest.raises(ManifestError, match="is a pipe or a device"):
        read_manifest(folder / "pipe.svs")


MISSPELT = {
    "slide_id": ["slideid", "Slide_ID", "slide id", "slide-id", "slied_id", "slid_id"],
    "patient_id": [
        "pateint_id",
        "patient",
        "Patient_ID",
        "patientID",
        "patients",
        "patient_no",
        "patien_id",
        "patient_name",
    ],
    "mpp": ["MPP", "Mpp", "microns_per_pixel", "um_per_px", "um/px", "mmp"],
    "annotation": [
        "annotations",
        "Annotation",
        "anotation",
        "annotaton",
        "annotation_file",
        "annotation_path",
        "annot",
    ],
    "mask": ["masks", "Mask", "maks", "mask_path", "mask_file", "tissue_mask"],
    "split": ["splitt", "spilt", "splits", "Split", "splt", "data_split"],
    "label": ["labels", "Label", "lable", "labell"],
}
METADATA = """
site scanner stain age notes block sex grade stage diagnosis hospital date magnification objective er pr her2 ki67
barcode case case_id study_id sample_id specimen_id subject_id patient_age patient_sex label_source annotator
annotated annotated_by annotation_date annotation_tool mask_source split_seed slide_number slide_type slide_name
slide file filename image width height comment tissue organ cohort batch center centre fold mpp_x mpp_y level size
format vendor url md5 task mark table tag status weight plate spot lab labelled masked group dataset series
laterality class subtype institution country year height_px width_px resolution pixel_size power quality remarks
scan_date uuid paths Path path2 block_id Scanner AGE Süd
"""


@pytest.mark.parametrize(("meant", "written"), [(meant, name) for meant, names in MISSPELT.items() for name in names])
def test_a_column_that_looks_like_one_of_ours_is_a_fault(folder: Path, meant: str, written: str) -> None:
    (found,) = faults(folder, f"path,{written}\na.svs,\n")
    assert found.startswith(f"line 1, column {written}, ") and f"did you mean {meant!r}?" in found
    assert read(folder, f"path,{meant},{written}\na.svs,,kept\n")[0].metadata == {written: "kept"}


@pytest.mark.parametrize("name", METADATA.split())
def test_other_columns_are_metadata(folder: Path, name: str) -> None:
    assert read(folder, f"path,{name}\na.svs,x\n")[0].metadata == {name: "x"}


def test_ids_that_a_file_system_takes_for_one_are_duplicates(folder: Path) -> None:
    assert len(faults(folder, "path,slide_id\na.svs,caf\u00e9\nb.svs,CAFE\u0301\n")) == 1
    assert "add a column slide_id" in faults(folder, "path\na.svs\n./a.svs\n")[0]


def test_a_patient_without_a_split_leaks_nothing(folder: Path) -> None:
    rows = read(folder, "path,patient_id,split\na.svs,P,test\nb.svs,P,\n")
    assert [row.split for row in rows] == ["test", ""]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n \n,,\n", "is empty"),
        ("path,mpp\n", "no slides"),
        ("Path\na.svs\n", "rename 'Path' to 'path'"),
        ("filename,mpp\na.svs,1\n", "rename 'filename' to 'path'"),
        ("paht\na.svs\n", "rename 'paht' to 'path'"),
        ("x,y\n1,2\n", "add a column 'path'"),
        ("path;mpp\na.svs;1\n", "separated by ';'"),
        ("path,path\na.svs,a.svs\n", "twice"),
        ("path,MPP\na.svs,1\n", "did you mean 'mpp'?"),
        ("path,split\na.svs,validation\n", "did you mean 'val'?"),
        ("path,split\na.svs,holdout\n", "write train, val or test"),
        ('path\n""\n', "no slides"),
        ("path,mpp\n,1\n", "column path, '': is empty"),
        ('path,mpp\na.svs,"0,25"\n', "write 0.25"),
        ("path,mpp\na.svs,1_0\n", "not a number"),
        ("path,mpp\na.svs,0.25,x\n", "line 2, too many fields"),
        ('path\n"a.svs\n', "line 2, not CSV"),
        (
            "path\nftp://host/a.svs\n",
            "ftp:// is not supported; give a path, or a URL that begins with s3://, gs://, az://",
        ),
        ("path\nS3://bucket/a.svs\n", "S3:// is not supported"),
        ("path\ns3://bucket\n", "names no object"),
        ("path\ns3:///a.svs\n", "write s3://BUCKET/KEY"),
        ("path\ns3://bucket/x/../a.svs\n", "write s3://BUCKET/KEY"),
        ("path,mask\na.svs,http://host/m.png\n", "column mask, 'http://host/m.png': http:// is not supported"),
        ("path\n" + "x" * 300 + "\n", "cannot be read"),
        ("path\n" + "x" * 200_000 + "\n", "field larger than"),
        (b"path\na\xff.svs\n", "line 2, byte 0xff is not UTF-8"),
        (b"path\na\0.svs\n", "line 2, not a text file"),
        ("path\na.svs\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_each_fault_says_what_to_do(folder: Path, text: str | bytes, said: str) -> None:
    found = faults(folder, text)
    assert said in "\n".join(found)
    assert all("; " in fault for fault in found)


def test_a_manifest_that_is_no_file_is_refused(folder: Path) -> None:
    for path, said in (
        (folder / "gone.csv", "no such file"),
        (folder, "is a folder"),
        (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(ManifestError, match=said):
            read_manifest(path)


def test_a_column_without_a_name_is_ignored(folder: Path) -> None:
    assert read(folder, ",path,\n0,a.svs,\n")[0].metadata == {}


@quick
@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(str.encode)
    | st.text("path,\n\r\"'.;ab \0\ufeff").map(str.encode)
)
def test_any_bytes_give_rows_or_a_manifest_error(folder: Path, data: bytes) -> None:
    try:
        assert all(isinstance(row, Row) for row in read(folder, data))
    except ManifestError as error:
        assert error.faults


@quick
@given(st.floats(allow_nan=True) | st.floats(0.01, 200))
def test_mpp_is_taken_exactly_or_refused(folder: Path, mpp: float) -> None:
    text = f"path,mpp\na.svs,{mpp!r}\n"
    if MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        assert read(folder, text)[0].mpp == mpp
    else:
        assert len(faults(folder, text)) == 1


@pytest.mark.parametrize("text", ["S1", "CMU-1.jpeg", "TCGA-A1 (2)", "Präparat_3", "a" * 128, "组织", "-x", "a..b"])
def test_names_of_folders_are_slide_ids(text: str) -> None:
    assert check_slide_id(text) is None


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", ".a", "a.", "a ", " a", "a/b", "a\\b", "a\nb", "a\x7f", "é" * 65, "zarr.json", "Zarr.JSON", "__a"]
    + [f"a{character}" for character in '<>:"|?*'],
)
def test_what_cannot_name_a_folder_is_no_slide_id(text: str) -> None:
    assert check_slide_id(text)


@quick
@given(st.text(st.characters(), min_size=1, max_size=140))
def test_every_slide_id_names_a_folder(tmp_path: Path, text: str) -> None:
    if check_slide_id(text) is None:
        (tmp_path / text).mkdir(exist_ok=True)
        assert (tmp_path / text).parent == tmp_path
        assert text in {path.name for path in tmp_path.iterdir()}


@quick
@given(st.text(max_size=20))
def test_case_never_tells_two_names_apart(text: str) -> None:
    assert same_name(text) == same_name(same_name(text))
    assert text.isascii() is False or same_name(text) == same_name(text.upper())


def test_reading_a_manifest_imports_nothing_heavy() -> None:
    code = "import sys, wsi_idc.manifest, wsi_idc.scan; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "numpy", "torch", "zarr", "tiatoolbox", "shapely"} & set(loaded)
