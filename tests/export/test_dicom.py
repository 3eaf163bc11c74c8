"""A DICOM slide's map opens again by highdicom, and lies on the glass where its tiles lie."""

import csv
import shutil

import numpy as np
import pytest

from wsi_idc.export import dicom
from wsi_idc.export.export import export
from wsi_idc.extract import extract
from wsi_idc.infer import infer
from wsi_idc.manifest import read_manifest
from wsi_idc.model.bundle import read_bundle
from wsi_idc.results import choose_model, look
from wsi_idc.settings import ExportSettings, ExtractSettings, InferSettings, TileSpec
from wsi_idc.store import open_store

# Rows of the slide run towards -y of the glass, columns towards -x, as on many scanners.
ORIENTATION = [0.0, -1.0, 0.0, -1.0, 0.0, 0.0]


def write_dicom(folder, pixels, *, mpp=4.0, tile=128, **changes):
    """A whole-slide image of one level in a folder, uncompressed; gives its file. `changes`: None leaves one out."""
    from pydicom import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage

    height, width = pixels.shape[:2]
    down, across = -(-height // tile), -(-width // tile)
    padded = np.full((down * tile, across * tile, 3), 255, np.uint8)
    padded[:height, :width] = pixels
    frames = padded.reshape(down, tile, across, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)

    def item(**values):
        found = Dataset()
        for name, value in values.items():
            setattr(found, name, value)
        return found

    slide = item(
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        SOPInstanceUID="1.2.3.4",
        StudyInstanceUID="1.2.3.1",
        SeriesInstanceUID="1.2.3.2",
        FrameOfReferenceUID="1.2.3.3",
        PositionReferenceIndicator="SLIDE_CORNER",
        DimensionOrganizationSequence=[item(DimensionOrganizationUID="1.2.3.5")],
        DimensionOrganizationType="TILED_FULL",
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        Modality="SM",
        Manufacturer="maker",
        ManufacturerModelName="scanner",
        DeviceSerialNumber="1",
        SoftwareVersions="1",
        PatientID="P-17",
        PatientName="Doe^Jane",
        PatientBirthDate="19700101",
        PatientSex="F",
        AccessionNumber="A-1",
        StudyID="S",
        StudyDate="20240102",
        StudyTime="030405",
        ContentDate="20240102",
        ContentTime="030405",
        InstanceNumber=1,
        SeriesNumber=1,
        ContainerIdentifier="C-1",
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        NumberOfFrames=len(frames),
        Rows=tile,
        Columns=tile,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        LossyImageCompression="00",
        TotalPixelMatrixColumns=width,
        TotalPixelMatrixRows=height,
        TotalPixelMatrixFocalPlanes=1,
        NumberOfOpticalPaths=1,
        OpticalPathSequence=[item(OpticalPathIdentifier="1")],
        ImagedVolumeWidth=width * mpp / 1000,
        ImagedVolumeHeight=height * mpp / 1000,
        ImagedVolumeDepth=1.0,
        ImageOrientationSlide=ORIENTATION,
        TotalPixelMatrixOriginSequence=[
            item(XOffsetInSlideCoordinateSystem=20.5, YOffsetInSlideCoordinateSystem=41.25)
        ],
        SharedFunctionalGroupsSequence=[
            item(PixelMeasuresSequence=[item(PixelSpacing=[mpp / 1000, mpp / 1000], SliceThickness=0.001)])
        ],
    )
    for name, value in changes.items():
        if value is None:
            delattr(slide, name)
        else:
            setattr(slide, name, value)
    slide.PixelData = frames.tobytes()
    slide.file_meta = FileMetaDataset()
    slide.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slide.file_meta.MediaStorageSOPClassUID = slide.SOPClassUID
    slide.file_meta.MediaStorageSOPInstanceUID = slide.SOPInstanceUID
    folder.mkdir(parents=True, exist_ok=True)
    slide.save_as(folder / "0.dcm", enforce_file_format=True)
    return folder / "0.dcm"


@pytest.fixture
def pixels(make):
    found = np.full((400, 500, 3), 244, np.uint8)
    found[100:300, 100:400] = make.texture(300, 200)
    return found


@pytest.fixture
def stored(tmp_path, bundle, recorder):
    """Cuts and scores slides by their manifest's lines; gives the store."""

    def run(*lines, **settings):
        manifest = tmp_path / "m.csv"
        manifest.write_text("\n".join(["path,slide_id,mpp", *lines]) + "\n")
        extract(read_manifest(manifest), tmp_path / "s.zarr", ExtractSettings(**settings), listener=recorder)
        infer(tmp_path / "s.zarr", read_bundle(bundle), InferSettings(), listener=recorder)
        return open_store(tmp_path / "s.zarr")

    return run


def result_of(store, slide_id="d"):
    return look(store, choose_model(store, None), slide_id)


def exported(store, tmp_path, recorder, *formats, **options):
    settings = ExportSettings(formats=formats or ("dicom",), out=tmp_path / "out")
    return export(store.address, None, settings, listener=recorder, **options)


def assert_lies_on(result, parametric, header):
    """Tiles' centres on the glass by the slide's header are the map's pixels' centres by the map's own."""
    from highdicom.spatial import ImageToReferenceTransformer

    of_slide = ImageToReferenceTransformer.for_image(header, for_total_pixel_matrix=True)
    of_map = ImageToReferenceTransformer.for_image(parametric, for_total_pixel_matrix=True)
    cells = result.slide.grid.cells()
    ideal = cells[:, ::-1] * np.asarray(result.slide.grid.step)
    expected = of_slide(ideal + np.asarray(result.slide.grid.extent) / 2)
    assert np.abs(of_map(cells[:, ::-1] + 0.5) - expected).max() < 1e-6  # mm
    # Positions of tiles are whole pixels; the grid that the map draws is not.
    whole = of_slide(result.slide.grid.position(cells) + np.asarray(result.slide.grid.extent) / 2)
    assert np.abs(whole - expected).max() <= 0.51 * max(result.slide.mpp) / 1000


@pytest.mark.parametrize("settings", [{}, {"tile": TileSpec(stride_px=25)}], ids=["side by side", "overlapping"])
def test_a_map_lies_where_its_tiles_lie_on_the_glass(stored, pixels, tmp_path, recorder, settings):
    import pydicom
    from highdicom.pm import ParametricMap

    file = write_dicom(tmp_path / "slide", pixels)
    store = stored("slide,d,", **settings)
    assert exported(store, tmp_path, recorder).done == 1
    result, header = result_of(store), pydicom.dcmread(file)
    parametric = ParametricMap.from_dataset(pydicom.dcmread(tmp_path / "out/dicom/d.dcm"))
    matrix = parametric.get_total_pixel_matrix(apply_real_world_transform=True)
    assert np.array_equal(matrix, result.image, equal_nan=True) and np.isnan(matrix).any()
    assert_lies_on(result, parametric, header)
    # In figures: half a tile from the slide's corner, along the glass's axes.
    start = parametric.TotalPixelMatrixOriginSequence[0]
    place = (start.XOffsetInSlideCoordinateSystem, start.YOffsetInSlideCoordinateSystem)
    assert place == pytest.approx((20.5 - 0.098, 41.25 - 0.098))
    pitch = 0.1 if settings else 0.2
    assert parametric.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [pitch, pitch]


def test_it_belongs_to_the_slides_patient_and_says_what_it_is_for(stored, pixels, tmp_path, recorder):
    import pydicom

    header = pydicom.dcmread(write_dicom(tmp_path / "slide", pixels))
    exported(stored("slide,d,"), tmp_path, recorder)
    found = pydicom.dcmread(tmp_path / "out/dicom/d.dcm")
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "ContainerIdentifier"):
        assert found[name].value == header[name].value
    assert found.SeriesInstanceUID != header.SeriesInstanceUID
    assert found.SourceImageSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
    assert found.ContentQualification == "RESEARCH"
    assert "Research use only. Not for diagnosis." in found.ContentDescription
    assert found.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0].LUTLabel == "P(IDC)"


def test_the_same_map_is_the_same_instance_and_another_is_another(stored, pixels, tmp_path, recorder, bundle):
    import pydicom

    write_dicom(tmp_path / "slide", pixels)
    store = stored("slide,d,")
    exported(store, tmp_path, recorder)
    path = tmp_path / "out/dicom/d.dcm"
    first = path.read_bytes()
    exported(store, tmp_path, recorder, force=True)
    assert path.read_bytes() == first
    before = pydicom.dcmread(path).SOPInstanceUID
    result = result_of(store)
    result.map.record.attributes["complete"]["checksums"]["0"] = "another"
    dicom.write(result, tmp_path / "other.dcm")
    assert pydicom.dcmread(tmp_path / "other.dcm").SOPInstanceUID != before


def test_a_larger_map_is_cut_into_frames(stored, pixels, tmp_path):
    import pydicom
    from highdicom.pm import ParametricMap

    write_dicom(tmp_path / "slide", pixels)
    result = result_of(stored("slide,d,"))
    result.image = np.random.default_rng(0).random((300, 520), np.float32)
    result.image[5:9, 100:200] = np.nan
    dicom.write(result, tmp_path / "d.dcm")
    parametric = ParametricMap.from_dataset(pydicom.dcmread(tmp_path / "d.dcm"))
    assert (parametric.NumberOfFrames, parametric.DimensionOrganizationType) == (6, "TILED_FULL")
    matrix = parametric.get_total_pixel_matrix(apply_real_world_transform=True)
    assert np.array_equal(matrix, result.image, equal_nan=True)


def test_um_px_of_the_manifest_do_not_move_the_map_over_the_slide(stored, pixels, tmp_path, recorder):
    import pydicom

    header = pydicom.dcmread(write_dicom(tmp_path / "slide", pixels))
    store = stored("slide,d,2.0")
    exported(store, tmp_path, recorder)
    result = result_of(store)
    assert result.slide.mpp == (2.0, 2.0)
    assert_lies_on(result, pydicom.dcmread(tmp_path / "out/dicom/d.dcm"), header)


def test_slides_that_are_not_dicom_are_left_out_with_one_note(stored, pixels, tmp_path, recorder, make):
    write_dicom(tmp_path / "slide", pixels)
    make.tissue_slide(tmp_path / "a.tif")
    make.tissue_slide(tmp_path / "b.tif")
    store = stored("slide,d,", "a.tif,a,", "b.tif,b,")
    summary = exported(store, tmp_path, recorder, "dicom")
    assert summary.done == 1 and not summary.failures and list(summary.plans) == ["d"]
    assert summary.notes == ("dicom: not a DICOM slide: 2 slides left out",)
    assert [path.name for path in (tmp_path / "out/dicom").iterdir()] == ["d.dcm"]
    summary = exported(store, tmp_path, recorder, "dicom", "csv")
    assert summary.done == 3 and not summary.failures


def test_a_slide_that_is_gone_or_another_fails_and_has_its_other_formats(stored, pixels, tmp_path, recorder):
    file = write_dicom(tmp_path / "slide", pixels)
    store = stored("slide,d,")
    shutil.move(tmp_path / "slide", tmp_path / "away")
    summary = exported(store, tmp_path, recorder, "dicom", "csv")
    assert list(summary.failures) == ["d"] and "no such file" in summary.failures["d"]
    assert (tmp_path / "out/csv/d.csv").is_file() and not list((tmp_path / "out/dicom").iterdir())
    with (tmp_path / "out/slides.csv").open(newline="") as stream:
        assert [row["state"] for row in csv.DictReader(stream)] == ["current"]
    write_dicom(tmp_path / "slide", pixels, PatientID="P-18")
    assert file.is_file()
    assert "changed since it was extracted" in exported(store, tmp_path, recorder).failures["d"]
    shutil.rmtree(tmp_path / "slide")
    shutil.move(tmp_path / "away", tmp_path / "slide")
    assert exported(store, tmp_path, recorder).done == 1


def test_a_header_that_lacks_what_it_may_is_filled_and_the_rest_is_one_line(stored, pixels, tmp_path, recorder):
    write_dicom(tmp_path / "bare", pixels, AccessionNumber=None, StudyDate=None, TotalPixelMatrixOriginSequence=None)
    write_dicom(tmp_path / "lost", pixels, FrameOfReferenceUID=None)
    summary = exported(stored("bare,bare,", "lost,lost,"), tmp_path, recorder)
    assert "counts from 0, 0" in summary.outcomes["bare"].warnings[0]
    assert list(summary.failures) == ["lost"]
    assert "has no FrameOfReferenceUID" in summary.failures["lost"] and "\n" not in summary.failures["lost"]


def test_one_file_of_a_series_is_enough(stored, pixels, tmp_path, recorder):
    write_dicom(tmp_path / "slide", pixels)
    write_dicom(tmp_path / "thumb", pixels[::4, ::4], mpp=16.0, SOPInstanceUID="1.2.3.9")
    shutil.move(tmp_path / "thumb/0.dcm", tmp_path / "slide/1.dcm")
    store = stored("slide/1.dcm,d,")
    assert store.slide("d").grid.size == (500, 400)
    assert exported(store, tmp_path, recorder).done == 1


def test_a_real_slides_map_lies_where_its_tiles_lie(stored, shared_data, tmp_path, recorder):
    import pydicom

    folder = shared_data / "slides" / "dicom" / "CMU-1-Small-Region"
    store = stored(f"{folder},d,", tile=TileSpec(stride_px=10))
    assert exported(store, tmp_path, recorder).done == 1
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.iterdir()]
    (header,) = [one for one in headers if one.TotalPixelMatrixColumns == 2220]
    dicom._fill(header)
    found, result = pydicom.dcmread(tmp_path / "out/dicom/d.dcm"), result_of(store)
    assert_lies_on(result, found, header)
    assert (found.TotalPixelMatrixRows, found.TotalPixelMatrixColumns) == result.image.shape == (38, 28)
