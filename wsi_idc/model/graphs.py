"""Other people's ONNX graphs: read with care, and completed to a bundle's: uint8 tiles in, probabilities out."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from wsi_idc.errors import ModelError, system_reason

Layout = Literal["nchw", "nhwc"]
Channels = Literal["rgb", "bgr"]
Activation = Literal["sigmoid", "softmax", "none"]

MOST_BYTES = 2**31 - 2**20
"""Of a graph with its weights: protobuf takes no more than 2 GiB."""
_ROUND_ABOUT = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Gather", "Slice", "Cast", "Dropout")
"""Operations that leave a probability a probability."""
_PREFIX = "imported/"


@dataclass(frozen=True)
class Preparation:
    """From a tile to what a network takes, in this order.

    Attributes:
        tile_px: side of the tiles.
        input_px: side that the network sees: tiles of another size are resized, as Pillow does it (bilinear, widened
            when reducing, rounded to whole grey levels): what torchvision's `Resize` does to a picture.
        channels: their order.
        white: what 255 becomes: 1 or 255.
        mean: subtracted from each channel.
        std: each channel is divided by it.
        layout: of the network's input.
    """

    tile_px: int
    input_px: int
    channels: Channels = "rgb"
    white: Literal[1, 255] = 1
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    layout: Layout = "nchw"

    def prepared(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """By Pillow and NumPy, for the judge of a graph that does the same: float32 in this layout.

        Args:
            tiles: uint8 (n, size, size, 3) RGB.
        """
        from PIL import Image

        if self.tile_px != self.input_px:
            side = (self.input_px, self.input_px)
            resized = [np.asarray(Image.fromarray(tile).resize(side, Image.Resampling.BILINEAR)) for tile in tiles]
            tiles = np.stack(resized)
        images = tiles[..., ::-1] if self.channels == "bgr" else tiles
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        values: NDArray[np.float32] = images.astype(np.float32) / np.float32(255.0 / self.white)
        values = np.asarray((values - mean) / std, np.float32)
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2) if self.layout == "nchw" else values)


@dataclass(frozen=True)
class Port:
    """The one input of a graph.

    Attributes:
        name: its name.
        kind: its ONNX element type.
        sides: its four axes; None where one is free.
    """

    name: str
    kind: int
    sides: tuple[int | None, ...]

    @property
    def layout(self) -> Layout | None:
        """Which axis has the three channels; None where that cannot be told."""
        first, last = self.sides[1] == 3, self.sides[3] == 3
        return None if first == last else "nchw" if first else "nhwc"


def read_graph(path: Path) -> Any:
    """An ONNX model with its weights, also those in files beside it.

    Raises:
        ModelError: it cannot be read, is no sound ONNX model, or wants weights from outside its folder.
    """
    advice = "export the graph again, as one file"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(path, "is not a file", "give an ONNX file")
        if status.st_size > MOST_BYTES:
            raise ModelError(path, "is larger than 2 GiB", advice)
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise ModelError(path, f"cannot be read: {system_reason(error)}", "check the path") from error
    except Exception as error:  # protobuf has errors of its own, by implementation
        if isinstance(error, ModelError):
            raise
        raise ModelError(path, f"is no ONNX graph ({_first_line(error)})", advice) from error
    _take_in(model, path, status.st_size)
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise ModelError(path, f"is no sound ONNX graph ({_first_line(error)})", advice) from error
    return model


def _take_in(model: Any, path: Path, size: int) -> None:
    """Read weights that lie in files beside the graph into it.

    Raises:
        ModelError: one lies elsewhere, is absent or too large.
    """
    from onnx.external_data_helper import load_external_data_for_model, uses_external_data

    folder, total = path.parent.resolve(), size
    for tensor in _tensors(model.graph):
        if not uses_external_data(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = entries.get("location", "")
        file = folder / place
        # `\0` and the like make resolve() raise ValueError.
        try:
            inside = bool(place) and file.resolve().is_relative_to(folder) and file.resolve() == file
            whole = inside and file.is_file()
            length = int(entries["length"]) if "length" in entries else file.stat().st_size if whole else 0
        except (ValueError, OSError):
            inside, whole, length = False, False, 0
        if not inside:
            raise ModelError(path, f"takes weights from {place!r}, outside its folder", "export it as one file")
        if not whole:
            raise ModelError(path, f"takes weights from {place!r}, which is not there", "copy it beside the graph")
        total += max(length, 0)
        if total > MOST_BYTES:
            raise ModelError(path, "has more than 2 GiB of weights", "take a smaller model")
    try:
        load_external_data_for_model(model, str(folder))
    except Exception as error:
        advice = "copy the files beside the graph again"
        raise ModelError(path, f"its weights cannot be read ({_first_line(error)})", advice) from error


def keeps_weights_elsewhere(data: bytes) -> bool:
    """Whether a graph takes weights from other files (ONNX's external data).

    Args:
        data: the graph's file, which may be damaged.
    """
    from onnx.external_data_helper import uses_external_data

    try:
        model = onnx.load_model_from_string(data)
    except Exception:
        return False
    return any(uses_external_data(tensor) for tensor in _tensors(model.graph))


def _tensors(graph: Any) -> Iterator[Any]:
    """Every constant of a graph and of the graphs within it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _tensors(inner)


def port_of(model: Any, path: Path) -> Port:
    """The one input of a graph, if it takes pictures.

    Raises:
        ModelError: it has several, or one of another kind.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    found = [value for value in model.graph.input if value.name not in constants]
    if len(found) != 1:
        names = ", ".join(value.name for value in found[:8]) or "none"
        raise ModelError(path, f"has {len(found)} inputs ({names}), one is needed", "export it with the picture alone")
    tensor = found[0].type.tensor_type
    sides = tuple(side.dim_value or None for side in tensor.shape.dim)
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8)
    if len(sides) != 4 or tensor.elem_type not in kinds:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        problem = f"takes {kind} of {len(sides)} axes, pictures are float, float16 or uint8 of 4"
        raise ModelError(path, problem, "export it with a picture as input")
    return Port(found[0].name, tensor.elem_type, sides)


def output_of(model: Any, path: Path, name: str | None) -> str:
    """The output that is meant.

    Raises:
        ModelError: there is none of that name, or several and none is named.
    """
    names = [value.name for value in model.graph.output]
    if name is not None and name not in names:
        raise ModelError(path, f"has no output {name!r}, it has {', '.join(names[:8])}", "name one with --output-name")
    if name is None and len(names) != 1:
        raise ModelError(path, f"has {len(names)} outputs: {', '.join(names[:8])}", "name one with --output-name")
    return name if name is not None else names[0]


def ends_in(model: Any, output: str) -> str:
    """The operation that made an output, past those that only shape it."""
    makers = {name: node for node in model.graph.node for name in node.output}
    seen: set[str] = set()
    while output in makers and output not in seen and makers[output].op_type in _ROUND_ABOUT:
        seen.add(output)
        output = makers[output].input[0]
    return makers[output].op_type if output in makers else ""


def is_quantised(model: Any) -> bool:
    """Whether a graph computes in whole numbers."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def run_graph(model: Any, path: Path, output: str, images: NDArray[Any]) -> NDArray[np.float32]:
    """What a graph says of pictures, one at a time: float32 (n, ...).

    Raises:
        ModelError: ONNX Runtime cannot run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
        )
        (name,) = (port.name for port in session.get_inputs())
        found = [session.run([output], {name: images[n : n + 1]})[0] for n in range(len(images))]
        return np.concatenate([np.asarray(part, np.float32) for part in found])
    except Exception as error:
        raise ModelError(path, f"cannot be run ({_first_line(error)})", "see what it was exported with") from error


def complete(
    model: Any, port: Port, output: str, preparation: Preparation, activation: Activation, outputs: int
) -> Any:
    """The graph of a bundle: preparation and activation inside.

    Args:
        model: takes pictures, one a row, and gives `outputs` numbers of each.
        port: its input.
        output: its output.
        preparation: what it wants done to tiles.
        activation: what its numbers lack to be probabilities.
        outputs: numbers of each tile: 1, or one a class.

    Returns:
        `tiles` uint8 (n, size, size, 3) -> `probability` float32 (n,), of the second of two classes, or (n, classes).
    """
    body = onnx.compose.add_prefix(model, _PREFIX)
    graph = body.graph
    size, side = preparation.tile_px, preparation.input_px
    before = "tiles"
    nodes: list[Any] = []

    def step(operation: str, *constants: NDArray[Any], first: bool = False, **attributes: Any) -> None:
        """Add an operation on what came before, and on constants after it (or before it)."""
        nonlocal before
        names = []
        for constant in constants:
            names.append(f"prepare/{len(nodes)}")
            value = numpy_helper.from_array(constant, names[-1])
            nodes.append(helper.make_node("Constant", [], [names[-1]], value=value))
        inputs = [*names, before] if first else [before, *names]
        before = f"prepare/{len(nodes)}"
        nodes.append(helper.make_node(operation, inputs, [before], **attributes))

    step("Cast", to=TensorProto.FLOAT)
    step("Transpose", perm=[0, 3, 1, 2])
    if size != side:
        from wsi_idc.model.network import resize_weights

        weights = resize_weights(size, side).numpy()
        for first, matrix in ((False, weights.T), (True, weights)):
            step("MatMul", np.ascontiguousarray(matrix), first=first)
            step("Add", np.array(0.5, np.float32))
            step("Floor")
    if preparation.channels == "bgr":
        step("Gather", np.array([2, 1, 0], np.int64), axis=1)
    if preparation.white != 255:
        step("Div", np.array(255 / preparation.white, np.float32))
    if any(preparation.mean):
        step("Sub", np.array(preparation.mean, np.float32).reshape(1, 3, 1, 1))
    if any(value != 1 for value in preparation.std):
        step("Div", np.array(preparation.std, np.float32).reshape(1, 3, 1, 1))
    if preparation.layout == "nhwc":
        step("Transpose", perm=[0, 2, 3, 1])
    step("Cast", to=port.kind)
    nodes[-1].output[0] = _PREFIX + port.name
    nodes += graph.node
    before = _PREFIX + output
    step("Cast", to=TensorProto.FLOAT)
    step("Reshape", np.array([-1, outputs], np.int64))
    if activation != "none":
        step("Sigmoid") if activation == "sigmoid" else step("Softmax", axis=1)
    if outputs == 2:
        step("Gather", np.array(1, np.int64), axis=1)
    elif outputs == 1:
        step("Reshape", np.array([-1], np.int64))
    nodes[-1].output[0] = "probability"
    shape = ["n", outputs] if outputs > 2 else ["n"]
    constants = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name in constants]
    for old, new in (
        (graph.node, nodes),
        (graph.input, [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", size, size, 3]), *kept]),
        (graph.output, [helper.make_tensor_value_info("probability", TensorProto.FLOAT, shape)]),
        (graph.value_info, []),
    ):
        copied = list(new)
        del old[:]
        old.extend(copied)
    return body


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
