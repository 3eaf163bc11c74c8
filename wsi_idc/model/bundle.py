"""The model bundle: a folder with `bundle.json` and the graph; a model is a function from uint8 tiles to probabilities.

bundle/
  bundle.json          the fields of `Bundle`
  model.onnx           tiles uint8 (n, size, size, 3) RGB -> probability float32 (n,); optional beside weights
  model.int8.onnx      the same, quantised; optional
  model.safetensors    weights, for torch: on CUDA, and for float32 where there is no model.onnx; optional
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from wsi_idc.digests import file_digest
from wsi_idc.errors import ModelError
from wsi_idc.model.config import Context
from wsi_idc.names import check_slide_id
from wsi_idc.settings import Precision, TileSpec
from wsi_idc.units import MPP_RANGE

SHIPPED = Path(__file__).parent.parent / "models" / "idc-resnet50"
"""The bundle that comes with the package."""
MPP_TOLERANCE = 0.10
"""A store whose um/px differs from the bundle's by more than this part is refused."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class BundleTile(_Part):
    """The tiles that the model was trained on."""

    size_px: Annotated[int, Field(ge=8, le=4096)]
    mpp: Annotated[float, Field(ge=MPP_RANGE[0], le=MPP_RANGE[1])]


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
    """The contents of `bundle.json`; fields not named here are kept."""

    format: Literal["wsi-idc-model/1"]
    name: str
    title: str = ""
    classes: tuple[str, str] = ("non-IDC", "IDC")
    tile: BundleTile
    graph: BundleGraph = BundleGraph()
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    context: Context | None = None
    network: dict[str, Any] | None = None
    training: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if fault := check_slide_id(value):
            raise ValueError(fault)
        return value

    @property
    def operating_point(self) -> float:
        """The threshold of the probabilities that `infer` writes; `threshold` is that of a tile alone."""
        return self.context.threshold if self.context else self.threshold

    def positive_of(self, probability: Any) -> Any:
        """Placeholder until bundles of several classes are merged."""
        return probability


@dataclass(frozen=True)
class Form:
    """One way in which a bundle runs.

    Attributes:
        file: what it runs from.
        digest: of that file.
        engine: the package that runs it.
        precision: of its arithmetic.
    """

    file: str
    digest: str
    engine: str
    precision: str


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
            precision: on the CPU; "auto" is int8 where the bundle has it.
            cuda: on a GPU.

        Raises:
            ModelError: the bundle has no such file.
        """
        graph = self.fields.graph
        if cuda:
            if not self._has_network:
                problem = "network and model.safetensors are needed on a GPU"
                raise ModelError(self.folder, problem, "leave --gpus out, or train anew")
            return self._form(self.weights.name, "torch", "float16")
        if precision == "int8" and graph.int8 is None:
            raise ModelError(self.folder, "graph.int8: the bundle has no int8 graph", "use --precision float32")
        int8 = graph.int8 is not None and precision != "float32"
        name = graph.int8 if graph.int8 and int8 else graph.file
        path = self.folder / name
        if not int8 and not path.is_file() and self._has_network:
            return self._form(self.weights.name, "torch", "float32")
        if not path.is_file():
            raise ModelError(self.folder, f"graph: {name} is missing", "the bundle is not whole: copy it again")
        return self._form(name, "onnxruntime", "int8" if int8 else "float32")

    def _form(self, name: str, engine: str, precision: str) -> Form:
        return Form(name, file_digest(self.folder / name), engine, precision)

    def forms(self) -> list[Form]:
        """Every form that the bundle can run in."""
        found = []
        ways: tuple[tuple[Precision, bool], ...] = (("int8", False), ("float32", False), ("auto", True))
        for precision, cuda in ways:
            with contextlib.suppress(ModelError):
                found.append(self.form(precision, cuda=cuda))
        return found

    def digests(self) -> set[str]:
        """Of every file that it runs from: two bundles of one name are told apart by them."""
        return {form.digest for form in self.forms()}

    def made_from(self, form: Form) -> dict[str, Any]:
        """What a map by that form depends on besides the tiles, by the names that a user is told."""
        fields = self.fields
        return {
            "model": form.digest,
            "engine": form.engine,
            "precision": form.precision,
            "output": fields.graph.output,
            "classes": list(fields.classes),
            "threshold": fields.operating_point,
            "context": fields.context.model_dump() if fields.context else None,
        }

    @property
    def _has_network(self) -> bool:
        return self.fields.network is not None and self.weights.is_file()

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


def read_bundle(folder: Path) -> LoadedBundle:
    """A bundle, its fields checked; the graph is checked when it is loaded.

    Raises:
        ModelError: names the field that is wrong.
    """
    folder = Path(folder)
    file = folder / "bundle.json"
    if not folder.is_dir() or not file.is_file():
        raise ModelError(folder, "no bundle.json there", "give the folder of a model bundle with --model")
    try:
        fields = Bundle.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(file, f"not JSON ({error})", "copy the bundle again") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "bundle.json"
        message = first["msg"].removeprefix("Value error, ")
        missing = first["type"] == "missing"
        problem = f"{name}: missing" if missing else f"{name}: {message[0].lower()}{message[1:]}"
        raise ModelError(file, problem, f"found {len(error.errors())} such fault(s)") from error
    return LoadedBundle(folder, fields)
