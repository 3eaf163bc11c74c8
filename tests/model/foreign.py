"""Other people's models, made on the spot: small, of random weights."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ARCHITECTURE = "test_resnet"
"""timm's smallest ResNet; it takes any size."""
NORMALISE = {"mean": [0.7238, 0.5716, 0.6779], "std": [0.112, 0.1459, 0.1089]}


def config(**changes) -> dict:
    """A `config.json` of WSInfer's zoo: tiles of 50 px, seen at 32."""
    fields = {
        "spec_version": "1.0",
        "architecture": ARCHITECTURE,
        "num_classes": 2,
        "class_names": ["notumor", "tumor"],
        "patch_size_pixels": 50,
        "spacing_um_px": 4.0,
        "transform": [
            {"name": "Resize", "arguments": {"size": 32}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": NORMALISE},
        ],
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def network(outputs: int = 2):
    """A network whose answers differ from tile to tile: its logits are spread over them, around zero."""
    import timm
    import torch

    torch.manual_seed(5)
    made = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=outputs).eval()
    with torch.no_grad():
        torch.nn.init.normal_(made.fc.weight)
        logits = made(torch.rand(16, 3, 1, 1) * torch.ones(3, 32, 32) * 4 - 2)
        made.fc.weight *= 2 / logits.std(0)[:, None]
        made.fc.bias -= made(torch.zeros(1, 3, 32, 32))[0]
    return made


def wsinfer_folder(folder: Path, outputs: int = 2, weights: bool = True, script: bool = False, **changes):
    """A folder of WSInfer's zoo; gives its network."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(num_classes=outputs, **changes)))
    made = network(outputs)
    if weights:
        save_file(made.state_dict(), folder / "model.safetensors")
    if script:
        torch.jit.trace(made, torch.zeros(1, 3, 32, 32)).save(str(folder / "torchscript_model.pt"))
    return made


def by_wsinfer(model, settings: dict, tiles: np.ndarray) -> np.ndarray:
    """What WSInfer says of tiles: torchvision's transforms by name, then softmax, or sigmoid of one number: (n, k)."""
    import torch
    from PIL import Image
    from torchvision import transforms

    steps = [getattr(transforms, step["name"])(**(step.get("arguments") or {})) for step in settings["transform"]]
    transform = transforms.Compose(steps)
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.fromarray(tile)) for tile in tiles]))
    several = logits.ndim > 1 and logits.shape[1] > 1
    return (torch.softmax(logits, 1) if several else torch.sigmoid(logits)).numpy()


def mean_graph(
    path: Path,
    shape=("n", 3, 50, 50),
    kind=TensorProto.FLOAT,
    end=("Identity",),
    outputs: int = 1,
    scale: float = 1.0,
    external: str | None = None,
) -> Path:
    """An ONNX graph that gives the mean of each picture, times `scale`, and so often as the output's place, from 1."""
    weights = numpy_helper.from_array(scale * np.arange(1, outputs + 1, dtype=np.float32)[None], "weights")
    if external is not None:
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=external)
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["means"]),
        helper.make_node("MatMul", ["means", "weights"], ["sums"]),
    ]
    before = "sums"
    for operation in end:
        nodes.append(helper.make_node(operation, [before], [f"after {operation}"]))
        before = f"after {operation}"
    nodes[-1].output[0] = "probability"
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("tiles", kind, shape)],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, [shape[0], outputs])],
        [
            numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"),
            numpy_helper.from_array(np.array([-1, 1], np.int64), "column"),
            weights,
        ],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    )
    assert onnx.load(path, load_external_data=False).graph.node
    return path
