"""Other people's models made bundles of ours: WSInfer folders, weights of timm's architectures, ONNX graphs.

Every one goes the same way: something that answers to pictures, an ONNX graph of it, the preparation and activation put
into that graph, and the result held against the original on the made tiles. What differs is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from wsi_idc import USE, __version__
from wsi_idc.digests import file_digest
from wsi_idc.errors import ModelError, UsageError, system_reason
from wsi_idc.files import whole_folder, write_whole
from wsi_idc.model.bundle import Bundle, first_fault, read_bundle
from wsi_idc.model.foreign import ForeignModel, ImportOptions, reader_of
from wsi_idc.model.graphs import Activation, complete, ends_in, is_quantised, output_of, port_of
from wsi_idc.model.known import answers, made_tiles
from wsi_idc.model.runtime import load_runtime
from wsi_idc.names import check_slide_id

TOLERANCE = 0.001
"""The largest difference of a probability between the original and the bundle."""
INT8_TOLERANCE = 0.03
"""The same where the graph holds whole numbers: one engine rounds between two layers where another does not."""


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    Attributes:
        folder: the bundle.
        name: its name.
        difference: the largest difference of a probability from the original's, on the made tiles.
        notes: lines for the user.
    """

    folder: Path
    name: str
    difference: float
    notes: tuple[str, ...]


def import_model(source: Path, out: Path | None, options: ImportOptions, *, force: bool = False) -> Imported:
    """Make a bundle of another program's model.

    Args:
        source: a WSInfer folder, a safetensors file, or an ONNX graph.
        out: the bundle's folder; by default its name, here.
        options: what the source does not say.
        force: replace a bundle that is there.

    Raises:
        ModelError: the source cannot be used, or the bundle answers otherwise than it.
        UsageError: an option is missing, contradicts the source, or `out` is taken.
    """
    read = reader_of(source)
    name = options.name or (out.name if out is not None else _name_of(source))
    if fault := check_slide_id(name):
        raise UsageError("--name", f"{name!r} {fault}", "give a name for the bundle")
    folder = out if out is not None else Path(name)
    check_free(folder, force=force)
    found = read(source, options)
    try:
        with whole_folder(folder) as partial:
            difference, notes = _write(found, partial, name, options)
    except OSError as error:
        raise UsageError(folder, f"cannot be written: {system_reason(error)}", "choose another --out") from error
    return Imported(folder, name, difference, notes)


def check_free(folder: Path, *, force: bool, mark: str = "bundle.json") -> None:
    """Refuse to write over what is there.

    Args:
        folder: the place.
        force: replace a folder of our kind,
        mark: which is known by having this file.

    Raises:
        UsageError: something is there, and is not to be replaced.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not force:
        raise UsageError(folder, "is there already", "replace it with --force, or choose another --out")
    if folder.is_symlink() or not (folder / mark).is_file():
        raise UsageError(folder, f"has no {mark}, so it is nothing that --force replaces", "choose another --out")


def _name_of(source: Path) -> str:
    return source.absolute().name if source.is_dir() else source.stem


def _write(source: ForeignModel, folder: Path, name: str, options: ImportOptions) -> tuple[float, tuple[str, ...]]:
    """Write the bundle, and hold it against the original."""

    size = source.preparation.tile_px
    tiles = made_tiles(size)
    port, output = port_of(source.graph, source.path), output_of(source.graph, source.path, source.output_name)
    raw = np.concatenate([source.raw(source.preparation.prepared(tiles[n : n + 1])) for n in range(len(tiles))])
    if raw.ndim < 1 or len(raw) != len(tiles) or raw.size != len(raw) * (raw.shape[1] if raw.ndim > 1 else 1):
        shape = " x ".join(map(str, raw.shape[1:])) or "nothing"
        raise ModelError(source.path, f"gives {shape} a tile, one number a class is needed", "it is no tile classifier")
    raw = raw.reshape(len(raw), -1)
    classes = _classes(source, raw.shape[1])
    last = ends_in(source.graph, output)
    activation = options.output or _activation(raw.shape[1], last)
    if activation == "softmax" and raw.shape[1] == 1:
        raise UsageError("--output", "softmax of one number is 1", "give sigmoid or none")
    notes = []
    if options.output is None and activation == "none":
        notes.append(f"the graph ends in {last}: what it gives is taken for probabilities")
    graph = complete(source.graph, port, output, source.preparation, activation, raw.shape[1])
    write_whole(folder / "model.onnx", graph.SerializeToString())
    fields: dict[str, Any] = {
        "format": "wsi-idc-model/1",
        "name": name,
        "title": options.title or f"{source.about.get('architecture', source.path.name)}, imported",
        "classes": list(classes),
        "tile": {"size_px": size, "mpp": source.mpp},
        "graph": {"file": "model.onnx", "input": "tiles", "output": "probability"},
        "licence": options.licence,
        "positive": options.positive,
        "threshold": options.threshold,
        "training": {
            "imported": {
                **source.about,
                "file": source.path.name,
                "digest": file_digest(source.path),
                "preparation": asdict(source.preparation),
                "activation": activation,
                "wsi-idc": __version__,
            },
            "limits": [
                USE,
                "Made elsewhere: on whom it was trained is not known here; nothing keeps it from being judged on them.",
                f"Its threshold was {'not chosen here' if options.threshold is None else 'given by hand'}.",
            ],
        },
    }
    fields = {key: value for key, value in fields.items() if value is not None}
    _put(folder, fields, options)
    runtime = load_runtime(read_bundle(folder), "float32", 0)
    found = runtime.predict(tiles)
    difference = _compare(
        source.path, _probabilities(raw, activation), found, INT8_TOLERANCE if is_quantised(graph) else TOLERANCE
    )
    alone = np.concatenate([runtime.predict(tiles[n : n + 1]) for n in range(3)])
    if np.abs(alone - found[:3]).max() > TOLERANCE:
        problem = "answers otherwise to a tile alone than to one among others"
        raise ModelError(source.path, problem, "export it with a free first axis, in evaluation mode")
    fields["known"] = answers(lambda _: found, size).model_dump(mode="json")
    _put(folder, fields, options)
    write_whole(folder / "CARD.md", _card(fields).encode())
    if len(classes) > 2 and options.positive is None:
        notes.append("of more than two classes none is positive: maps, but no threshold and no evaluation (--positive)")
    return difference, tuple(notes)


def _put(folder: Path, fields: Mapping[str, Any], options: ImportOptions) -> None:
    try:
        Bundle.model_validate(fields)
    except ValidationError as error:
        problem = first_fault(error)
        option, _, rest = problem.partition(": ")
        if option in ("positive", "threshold", "classes") and getattr(options, option) is not None:
            raise UsageError(f"--{option}", rest, "see --help") from error
        raise ModelError(fields["name"], problem, "the source cannot be a bundle") from error
    write_whole(folder / "bundle.json", (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode())


def _classes(source: ForeignModel, outputs: int) -> tuple[str, ...]:
    """The names of the bundle's classes; of one number, the class and what it is not."""
    names = source.classes
    if outputs == 1 and len(names) == 1:
        return (f"not {names[0]}", names[0])
    if len(names) != max(outputs, 2):
        wanted = "1 or 2" if outputs == 1 else str(outputs)
        problem = f"{len(names)} are named, the model gives {outputs} number{'s' if outputs > 1 else ''} a tile"
        raise ModelError(source.path, f"classes: {problem}", f"name {wanted}")
    return names


def _activation(outputs: int, last: str) -> Activation:
    if last in ("Softmax", "Sigmoid"):
        return "none"
    return "sigmoid" if outputs == 1 else "softmax"


def _probabilities(raw: NDArray[np.float32], activation: Activation) -> NDArray[np.float64]:
    """What the bundle should say: (n,), or (n, k) of more than two classes."""
    values = raw.astype(np.float64)
    if activation == "softmax":
        values = np.exp(values - values.max(1, keepdims=True))
        values /= values.sum(1, keepdims=True)
    elif activation == "sigmoid":
        from scipy.special import expit

        values = expit(values)
    return values if values.shape[1] > 2 else values[:, -1]


def _compare(path: Path, wanted: NDArray[np.float64], found: NDArray[np.float32], tolerance: float) -> float:
    """The largest difference.

    Raises:
        ModelError: it is too large, or they are no probabilities.
    """
    low, high = float(wanted.min()), float(wanted.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        advice = "say what they are: --output sigmoid or softmax"
        raise ModelError(path, f"gives numbers from {low:.3g} to {high:.3g}, no probabilities", advice)
    difference = float(np.abs(found - wanted).max())
    if not difference <= tolerance:
        problem = f"the graph made of it differs from it by {difference:.2g}, {tolerance:g} is allowed"
        raise ModelError(path, problem, "nothing was written")
    return difference


def _card(fields: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    training, tile = fields["training"], fields["tile"]
    known = training["imported"]
    preparation = known["preparation"]
    resized = "" if preparation["input_px"] == tile["size_px"] else f", resized to {preparation['input_px']} px"
    lines = [
        f"# {fields['name']}: {fields['title']}",
        "",
        *(f"- {limit}" for limit in training["limits"]),
        "",
        f"Imported by wsi-idc {known['wsi-idc']} from `{known['file']}` ({known['from']}, digest {known['digest']}). "
        f"Licence: {fields.get('licence', 'not said')}.",
        "",
        f"Tiles of {tile['size_px']} px at {tile['mpp']:g} um/px{resized}; {preparation['channels']}, white is "
        f"{preparation['white']}, mean {preparation['mean']}, std {preparation['std']}; activation added: "
        f"{known['activation']}. Classes: {', '.join(fields['classes'])}.",
    ]
    return "\n".join(lines) + "\n"
