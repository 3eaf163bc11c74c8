"""A folder of IDC patches is a slide whose tiles come ready-cut."""

import numpy as np
import pytest
from PIL import Image

from wsi_idc.errors import SlideError
from wsi_idc.slides import detect, open_slide


def write_patch(folder, x, y, label, value, size=(50, 50), patient="8863"):
    place = folder / str(label)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{patient}_idx5_x{x}_y{y}_class{label}.png"
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "8863"
    write_patch(place, 51, 101, 1, 10)
    write_patch(place, 1, 1, 0, 20)
    write_patch(place, 101, 101, 0, 30)
    return place


def test_cells_and_labels_come_from_the_names(folder):
    assert detect(folder) == "patches"
    with open_slide(folder) as slide:
        cells, labels = slide.patches.ready_cells()
        assert (slide.size, slide.mpp) == ((150, 150), (4.0, 4.0))
    assert cells.tolist() == [[0, 0], [2, 1], [2, 2]]
    assert labels.tolist() == [0.0, 1.0, 0.0]


def test_it_reads_as_any_slide_does(folder):
    with open_slide(folder) as slide:
        region = slide.read(0, 40, 90, 70, 40)
    assert (region[10:, 10:60] == (10, 0, 0)).all()
    assert (region[10:, 60:] == (30, 0, 0)).all()
    assert (region[:10] == 245).all()


def test_what_cannot_be_used_is_counted_by_reason(folder):
    write_patch(folder, 151, 1, 0, 1, size=(50, 23))
    write_patch(folder, 160, 1, 0, 1)
    write_patch(folder, 51, 101, 0, 1)
    (folder / "0" / "notes.txt").write_text("x")
    (folder / "1" / "8863_idx5_x201_y1_class1.png").write_bytes(b"not a picture")
    with open_slide(folder) as slide:
        assert slide.patches.left_out == {
            "not 50 x 50 px": 1,
            "not on the 50-px grid": 1,
            "a second patch of the same place": 1,
            "another name than <patient>_idx5_x.._y.._class...png": 1,
            "not a readable picture": 1,
        }
        assert len(slide.patches.cells) == 3


def test_a_folder_without_a_usable_patch_is_refused(tmp_path):
    write_patch(tmp_path / "1", 1, 1, 0, 1, size=(10, 10))
    with pytest.raises(SlideError, match="no usable"):
        open_slide(tmp_path / "1")


def test_a_patch_that_is_damaged_fails_with_its_place(folder):
    path = write_patch(folder, 1, 51, 0, 1)
    path.write_bytes(path.read_bytes()[:-40])
    with open_slide(folder) as slide, pytest.raises(SlideError, match="x 0, y 50"):
        slide.read(0, 0, 50, 50, 50)


def test_the_real_folders_have_the_published_counts(shared_data, idc_slide):
    import csv

    with (shared_data / "idc" / "patients.csv").open() as stream:
        counts = {row["patient_id"]: row for row in csv.DictReader(stream)}["14306"]
    with open_slide(idc_slide("14306") / "14306") as slide:
        _, labels = slide.patches.ready_cells()
    assert (int((1 - labels).sum()), int(labels.sum())) == (int(counts["negative"]), int(counts["positive"]))
    assert np.isin(labels, [0, 1]).all()
