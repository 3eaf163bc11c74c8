"""The model bundle: a folder with `bundle.json` and the graph; a model is a function from uint8 tiles to probabilities.

bundle/
  bundle.json          the fields of `Bundle`
  model.onnx           tiles uint8 (n, size, size, 3) RGB -> probability float32 (n,), that of the second of two
                       classes, or (n, k), one a class; optional beside weights
  model.int8.onnx      the same, quantised; optional
  model.safetensors    weights, for torch: on CUDA, and for float32 where there is no model.onnx; optional

Each way in which a bundle runs is a `Form`; forms differ in the last digits of a probability, or in more.
"""

import json
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from wsi_idc.digests import file_digest
from wsi_idc.errors import ModelError, system_reason
from wsi_idc.model.config import Context, Known
from wsi_idc.names import check_slide_id
from wsi_idc.settings import Precision, TileSpec
from wsi_idc.units import MPP_RANGE, Mpp, TilePx

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHIPPED = Path(__file__).parent.parent / "models" / "idc-resnet50"
"""The bundle that comes with the package."""
MPP_TOLERANCE = 0.10
"""A store whose um/px differs from the bundle's by more than this part is refused."""
PATIENT_LISTS = ("train_patients", "val_patients", "held_out_patients")
"""The fields of `training` that say who must not be judged, or whose figures flatter."""
_MAX_JSON_BYTES = 16 * 2**20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class BundleTile(_Part):
    """The tiles that the model was trained on."""

    size_px: Annotated[TilePx, Field(ge=8, le=4096)]
    mpp: Annotated[Mpp, Field(ge=MPP_RANGE[0], le=MPP_RANGE[1])]


class BundleGraph(_Part):
    """The ONNX graphs, and the names of their input and output."""

    file: str = "model.onnx"
    int8: str | None = None
    input: str = "tiles"
    output: str = "probability"

    @field_validator("file", "int8")
    @classmethod
    def _beside(cls, value: str | None) -> str | None:
        if value is not None and (Path(value).name != value or not value):
            raise ValueError("must be a file's name, without folders")
        return value


class Bundle(_Part):
    """The contents of `bundle.json`; fields not named here are kept.

    Attributes:
        classes: what the probabilities are of, in the order of the graph's output.
        positive: the class whose probability is thresholded and evaluated. Of two classes the second where it is not
            given; of more there is then none, and no threshold either: such a model has maps, and no operating point.
        threshold: from which P(positive) of a tile alone is positive; refused where no class is.
        context: how neighbours take part in the probability; only for two classes.
        training: who trained it on what; lists of patients are lists of text, whatever they were written as.
        known: its answers to the made tiles, for `wsi-idc model check`.
        licence: under which others may use it, where that is known.
    """

    format: Literal["wsi-idc-model/1"]
    name: str
    title: str = ""
    classes: Annotated[tuple[str, ...], Field(min_length=2)] = ("non-IDC", "IDC")
    positive: str | None = None
    tile: BundleTile
    graph: BundleGraph = BundleGraph()
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    context: Context | None = None
    network: dict[str, Any] | None = None
    training: dict[str, Any] = {}
    known: Known | None = None
    licence: str | None = None

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if fault := check_slide_id(value):
            raise ValueError(fault)
        return value

    @field_validator("classes")
    @classmethod
    def _are_told_apart(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(name.strip() for name in value):
            raise ValueError("a class has no name")
        if len(set(value)) < len(value):
            raise ValueError("two classes have one name")
        return value

    @field_validator("positive")
    @classmethod
    def _is_a_class(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value not in info.data.get("classes", (value,)):
            raise ValueError(f"{value!r} is none of the classes")
        return value

    @field_validator("threshold")
    @classmethod
    def _is_of_a_class(cls, value: float, info: ValidationInfo) -> float:
        if len(info.data.get("classes", ())) > 2 and info.data.get("positive") is None:
            raise ValueError("of which class it is must be said by positive, where there are more than two")
        return value

    @field_validator("context")
    @classmethod
    def _of_two_classes(cls, value: Context | None, info: ValidationInfo) -> Context | None:
        if value is not None and len(info.data.get("classes", ())) > 2:
            raise ValueError("is only for bundles of two classes")
        return value

    @field_validator("training")
    @classmethod
    def _patients_are_text(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Ids are compared as text; 8863 and "8863" must be one patient, or a model is judged on whom it has seen."""
        lists = {name: value[name] for name in PATIENT_LISTS if name in value}
        for name, patients in lists.items():
            ids = patients if isinstance(patients, list) else [None]
            if any(isinstance(patient, bool) or not isinstance(patient, str | int) for patient in ids):
                raise PydanticCustomError("patients", "is not a list of patient ids", {"within": [name]})
        return value | {name: [str(patient) for patient in patients] for name, patients in lists.items()}

    def patients(self, name: str) -> set[str]:
        """The patients of one of `PATIENT_LISTS`, as text: "007" is another one than 7; none where there is no list."""
        return set(self.training.get(name, []))

    @property
    def positive_index(self) -> int | None:
        """The place of the positive class in `classes`; None where there is none."""
        if self.positive is not None:
            return self.classes.index(self.positive)
        return 1 if len(self.classes) == 2 else None

    @property
    def operating_point(self) -> float | None:
        """The threshold of P(positive) that `infer` writes, a tile's neighbours counted; None where no class is it."""
        if self.positive_index is None:
            return None
        return self.context.threshold if self.context else self.threshold

    def positive_of(self, probability: "NDArray[np.float32]") -> "NDArray[np.float32]":
        """P(positive): float32 (n,).

        Args:
            probability: as the model gives it: float32 (n,) of the second class, or (n, k).

        Raises:
            ModelError: of more than two classes, none is positive.
        """
        index = self.positive_index
        if index is None:
            problem = f"positive: says not which of {len(self.classes)} classes is thresholded and evaluated"
            raise ModelError(self.name, problem, "add positive and threshold to its bundle.json")
        return of_class(probability, index)


def of_class(probability: "NDArray[np.float32]", index: int) -> "NDArray[np.float32]":
    """The probability of one class: float32 (n,).

    Args:
        probability: as a model gives it: float32 (n,) of the second of two classes, or (n, k).
        index: the class's place.
    """
    if probability.ndim == 2:
        return probability[:, index]
    return probability if index == 1 else 1 - probability


@dataclass(frozen=True)
class Form:
    """One way in which a bundle runs.

    Attributes:
        file: the graph or the weights, by its name in the bundle's folder.
        digest: of that file.
        engine: what runs it.
        precision: of its arithmetic.
        device: where it runs.
    """

    file: str
    digest: str
    engine: Literal["openvino", "torch"]
    precision: Literal["int8", "float32", "float16"]
    device: Literal["cpu", "cuda"]


class LoadedBundle:
    """A bundle on disk, its fields checked.

    Attributes:
        folder: where it is.
        fields: the contents of `bundle.json`.
    """

    def __init__(self, folder: Path, fields: Bundle) -> None:
        self.folder, self.fields = folder, fields

    @property
    def weights(self) -> Path:
        """The weights for torch; may be absent."""
        return self.folder / "model.safetensors"

    def form(self, precision: Precision, *, cuda: bool = False) -> Form:
        """How the model runs: from a graph, or from the weights on CUDA and where there is no float32 graph.

        Args:
            precision: "auto" is int8 on the CPU where the bundle has it, and float16 on CUDA.
            cuda: on a GPU.

        Raises:
            ModelError: the bundle has no such form, or its file cannot be read.
        """
        graph = self.fields.graph
        if cuda:
            if len(self.fields.classes) != 2:
                problem = f"classes: {len(self.fields.classes)} are named, a network in torch tells two apart"
                raise ModelError(self.folder, problem, "leave --gpus out: the graph runs on the CPU")
            if not self._has_network:
                problem = "network and model.safetensors are needed on a GPU"
                raise ModelError(self.folder, problem, "leave --gpus out, or train anew")
            if precision == "int8":
                raise ModelError(self.folder, "no bundle runs as int8 on a GPU", "leave --precision or --gpus out")
            half = precision == "auto"
            return Form(
                self.weights.name, self._digest(self.weights), "torch", "float16" if half else "float32", "cuda"
            )
        if precision == "int8" and graph.int8 is None:
            raise ModelError(self.folder, "graph.int8: the bundle has no int8 graph", "use --precision float32")
        int8 = graph.int8 if precision != "float32" else None
        path = self.folder / (int8 or graph.file)
        if not int8 and not path.is_file() and (weights := self.weights_form()):
            return weights
        if not path.is_file():
            raise ModelError(self.folder, f"graph: {path.name} is missing", "the bundle is not whole: copy it again")
        return Form(path.name, self._digest(path), "openvino", "int8" if int8 else "float32", "cpu")

    def weights_form(self) -> Form | None:
        """The weights by torch on the CPU; None where the bundle has no network with weights.

        Raises:
            ModelError: they cannot be read.
        """
        if not self._has_network:
            return None
        return Form(self.weights.name, self._digest(self.weights), "torch", "float32", "cpu")

    def forms(self) -> list[Form]:
        """Every form in which the bundle, as it is on disk, can run."""
        ways: list[tuple[Precision, bool]] = [("int8", False), ("float32", False), ("auto", True), ("float32", True)]
        forms = []
        for precision, cuda in ways:
            with suppress(ModelError):
                forms.append(self.form(precision, cuda=cuda))
        return forms

    def digests(self) -> set[str]:
        """The digests of all model files: two bundles of one name are told apart by them."""
        return {digest for _, digest in self.files()}

    def files(self) -> list[tuple[Path, str]]:
        """The model files that are there, and their digests."""
        return [(path, self._digest(path)) for path in self._files()]

    def made_from(self, form: Form) -> dict[str, Any]:
        """What a map's numbers and their reading depend on besides the tiles, by the names that a user is told."""
        fields = self.fields
        index = fields.positive_index
        return {
            "model": form.digest,
            "engine": form.engine,
            "precision": form.precision,
            "device": form.device,
            "output": fields.graph.output,
            "classes": list(fields.classes),
            "positive class": None if index is None else fields.classes[index],
            "threshold": fields.operating_point,
            "context": fields.context.model_dump() if fields.context else None,
        }

    def needs(self) -> list[dict[str, Any]]:
        """`made_from` of each of its forms: a map by any of them is current (`StoredMap.state`)."""
        return [self.made_from(form) for form in self.forms()]

    def check_digest(self, form: Form) -> None:
        """Refuse a file that is no longer the one that was chosen: a map would say that it is by another.

        Raises:
            ModelError: it changed, or cannot be read.
        """
        if self._digest(self.folder / form.file) != form.digest:
            raise ModelError(self.folder, f"{form.file} changed since the run began", "run the same command again")

    def _files(self) -> Iterator[Path]:
        graph = self.fields.graph
        for path in (self.folder / name for name in (graph.file, graph.int8, self.weights.name) if name):
            if path.is_file():
                yield path

    def _digest(self, path: Path) -> str:
        try:
            status = path.stat()
            return _digest_of(path, status.st_mtime_ns, status.st_size)
        except OSError as error:
            raise ModelError(self.folder, f"cannot be read: {system_reason(error)}", "copy the bundle again") from error

    @property
    def _has_network(self) -> bool:
        """Whether torch can run it: the networks have one logit, so of two classes only."""
        return len(self.fields.classes) == 2 and self.fields.network is not None and self.weights.is_file()

    def check_fits(self, spec: TileSpec) -> None:
        """Refuse tiles that the model was not made for.

        Raises:
            ModelError: another size, or um/px further off than a tenth.
        """
        tile = self.fields.tile
        advice = f"extract with --tile-size {tile.size_px} --mpp {tile.mpp:g}"
        if spec.size_px != tile.size_px:
            raise ModelError(
                self.fields.name, f"tile.size_px is {tile.size_px}, the store's tiles have {spec.size_px}", advice
            )
        if abs(spec.mpp / tile.mpp - 1) > MPP_TOLERANCE:
            raise ModelError(
                self.fields.name, f"tile.mpp is {tile.mpp:g} um/px, the store's tiles have {spec.mpp:g}", advice
            )


@lru_cache(maxsize=64)
def _digest_of(path: Path, mtime_ns: int, size: int) -> str:
    """The digest of a file, read once a process as long as its time and size stay: forms are compared often."""
    return file_digest(path)


def read_bundle(folder: Path) -> LoadedBundle:
    """A bundle, its fields checked; the graph is checked when it is loaded.

    Raises:
        ModelError: names the field that is wrong.
    """
    folder = Path(folder)
    fields = read_fields(
        folder, "bundle.json", "give the folder of a model bundle with --model", "copy the bundle again"
    )
    try:
        return LoadedBundle(folder, Bundle.model_validate(fields))
    except ValidationError as error:
        problem = first_fault(error)
        raise ModelError(folder / "bundle.json", problem, f"found {error.error_count()} such fault(s)") from error


def first_fault(error: ValidationError) -> str:
    """The first of the fields that are wrong, and why: `field: problem`."""
    first = error.errors()[0]
    name = ".".join(map(str, (*first["loc"], *first.get("ctx", {}).get("within", ()))))
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: missing" if first["type"] == "missing" else f"{name}: {message[0].lower()}{message[1:]}"


def read_fields(folder: Path, name: str, where: str, again: str) -> dict[str, Any]:
    """The fields of a JSON file that belongs to a model: other people's text, of any size and depth.

    Args:
        folder: where the file is.
        name: the file's.
        where: the advice where there is none.
        again: the advice where it is damaged.

    Raises:
        ModelError: it is absent, no file, too large, or no JSON object.
    """
    file = folder / name
    try:
        contents = json.loads(_read_text(folder, file, where, again))
    except ValueError as error:
        raise ModelError(file, f"not JSON ({error})", again) from error
    except RecursionError as error:
        raise ModelError(file, "nested too deep", again) from error
    if not isinstance(contents, dict):
        raise ModelError(file, "holds no fields: it must be an object, in {}", again)
    return contents


def _read_text(folder: Path, file: Path, where: str, again: str) -> str:
    """The text of a JSON file.

    Raises:
        ModelError: there is none that can be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            # Opening a pipe that nobody writes to would wait for ever.
            raise ModelError(file, "is not a file", where)
        with file.open("rb") as stream:
            data = stream.read(_MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(folder, f"no {file.name} there", where) from error
    except (OSError, ValueError) as error:
        reason = system_reason(error) if isinstance(error, OSError) else str(error)
        raise ModelError(folder, f"cannot be read: {reason}", where) from error
    if len(data) > _MAX_JSON_BYTES:
        raise ModelError(file, f"is larger than {_MAX_JSON_BYTES >> 20} MiB", again)
    return data.decode("utf-8-sig")
