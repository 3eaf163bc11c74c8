"""Whether this machine, this installation and a store are fit for work: each thing tried, and what to do if it is not.

Slides are tried as users have them: tiny ones are made, opened by `open_slide` and compared. Of the store nothing is
written; `verify` reads it whole.
"""

import importlib.metadata
import io
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wsi_idc import __version__
from wsi_idc.cores import cores
from wsi_idc.errors import WsiIdcError
from wsi_idc.files import standing
from wsi_idc.objects import is_url

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsi_idc.settings import Reader

GIB = 2**30
LEAST_MEMORY = 2 * GIB
LEAST_STORE = 10 * GIB
LEAST_TEMPORARY = GIB
_SIDE = 256
_TOLD = ("numpy", "zarr", "torch", "openvino", "onnxruntime", "openslide-bin", "tiatoolbox", "imagecodecs", "dask")
_RECORDS = 2_000
"""Of a store, so many records are looked at."""
_TOLERANCE = 0.06
"""Of a probability of the model that ships, from what it answered when it was written: engines and instruction sets
differ; on a processor with VNNI its int8 graph is up to 0.007 off."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: ok; warning: work can be done, but see `advice`; fault: it cannot.
        found: what is there.
        advice: what to do; empty where it is ok.
    """

    name: str
    state: Literal["ok", "warning", "fault"]
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.name}: {self.found}{f'; {self.advice}' if self.advice else ''}"


def examine(address: str) -> Iterator[Check]:
    """Every check, as it is made.

    Args:
        address: the store's; there may be none.
    """
    checks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("installation", _installation),
        ("OpenCV", _opencv),
        ("processor", processor),
        ("memory", _memory),
        ("GPU", _gpus),
        ("disk", lambda: _disks(address)),
        ("slides", _slides),
        ("Zarr", _zarr),
        ("model", _model),
        ("store", lambda: _store(address)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            yield _broken(name, error)


def _broken(name: str, error: Exception, advice: str = "reinstall wsi-idc from its requirements.lock") -> Check:
    if isinstance(error, WsiIdcError):
        return Check(name, "fault", f"{error.subject}: {error.problem}", error.advice or advice)
    line = (str(error).strip().splitlines() or [""])[0]
    return Check(name, "fault", f"{type(error).__name__}: {line}", advice)


def _installation() -> Iterator[Check]:
    known = {name: version for name in _TOLD if (version := _version(name))}
    told = ", ".join([f"Python {platform.python_version()}", *(f"{name} {known[name]}" for name in known)])
    yield Check("versions", "ok", f"wsi-idc {__version__}, {told}")
    from packaging.requirements import Requirement

    wanted = []
    with suppress(importlib.metadata.PackageNotFoundError):
        wanted = [Requirement(text) for text in importlib.metadata.requires("wsi-idc") or ()]
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    for each in needed:
        version = _version(each.name)
        if version is None:
            yield Check(each.name, "fault", "not installed", "install wsi-idc again, from its requirements.lock")
        elif not each.specifier.contains(version, prereleases=True):
            advice = f"wsi-idc is tested with {each.name}{each.specifier}: install from its requirements.lock"
            yield Check(each.name, "warning", f"version {version}", advice)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _opencv() -> Iterator[Check]:
    try:
        import cv2
    except ImportError as error:
        # libGL.so.1 and libgthread are no Python packages: containers and servers often lack them.
        yield _broken("OpenCV", error, "install the system's libgl1 and libglib2.0-0 (Debian, Ubuntu)")
        return
    yield Check("OpenCV", "ok", f"{cv2.__version__} loads")


def processor() -> Iterator[Check]:
    """The processor, with what it means for int8 graphs; and the cores that may be used."""
    name, flags = _cpu()
    if "avx2" in flags:
        vnni = [flag for flag in ("avx512_vnni", "avx_vnni", "amx_int8") if flag in flags]
        times = "seven" if "amx_int8" in vnni else "four" if vnni else "three"
        means = f"{', '.join(vnni) or 'AVX2 without VNNI'}: int8 graphs run about {times} times as fast as float32"
        if not vnni:
            means += ", half as fast as with VNNI"
        yield Check("processor", "ok", f"{name}; {means}")
    elif flags:
        yield Check("processor", "warning", f"{name}; no AVX2", "models will run slowly: use another machine")
    else:
        yield Check("processor", "ok", f"{name}; what int8 graphs gain on it is not known")
    there, usable = os.cpu_count() or 1, cores()
    limit = f" of {there}, by affinity or cgroup" if there > usable else ""
    yield Check("cores", "ok", f"{usable}{limit}; runs use them all unless --threads is said")


def _cpu() -> tuple[str, set[str]]:
    """The processor's name and features, as Linux tells them; else what Python knows, and none."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields.get("model name") or platform.processor() or platform.machine(), set(fields.get("flags", "").split())


def memory() -> tuple[int, int]:
    """Bytes that are free, and bytes that this process may use."""
    import psutil  # type: ignore[import-untyped]
    from distributed.system import MEMORY_LIMIT

    return min(psutil.virtual_memory().available, MEMORY_LIMIT), MEMORY_LIMIT


def _memory() -> Iterator[Check]:
    free, most = memory()
    told = f"{free / GIB:.1f} GiB free, of {most / GIB:.1f} GiB that may be used"
    if free < LEAST_MEMORY:
        yield Check("memory", "warning", told, "run one process with few threads, or free some")
    else:
        yield Check("memory", "ok", told)


def _gpus() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Check("GPU", "ok", f"{', '.join(names)}: infer --gpus {len(names)}, train --gpus {len(names)}")
    elif Path("/dev/nvidiactl").exists():
        advice = "its driver may be too old for this torch, or CUDA_VISIBLE_DEVICES hides it"
        yield Check("GPU", "warning", f"there is one, and torch {torch.__version__} does not see it", advice)
    else:
        yield Check("GPU", "ok", "none; everything runs on the CPU")


def _disks(address: str) -> Iterator[Check]:
    places = [("temporary files", Path(tempfile.gettempdir()), LEAST_TEMPORARY, "set TMPDIR to a larger disk")]
    if not is_url(address):
        places.insert(
            0, ("store's disk", Path(address), LEAST_STORE, "free some, or put the store elsewhere (--store)")
        )
    for name, path, least, advice in places:
        path = standing(path)
        free = shutil.disk_usage(path).free
        told = f"{free / GIB:,.1f} GiB free at {path}"
        if not os.access(path, os.W_OK):
            yield Check(name, "fault", f"{path} may not be written", "check the rights")
        elif free < least:
            yield Check(name, "warning", told, advice)
        else:
            yield Check(name, "ok", told)


def _slides() -> Iterator[Check]:
    """Each reader and codec, tried on a slide of known pixels."""
    pixels = _pixels()
    with tempfile.TemporaryDirectory(prefix="wsi-idc-doctor-") as folder:
        for name, reader, make in _KINDS:
            try:
                yield _tried(name, make(Path(folder), name, pixels), reader, pixels)
            except Exception as error:
                yield _broken(name, error, "such slides cannot be read here: install from the requirements.lock")


def _tried(name: str, path: Path, reader: "Reader", pixels: "NDArray[np.uint8]") -> Check:
    import numpy as np

    from wsi_idc.slides import open_slide
    from wsi_idc.units import LevelPx, Mpp

    zero, side = LevelPx(0), LevelPx(_SIDE)
    with open_slide(path, Mpp(4.0), reader) as slide:
        found = slide.read(0, zero, zero, side, side)
        by = slide.description.reader
    off = float(np.abs(found.astype(int) - pixels).mean())
    if off > _LOSS:
        advice = "such slides are read wrongly here: install from the requirements.lock"
        return Check(name, "fault", f"{by} gives other pixels ({off:.1f} grey levels off)", advice)
    return Check(name, "ok", f"read by {by}")


_LOSS = 3.0
"""Grey levels that a lossy codec may be off in the mean, on pixels as smooth as `_pixels`."""


def _pixels() -> "NDArray[np.uint8]":
    """A smooth picture, so that lossy codecs keep it: uint8 (256, 256, 3)."""
    import numpy as np

    y, x = np.mgrid[:_SIDE, :_SIDE]
    return np.stack([x // 2 + 100, 200 - y // 2, (x + y) // 4 + 60], -1).astype(np.uint8)


def _tiff(compression: str) -> Callable[[Path, str, "NDArray[np.uint8]"], Path]:
    def make(folder: Path, name: str, pixels: "NDArray[np.uint8]") -> Path:
        import tifffile

        path = folder / f"{name}.tif"
        tifffile.imwrite(path, pixels, photometric="rgb", tile=(128, 128), compression=compression, metadata=None)
        return path

    return make


def _picture(suffix: str) -> Callable[[Path, str, "NDArray[np.uint8]"], Path]:
    def make(folder: Path, name: str, pixels: "NDArray[np.uint8]") -> Path:
        from PIL import Image

        path = folder / f"picture{suffix}"
        Image.fromarray(pixels).save(path)
        return path

    return make


def _ngff(folder: Path, name: str, pixels: "NDArray[np.uint8]") -> Path:
    import zarr

    path = folder / "image.zarr"
    scale = {"type": "scale", "scale": [1.0, 4.0, 4.0]}
    axes = [{"name": axis, "type": "channel" if axis == "c" else "space"} for axis in "cyx"]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": [scale]}]}
    group = zarr.create_group(path, attributes={"ome": {"version": "0.5", "multiscales": [image]}})
    group.create_array("0", data=pixels.transpose(2, 0, 1), chunks=(3, 128, 128))
    return path


def _dicom(folder: Path, name: str, pixels: "NDArray[np.uint8]") -> Path:
    """A folder with one level of a DICOM slide: what VL Whole Slide Microscopy needs for both readers, and no more."""
    from PIL import Image
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

    frames = []
    for y in range(0, _SIDE, 128):
        for x in range(0, _SIDE, 128):
            stream = io.BytesIO()
            Image.fromarray(pixels[y : y + 128, x : x + 128]).save(stream, "JPEG", quality=95, subsampling="4:2:2")
            frames.append(stream.getvalue())

    def item(**values: Any) -> Dataset:
        dataset = Dataset()
        for key, value in values.items():
            setattr(dataset, key, value)
        return dataset

    kind = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    light = item(CodeValue="111744", CodingSchemeDesignator="DCM", CodeMeaning="Brightfield illumination")
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.004, 0.004], SliceThickness=0.001)],
        WholeSlideMicroscopyImageFrameTypeSequence=[item(FrameType=kind)],
    )
    slide = item(
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        SOPInstanceUID=generate_uid(),
        StudyInstanceUID=generate_uid(),
        SeriesInstanceUID=generate_uid(),
        FrameOfReferenceUID=generate_uid(),
        Modality="SM",
        Manufacturer="wsi-idc",
        ImageType=kind,
        InstanceNumber=1,
        Rows=128,
        Columns=128,
        TotalPixelMatrixRows=_SIDE,
        TotalPixelMatrixColumns=_SIDE,
        TotalPixelMatrixFocalPlanes=1,
        TotalPixelMatrixOriginSequence=[item(XOffsetInSlideCoordinateSystem=0, YOffsetInSlideCoordinateSystem=0)],
        ImageOrientationSlide=[0, -1, 0, -1, 0, 0],
        ImagedVolumeWidth=_SIDE * 0.004,
        ImagedVolumeHeight=_SIDE * 0.004,
        ImagedVolumeDepth=0.001,
        NumberOfFrames=len(frames),
        SamplesPerPixel=3,
        PhotometricInterpretation="YBR_FULL_422",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        DimensionOrganizationType="TILED_FULL",
        NumberOfOpticalPaths=1,
        OpticalPathSequence=[item(OpticalPathIdentifier="1", IlluminationTypeCodeSequence=[light])],
        SharedFunctionalGroupsSequence=[shared],
        FocusMethod="AUTO",
        ExtendedDepthOfField="NO",
        SpecimenLabelInImage="NO",
        BurnedInAnnotation="NO",
        ContainerIdentifier="doctor",
        LossyImageCompression="01",
        PixelData=encapsulate(frames),
    )
    slide["PixelData"].is_undefined_length = True
    slide.file_meta = FileMetaDataset()
    slide.file_meta.MediaStorageSOPClassUID = slide.SOPClassUID
    slide.file_meta.MediaStorageSOPInstanceUID = slide.SOPInstanceUID
    slide.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    path = folder / "dicom"
    path.mkdir(exist_ok=True)
    slide.save_as(path / "level.dcm", enforce_file_format=True)
    return path


_KINDS: list[tuple[str, "Reader", Callable[[Path, str, "NDArray[np.uint8]"], Path]]] = [
    ("TIFF with JPEG", "openslide", _tiff("jpeg")),
    ("TIFF with deflate", "openslide", _tiff("adobe_deflate")),
    ("TIFF with LZW", "openslide", _tiff("lzw")),
    ("TIFF with JPEG by tiatoolbox", "tiatoolbox", _tiff("jpeg")),
    ("TIFF with JPEG 2000", "auto", _tiff("jpeg2000")),
    ("TIFF with WebP", "auto", _tiff("webp")),
    ("DICOM", "openslide", _dicom),
    ("DICOM by tiatoolbox", "tiatoolbox", _dicom),
    ("OME-NGFF", "auto", _ngff),
    ("PNG", "auto", _picture(".png")),
    ("JPEG", "auto", _picture(".jpg")),
    ("JPEG 2000", "auto", _picture(".jp2")),
]
"""What is tried, by which reader, and what makes it."""


def _zarr() -> Iterator[Check]:
    """A store of its own, written and read."""
    import numpy as np

    from wsi_idc.store import hold_store

    values = np.arange(3 * 8 * 8, dtype=np.float32).reshape(3, 64)
    with tempfile.TemporaryDirectory(prefix="wsi-idc-doctor-") as folder, hold_store(folder, create=True) as store:
        node = store.slide_node("x")
        node.begin()
        checksum = node.put("values", values, ("y", "x"))
        node.read("values", checksum)
    yield Check("Zarr", "ok", "a store is written, locked and read in the folder for temporary files")


def _model() -> Iterator[Check]:
    import numpy as np

    from wsi_idc.model.bundle import SHIPPED, read_bundle
    from wsi_idc.model.check import known_answers
    from wsi_idc.model.known import made_tiles
    from wsi_idc.model.runtime import load_runtime

    bundle = read_bundle(SHIPPED)
    form, tiles = bundle.form("auto"), made_tiles(bundle.fields.tile.size_px)
    found, known = load_runtime(bundle, form, 1).predict(tiles), known_answers(bundle, tiles)
    name = f"model {bundle.fields.name}"
    if known is None:
        yield Check(name, "fault", "it has no known answers to these tiles", "reinstall wsi-idc: its model is another")
        return
    off = float(np.abs(found - known).max())
    told = f"{form.engine}, {form.precision}: at most {off:.2g} off its known answers to {len(tiles)} made tiles"
    if off <= _TOLERANCE:
        yield Check(name, "ok", told)
    else:
        advice = "do not use its maps: try infer --precision float32, and report this processor"
        yield Check(name, "fault", f"{told}; {_TOLERANCE:g} is allowed", advice)


def _store(address: str) -> Iterator[Check]:
    from wsi_idc.store import at_once, find_store, open_store

    name = f"store {address}"
    try:
        if find_store(address) is None:
            yield Check(name, "ok", "there is none yet; wsi-idc extract makes it")
            return
        store = open_store(address)
    except WsiIdcError as error:
        yield Check(name, "fault", error.problem, error.advice)
        return
    faulty = store.faulty_documents()
    for key, problem in faulty.items():
        yield Check(name, "fault", f"{key}: {problem}", "run wsi-idc verify --repair")
    slides, models = store.all_slide_ids(), store.models()
    some = slides[:: max(1, -(-len(slides) // _RECORDS))]
    records = at_once(lambda slide: store.slide_node(slide).record(), some)
    damaged = [slide for slide, record in zip(some, records, strict=True) if record.damage]
    failed = sum(record.failed is not None for record in records)
    whole = sum(record.usable for record in records)
    of = "" if len(some) == len(slides) else f", of {len(some):,} that were looked at"
    told = (
        f"{len(slides):,} slides, maps by {', '.join(models) or 'no model'}; {whole:,} extracted, {failed:,} failed{of}"
    )
    if damaged:
        advice = "run wsi-idc verify --repair, then extract"
        yield Check(name, "fault", f"{told}; damaged records: {', '.join(damaged[:3])}", advice)
    elif failed:
        yield Check(name, "warning", told, "wsi-idc status says why")
    elif not faulty:
        yield Check(name, "ok", f"{told}; wsi-idc verify reads all of it")
    holding = store.holding
    if holding is None:
        yield Check("lease", "ok", "no run holds the store")
    elif holding.alive:
        yield Check("lease", "ok", f"a run holds the store ({holding}): {holding.how}")
    elif holding.alive is None:
        advice = "if that run is gone, nothing is to be done: the next one asks for the lock itself"
        yield Check("lease", "warning", f"a run holds the store ({holding}), or was killed: {holding.how}", advice)
    else:
        yield Check("lease", "ok", f"left by a run that was killed ({holding}): {holding.how}; the next run takes it")
