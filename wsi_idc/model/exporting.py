"""Our models for QuPath's WSInfer extension, and for WSInfer itself: a model folder that works without a network.

OUT/                          QuPath's folder of WSInfer models, or a new one
  wsinfer-zoo-registry.json   written where there is none: without one the extension asks the network for it
  local/NAME/
    config.json               by WSInfer's schema; the only transform is ToTensor
    torchscript_model.pt      resize, contrast, normalisation and calibration inside
    README.md                 where to put it, and what does not run there
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsi_idc import USE, __version__
from wsi_idc.errors import ModelError, UsageError, WsiIdcError, system_reason
from wsi_idc.files import whole_folder, write_whole
from wsi_idc.model.bundle import LoadedBundle
from wsi_idc.model.importing import check_free
from wsi_idc.model.known import made_tiles
from wsi_idc.model.runtime import load_runtime
from wsi_idc.model.wsinfer import CONFIG, REGISTRY, SCRIPT

TOLERANCE = 1e-4
"""The largest difference of a probability between the folder and the bundle's own float32 form."""
LOCAL = "local"
"""The extension's folder for models that are not from WSInfer's zoo."""


@dataclass(frozen=True)
class Exported:
    """What came of an export.

    Attributes:
        folder: the model's.
        difference: the largest difference of a probability from the bundle's, on the made tiles.
        notes: lines for the user.
    """

    folder: Path
    difference: float
    notes: tuple[str, ...]


def export_model(bundle: LoadedBundle, out: Path, *, force: bool = False) -> Exported:
    """Write a bundle as a WSInfer model.

    Args:
        bundle: with its network and weights: a bundle that is only a graph cannot be made TorchScript.
        out: the folder of WSInfer models.
        force: replace the model if it is there.

    Raises:
        ModelError: the bundle has no network, or its weights do not fit it.
        UsageError: the model is there already, or the folder cannot be written.
    """
    if bundle.weights_form() is None:
        problem = "network and model.safetensors are needed, and it is only a graph"
        raise ModelError(bundle.folder, problem, "export a bundle that wsi-idc train wrote")
    folder = out / LOCAL / bundle.fields.name
    check_free(folder, force=force, mark=CONFIG)
    try:
        with whole_folder(folder) as partial:
            difference = _write(bundle, partial)
        if not (out / REGISTRY).exists():
            write_whole(out / REGISTRY, b'{"models": {}}\n')
    except OSError as error:
        raise UsageError(out, f"cannot be written: {system_reason(error)}", "choose another --out") from error
    return Exported(folder, difference, tuple(_lost(bundle)))


def _lost(bundle: LoadedBundle) -> list[str]:
    """What the extension does otherwise than `infer`."""
    first, second = bundle.fields.classes
    lines = [f"no threshold: a tile is called {second} from a probability of 0.5, where {first} is no longer likelier"]
    if bundle.fields.context is not None:
        lines.append("no context: each tile is judged alone, which is what `alone` says in wsi-idc's maps")
    return lines


def _write(bundle: LoadedBundle, folder: Path) -> float:
    """Write the folder; gives the largest difference of a probability."""
    import torch
    from torch import Tensor, nn

    from wsi_idc.model.network import TileNetwork, load_network

    fields = bundle.fields
    assert fields.network is not None
    size = fields.tile.size_px

    class TwoLogits(nn.Module):
        """What WSInfer and its extension take the softmax of: zero, and the logit."""

        def __init__(self, network: TileNetwork) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            """From float32 (n, 3, any, any) RGB in 0..1: the extension's tiles may be a pixel off."""
            images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
            logits = self.network.calibrated(images)
            return torch.stack((torch.zeros_like(logits), logits), 1)

    model = TwoLogits(load_network(fields.network, bundle.weights)).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = torch.zeros((2, 3, size, size))
        script = torch.jit.trace(model, example, check_trace=False)  # type: ignore[no-untyped-call]
        script.save(str(folder / SCRIPT))
        saved = torch.jit.load(str(folder / SCRIPT), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        tiles = made_tiles(size)
        images = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
        found = torch.softmax(saved(images), 1)[:, 1].numpy()
    config = {
        "spec_version": "1.0",
        "architecture": fields.network.get("kind", "unknown"),
        "num_classes": len(fields.classes),
        "class_names": list(fields.classes),
        "patch_size_pixels": size,
        "spacing_um_px": fields.tile.mpp,
        "transform": [{"name": "ToTensor"}],
    }
    write_whole(folder / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    write_whole(folder / "README.md", _readme(bundle).encode())
    own = load_runtime(bundle, "float32", 0).predict(tiles)
    difference = float(np.abs(found - own).max())
    if not difference <= TOLERANCE:
        problem = f"the TorchScript and the bundle differ by {difference:.2g}, more than {TOLERANCE:g}"
        raise WsiIdcError(bundle.folder, problem, "see wsi-idc model check; nothing was written")
    return difference


def _readme(bundle: LoadedBundle) -> str:
    """What whoever finds the folder must know."""
    fields = bundle.fields
    positive = fields.positive or fields.classes[1]
    lines = [
        f"# {fields.name}, for QuPath's WSInfer extension",
        "",
        USE,
        "",
        f"Written by wsi-idc {__version__} from the bundle `{fields.name}` ({fields.title or 'no title'}). "
        f"Licence: {fields.licence or 'not said'}.",
        "",
        "## Where to put it",
        "The folder that holds `local` and `wsinfer-zoo-registry.json` is a folder of WSInfer models, complete, for "
        "use without a network. In QuPath: Extensions > WSInfer > Additional options > Model directory, choose that "
        f"folder. Or copy `local/{fields.name}` into the folder `local` (or `user`) of the one that is set there. An "
        "extension that has a separate directory for local models wants `local` itself. QuPath downloads PyTorch once; "
        "without a network it must be there already.",
        "",
        "The registry lists no models: it is there so that the extension finds one when it cannot ask the network.",
        "",
        "WSInfer itself: `wsinfer run --config config.json --model-path torchscript_model.pt ...`.",
        "",
        "## What it says",
        f"Tiles of {fields.tile.size_px} px at {fields.tile.mpp:g} um/px; the probabilities of {fields.classes[0]} and "
        f"of {fields.classes[1]}, which sum to one. Resize, normalisation and calibration are inside the model.",
        "",
        "## What does not run there",
        *(f"- {line[0].upper()}{line[1:]}." for line in _lost(bundle)),
        f"- The bundle's threshold of a tile alone is {fields.threshold:.3f}, by the probability of {positive}: "
        f"QuPath's Create single measurement classifier takes it, on the measurement `{positive}`.",
        "- The tissue mask, and which tiles are cut: QuPath's tiles begin at the annotation that is chosen.",
        "- int8: it runs in float32.",
        "",
        "So its maps differ from those of `wsi-idc infer`; the probability of one tile's pixels does not.",
    ]
    return "\n".join(lines) + "\n"
