"""The map as a DICOM Parametric Map in the frame of reference of its slide, for slides that are DICOM.

Patient, study, specimen, frame of reference, and where the slide lies on the glass, are not in the store: they are read
from the slide's own file when the map is exported.
"""

import uuid
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_idc import USE, __version__
from wsi_idc.digests import digest, fingerprint
from wsi_idc.errors import AccessError, ChangedError, SlideError
from wsi_idc.results import Result
from wsi_idc.slides.whole import is_dicom
from wsi_idc.sources import first_bytes, source_of

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIX = ".dcm"
VERSION = 1
_FRAME = 256
"""A map is cut into frames of at most so many rows and columns."""
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
"""Of what a slide's header must have: some writers leave them out."""


def lacks(result: Result) -> str:
    """See `export.lacks`: only a DICOM slide has the frame of reference that a Parametric Map is drawn in."""
    return "" if str(result.slide.attributes.get("format")).lower() == "dicom" else "not a DICOM slide"


def write(result: Result, path: Path) -> list[str]:
    """See `Format.write`."""
    source = _source(result)
    told = _fill(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What pydicom holds against the slide's own header.
            made = _parametric_map(result, source)
            made.save_as(path, enforce_file_format=True)
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"no parametric map can be made from its DICOM header: {line}"
        raise SlideError(result.slide.path, problem, "see which attribute the slide's file lacks") from error
    return told


def _source(result: Result) -> "Dataset":
    """The header of the slide's finest level.

    Raises:
        SlideError: the slide is not at hand, not what it was, or not one that a map can be laid on.
    """
    source = source_of(result.slide.path)
    if not isinstance(source, Path):
        raise SlideError(source, "its DICOM header is needed, and it lies in an object store", "copy it to a folder")
    try:
        if fingerprint(source) != result.slide.made_from["source"]:
            raise ChangedError(source, "changed since it was extracted", "run wsi-idc extract again")
        headers = list(_headers(source))
    except OSError as error:
        raise AccessError.of(source, error) from error
    size = result.slide.grid.size
    for header in headers:
        if (header.get("TotalPixelMatrixColumns"), header.get("TotalPixelMatrixRows")) == size:
            absent = [
                name
                for name in ("StudyInstanceUID", "FrameOfReferenceUID", "ImageOrientationSlide")
                if not header.get(name)
            ]
            if absent:
                raise SlideError(source, f"its DICOM header has no {absent[0]}", "a parametric map needs it")
            return header
    raise SlideError(source, f"no DICOM image of {size[0]} x {size[1]} px there", "run wsi-idc extract again")


def _headers(path: Path) -> Iterator["Dataset"]:
    """The headers of a slide's whole-slide images; of a file, its own first, then those of its series beside it."""
    import pydicom

    alone = path.is_file()
    beside = sorted(child for child in (path.parent if alone else path).iterdir() if child.is_file() and child != path)
    series = None
    for file in [path, *beside] if alone else beside:
        if not is_dicom(first_bytes(file, 132)):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(file, stop_before_pixels=True)
        series = series or header.get("SeriesInstanceUID")
        if header.get("SOPClassUID") == _WHOLE_SLIDE and (not alone or header.get("SeriesInstanceUID") == series):
            yield header


def _parametric_map(result: Result, source: "Dataset") -> Any:
    """The map, its top left pixel's centre where its first tile's centre is on the glass.

    Pixels count from the slide's level 0 and lengths are those of its own header, so that a um/px given in the manifest
    does not move the map over the slide.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.valuerep import DT

    image, grid = result.image, result.slide.grid
    spacing_x, spacing_y = _spacing_mm(source, grid.mpp)
    shift = [(origin + (extent - 1) / 2) for origin, extent in zip(result.origin, grid.extent, strict=True)]
    x, y = shift[0] * spacing_x, shift[1] * spacing_y
    along, down = source.ImageOrientationSlide[:3], source.ImageOrientationSlide[3:]
    start = source.TotalPixelMatrixOriginSequence[0]
    first = (
        start.XOffsetInSlideCoordinateSystem,
        start.YOffsetInSlideCoordinateSystem,
        start.get("ZOffsetInSlideCoordinateSystem") or 0.0,
    )
    place = [float(f) + float(a) * x + float(d) * y for f, a, d in zip(first, along, down, strict=True)]
    name = _text(f"P({result.positive})", 16)
    made = datetime.fromisoformat(result.map.attributes["committed"])
    known = result.map.attributes
    seed = [source.SOPInstanceUID, result.slide.made_from["source"], known["committed"], known["complete"], VERSION]
    seed += [__version__, hd.__version__]
    parametric = hd.pm.ParametricMap(
        source_images=[source],
        pixel_array=image[None],
        series_instance_uid=_uid(seed, "series"),
        series_number=1,
        sop_instance_uid=_uid(seed, "instance"),
        instance_number=1,
        manufacturer="wsi-idc",
        manufacturer_model_name=_text(result.model, 64),
        software_versions=__version__,
        device_serial_number=_text(known["model"]["digest"], 64),
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            hd.pm.RealWorldValueMapping(
                lut_label=name,
                lut_explanation=_text(f"Probability of {result.positive}, NaN where there is no tile", 64),
                unit=codes.UCUM.NoUnits,
                value_range=(0.0, 1.0),
                slope=1.0,
                intercept=0.0,
            )
        ],
        voi_lut_transformations=[hd.VOILUTTransformation(window_center=0.5, window_width=1.0)],
        content_label="PROBABILITY",
        content_description=_text(f"{USE} {name}", 64),
        series_description=_text(f"{name} {result.model}. {USE}", 64),
        pixel_measures=hd.PixelMeasuresSequence(
            pixel_spacing=(grid.step[1] * spacing_y, grid.step[0] * spacing_x),
            slice_thickness=_thickness_mm(source),
        ),
        plane_orientation=hd.PlaneOrientationSequence("SLIDE", [float(value) for value in [*along, *down]]),
        plane_positions=[hd.PlanePositionSequence("SLIDE", place, (1, 1))],
        tile_pixel_array=True,
        tile_size=tuple(min(side, _FRAME) for side in image.shape),
        dimension_organization_type="TILED_FULL",
        content_date=made.date(),
        content_time=made.time(),
    )
    # highdicom says now, and a new UID: the same map is to be the same file.
    parametric.InstanceCreationDate, parametric.InstanceCreationTime = parametric.ContentDate, parametric.ContentTime
    parametric.ContributingEquipmentSequence[-1].ContributionDateTime = DT(made)
    parametric.DimensionOrganizationSequence[0].DimensionOrganizationUID = _uid(seed, "dimensions")
    return parametric


def _fill(source: "Dataset") -> list[str]:
    """Give a header what it must have and may lack; gives warnings."""
    from pydicom import Dataset

    for name in _MAY_BE_EMPTY:
        if name not in source:
            setattr(source, name, "")
    place = (source.get("TotalPixelMatrixOriginSequence") or [Dataset()])[0]
    offsets = ("XOffsetInSlideCoordinateSystem", "YOffsetInSlideCoordinateSystem")
    unknown = any(place.get(name) is None for name in offsets)
    for name in offsets:
        setattr(place, name, 0.0 if unknown else place.get(name))
    source.TotalPixelMatrixOriginSequence = [place]
    return ["its DICOM header does not say where on the glass it lies: the map counts from 0, 0"] if unknown else []


def _spacing_mm(source: "Dataset", mpp: tuple[float, float]) -> tuple[float, float]:
    """Millimetres (x, y) from one level-0 pixel to the next: the header's, or where it has none, what the slide was cut
    by."""
    try:
        y, x = source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    except (AttributeError, IndexError):
        return mpp[0] / 1000, mpp[1] / 1000
    return float(x), float(y)


def _thickness_mm(source: "Dataset") -> float | None:
    try:
        return float(source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness)
    except (AttributeError, IndexError):
        return None


def _uid(seed: list[Any], what: str) -> str:
    """A UID that is the same for the same map, so that an archive that has it is not given it twice."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, digest([what, *seed])).int}"


def _text(text: str, length: int) -> str:
    """A text as a short DICOM value holds it: ASCII, without what separates values."""
    return text.encode("ascii", "replace").decode().replace("\\", "/")[:length].strip()
