"""What other programs' models are: read with care, and asked what they answer.

A WSInfer folder, weights of timm's architectures, an ONNX graph: each becomes a `ForeignModel`. Nothing is unpickled.
"""

import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from wsi_idc.errors import ModelError, UsageError
from wsi_idc.model.bundle import first_fault, read_fields
from wsi_idc.model.graphs import Activation, Channels, Layout, Preparation, output_of, port_of, read_graph, run_graph
from wsi_idc.model.wsinfer import CONFIG, SCRIPT, WEIGHTS, WSInferConfig
from wsi_idc.units import MPP_RANGE

if TYPE_CHECKING:
    from torch import nn

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".h5", ".keras")
_CODE_BYTES = 64 * 2**20
"""What compressed code in a TorchScript file may grow by; weights are stored as they are."""


@dataclass(frozen=True)
class ImportOptions:
    """What the source does not say of itself; None is not said.

    Attributes:
        name: of the bundle.
        title: for people.
        licence: under which others may use it.
        architecture: a name of timm, for weights.
        classes: names, in the order of the model's output.
        positive: the class that is thresholded and evaluated.
        threshold: of its probability.
        tile_px: side of the tiles.
        mpp: their um/px.
        resize_px: side that the network sees.
        channels: rgb or bgr.
        white: what 255 becomes before the mean is subtracted: 1 or 255.
        mean: of each channel.
        std: of each channel.
        layout: of an ONNX graph's input.
        output: what its numbers are: logits of one class or of several independent ones (sigmoid), of classes that
            exclude each other (softmax), or probabilities (none).
        output_name: which output of an ONNX graph, where it has several.
        trust: run TorchScript, which is code.
    """

    name: str | None = None
    title: str | None = None
    licence: str | None = None
    architecture: str | None = None
    classes: tuple[str, ...] | None = None
    positive: str | None = None
    threshold: float | None = None
    tile_px: int | None = None
    mpp: float | None = None
    resize_px: int | None = None
    channels: Channels | None = None
    white: Literal[1, 255] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    layout: Layout | None = None
    output: Activation | None = None
    output_name: str | None = None
    trust: bool = False


@dataclass(frozen=True)
class ForeignModel:
    """A model as it came: what it answers to pictures, and its graph.

    Attributes:
        path: what the user named.
        raw: its answer to prepared pictures: (n, ...) numbers.
        graph: its ONNX graph.
        preparation: what it wants done to tiles.
        mpp: of the tiles.
        classes: names; one where it has one output.
        about: where it came from, for the card.
        output_name: which output of the graph.
    """

    path: Path
    raw: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    graph: Any
    preparation: Preparation
    mpp: float
    classes: tuple[str, ...]
    about: Mapping[str, Any]
    output_name: str | None = None


def reader_of(source: Path) -> Callable[[Path, ImportOptions], ForeignModel]:
    """What reads a source of this kind.

    Raises:
        ModelError: nothing does.
    """
    kinds = "give a WSInfer folder (config.json), a .safetensors file or an .onnx file"
    if source.is_dir():
        if (source / "bundle.json").is_file():
            raise ModelError(source, "is a bundle already", "use it with --model")
        return _read_wsinfer
    suffix = source.suffix.lower()
    if not source.exists():
        raise ModelError(source, "no such file or folder", kinds)
    if suffix in PICKLES:
        problem = f"a {suffix} file can hold code that runs when it is opened"
        raise ModelError(
            source, problem, "save its weights as safetensors; TorchScript: as a WSInfer folder, with --trust"
        )
    readers = {".onnx": _read_onnx, ".safetensors": _read_safetensors}
    if suffix not in readers:
        raise ModelError(source, "is of no kind that can be imported", kinds)
    return readers[suffix]


def _read_wsinfer(folder: Path, options: ImportOptions) -> ForeignModel:
    """A folder of WSInfer's zoo: safetensors where timm knows the architecture, else TorchScript, if it is trusted."""
    file = folder / CONFIG
    fields = read_fields(folder, CONFIG, "give a WSInfer folder, a .safetensors file or an .onnx file", "copy it again")
    said = ("architecture", "classes", "tile_px", "mpp", "resize_px", "channels", "white", "mean", "std", "layout")
    for name in said:
        if getattr(options, name) is not None:
            raise UsageError(_option(name), f"{CONFIG} says it", "leave it out, or correct it there")
    try:
        config = WSInferConfig.model_validate(fields)
    except ValidationError as error:
        raise ModelError(file, first_fault(error).removeprefix(": "), "see the schema of WSInfer's zoo") from error
    try:
        preparation = config.preparation()
    except ValueError as error:
        raise ModelError(file, f"transform: {error}", "see the schema of WSInfer's zoo") from error
    about = {"from": "WSInfer folder", "architecture": config.architecture}
    weights, scripts = folder / WEIGHTS, sorted(folder.glob("*.pt"))
    if weights.is_file() and _is_known(config.architecture):
        network = _network(config.architecture, weights, config.num_classes)
        return _traced(network, weights, preparation, config.spacing_um_px, config.class_names, about)
    if not scripts:
        known = "" if _is_known(config.architecture) else f", and timm knows no {config.architecture[:60]!r}"
        raise ModelError(folder, f"has no {WEIGHTS if not known else SCRIPT}{known}", "copy the folder again")
    if len(scripts) > 1:
        raise ModelError(folder, f"has several .pt files: {', '.join(p.name for p in scripts[:4])}", "leave one there")
    if not options.trust:
        why = f"no {WEIGHTS}" if not weights.is_file() else f"timm knows no {config.architecture[:60]!r}"
        problem = f"only {scripts[0].name} can be used ({why}), and TorchScript is code that would run here"
        raise ModelError(folder, problem, "add --trust if you trust who made it")
    script = _torchscript(scripts[0])
    return _traced(script, scripts[0], preparation, config.spacing_um_px, config.class_names, about)


def _read_safetensors(file: Path, options: ImportOptions) -> ForeignModel:
    """Weights of one of timm's architectures, torchvision's ResNets among them."""
    for name in ("layout", "output_name"):
        if getattr(options, name) is not None:
            raise UsageError(_option(name), "is for ONNX graphs", "leave it out")
    if options.architecture is None:
        raise UsageError("--architecture", "is needed for weights", "give a name of timm, such as resnet50")
    stated = _stated(options)
    if not _is_known(options.architecture):
        raise UsageError("--architecture", f"timm knows no {options.architecture!r}", "give a name such as resnet50")
    network = _network(options.architecture, file, None)
    about = {"from": "safetensors", "architecture": options.architecture}
    return _traced(network, file, stated.preparation, stated.mpp, stated.classes, about)


def _read_onnx(file: Path, options: ImportOptions) -> ForeignModel:
    """Any ONNX graph that takes pictures."""
    if options.architecture is not None:
        raise UsageError("--architecture", "is for weights: a graph has its own", "leave it out")
    graph = read_graph(file)
    port = port_of(graph, file)
    output_of(graph, file, options.output_name)
    layout = options.layout or port.layout
    if layout is None:
        shape = " x ".join("n" if side is None else str(side) for side in port.sides)
        raise UsageError("--layout", f"is needed: the graph's input is {shape}", "give nchw or nhwc")
    if options.layout is not None and port.layout not in (None, options.layout):
        raise UsageError("--layout", f"the graph's input is {port.layout}", "leave it out")
    integral = port.kind == _UINT8
    if integral:
        for name in ("mean", "std", "white"):
            if getattr(options, name) is not None:
                raise UsageError(_option(name), "the graph takes uint8", "leave it out")
        options = replace(options, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), white=255)
    stated = _stated(options)
    preparation = replace(stated.preparation, layout=layout)
    height, width = port.sides[2:] if layout == "nchw" else port.sides[1:3]
    channels = port.sides[1 if layout == "nchw" else 3]
    for side, wanted in ((height, preparation.input_px), (width, preparation.input_px), (channels, 3)):
        if side not in (None, wanted):
            problem = f"takes pictures of {height or 'any'} x {width or 'any'} x {channels or 'any'}"
            advice = (
                f"add --resize {side}"
                if wanted != 3 and height == width
                else "it cannot take RGB tiles that are square"
            )
            raise ModelError(file, f"{problem}, tiles come in with {preparation.input_px} px", advice)
    kind: Any = {_UINT8: np.uint8, _FLOAT16: np.float16}.get(port.kind, np.float32)
    output = output_of(graph, file, options.output_name)

    def raw(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return run_graph(graph, file, output, images.astype(kind))

    about = {"from": "ONNX graph"}
    return ForeignModel(file, raw, graph, preparation, stated.mpp, stated.classes, about, output)


_UINT8, _FLOAT16 = 2, 10
"""Element types of ONNX."""


@dataclass(frozen=True)
class _Stated:
    """What options say of a model that says nothing of itself."""

    preparation: Preparation
    mpp: float
    classes: tuple[str, ...]


_EXAMPLES = {
    "tile_px": "224",
    "mpp": "0.5",
    "classes": "non-IDC,IDC",
    "mean": "0.485,0.456,0.406",
    "std": "0.229,0.224,0.225",
}
"""What must be said: a wrong guess would give maps that look like maps."""


def _stated(options: ImportOptions) -> _Stated:
    """What the options say.

    Raises:
        UsageError: they leave something open, or it is out of range.
    """
    missing = [name for name in _EXAMPLES if getattr(options, name) is None]
    if missing:
        example = " ".join(f"{_option(name)} {_EXAMPLES[name]}" for name in missing)
        nothing = " (0,0,0 and 1,1,1 change nothing)" if "mean" in missing else ""
        problem = "must be said, since the file does not"
        raise UsageError(", ".join(map(_option, missing)), problem, f"for instance {example}{nothing}")
    size, side = options.tile_px or 0, options.resize_px or options.tile_px or 0
    mpp, std, (least, most) = options.mpp or 0.0, options.std or (1.0, 1.0, 1.0), MPP_RANGE
    for name, value, low, high in (
        ("tile_px", size, 8, 4096),
        ("resize_px", side, 8, 4096),
        ("mpp", mpp, least, most),
        ("std", min(std), 1e-6, 1e6),
    ):
        if not low <= value <= high:
            raise UsageError(_option(name), f"{value:g}: must be from {low:g} to {high:g}", "see --help")
    channels, white, layout = options.channels or "rgb", options.white or 1, options.layout or "nchw"
    preparation = Preparation(size, side, channels, white, options.mean or (0.0, 0.0, 0.0), std, layout)
    return _Stated(preparation, mpp, options.classes or ())


def _option(name: str) -> str:
    return "--" + {"tile_px": "tile-size", "resize_px": "resize", "output_name": "output-name"}.get(name, name)


def _is_known(architecture: str) -> bool:
    """Whether timm has it; names with a source (`hf-hub:`) would make it download."""
    import timm

    return architecture in timm.list_models()


def _network(architecture: str, weights: Path, outputs: int | None) -> "nn.Module":
    """A network of timm with the weights of a file.

    Args:
        architecture: timm's name.
        weights: the file.
        outputs: of the network; None: as many as the file's last layer has.

    Raises:
        ModelError: they do not fit.
    """
    import timm

    from wsi_idc.model.network import put_weights, read_weights

    _refuse_pointer(weights)
    state = read_weights(weights, "copy it again")
    advice = f"the weights are not of timm's {architecture}"
    if outputs is None:
        made: Any = timm.create_model(architecture, pretrained=False, num_classes=1)
        classifier = made.default_cfg.get("classifier")
        last = state.get(f"{classifier}.weight")
        if last is None or last.ndim < 1 or not 1 <= len(last) <= 1000:
            raise ModelError(weights, f"has no last layer {classifier!s}.weight of 1 to 1000 outputs", advice)
        outputs = len(last)
    network: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=outputs)
    put_weights(network, state, weights, advice)
    return network.eval()


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(20).startswith(b"version https://git"):
            raise ModelError(file, "is a pointer of Git LFS, not the file itself", "fetch it with git lfs pull")


def _torchscript(file: Path) -> "nn.Module":
    """A TorchScript model, which the user trusts.

    Raises:
        ModelError: it is none, or would unpack to far more than its size.
    """
    import torch

    _refuse_pointer(file)
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ModelError(file, "is no TorchScript file", "save the model with torch.jit.save") from error
    if size > file.stat().st_size + _CODE_BYTES:
        raise ModelError(file, f"would unpack to {size >> 20:,} MiB", "no TorchScript file does: do not trust it")
    try:
        script = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ModelError(file, f"cannot be loaded ({_line(error)})", "save the model with torch.jit.save") from error
    return cast("nn.Module", script.eval())


def _traced(
    network: "nn.Module",
    file: Path,
    preparation: Preparation,
    mpp: float,
    classes: tuple[str, ...],
    about: Mapping[str, Any],
) -> ForeignModel:
    """A network in torch, with its graph."""
    import torch

    from wsi_idc.model.network import OPSET

    def raw(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            answer = network(torch.from_numpy(images))
        if not isinstance(answer, torch.Tensor):
            raise ModelError(
                file, f"answers with {type(answer).__name__}, a tensor is needed", "export the logits alone"
            )
        return np.asarray(answer.float().numpy(), np.float32)

    side = preparation.input_px
    try:
        raw(np.zeros((1, 3, side, side), np.float32))
        with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            written = Path(folder) / "model.onnx"
            torch.onnx.export(
                network,
                (torch.zeros((2, 3, side, side)),),
                written,
                input_names=["images"],
                output_names=["raw"],
                dynamic_axes={"images": {0: "n"}, "raw": {0: "n"}},
                opset_version=OPSET,
                dynamo=False,
            )
            graph = read_graph(written)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(file, f"cannot be made an ONNX graph ({_line(error)})", f"it is run with {side} px") from error
    return ForeignModel(file, raw, graph, preparation, mpp, classes, about)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if lines and lines[0].startswith("The following operation") else 0][
        :200
    ]
