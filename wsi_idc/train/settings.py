"""What `train` can be told, and the two recipes that fill in what it is not told."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from wsi_idc.model.config import Activation, Contrast, Flips, Kind, NetworkConfig, Stem
from wsi_idc.settings import CONTENT, RUNTIME, Settings
from wsi_idc.units import TilePx

RecipeName = Literal["default", "seed"]
AugmentationName = Literal["full", "light", "seed"]
Balance = Literal["none", "weights", "sampling"]
INPUT_PX: dict[Kind, int] = {"resnet50": 50, "idc-2016": 32}
"""The standard size that tiles are resized to, by network."""


@dataclass(frozen=True)
class Augmentation:
    """How training tiles are varied; every amount is the largest of a uniform draw, 0 for none.

    Attributes:
        rotation_deg: degrees either way.
        shift: part of the width, and of the height.
        shear_deg: degrees either way.
        zoom: part by which each axis grows or shrinks; one draw for both, and a tenth of it between them.
        mirror: `horizontal` flips left to right; `all` gives the eight turns and mirror images of a square.
        stain: part by which each stain (haematoxylin, eosin, residue) is stronger or weaker.
        colour: part by which each channel's optical density is stronger or weaker.
        brightness: optical density added to all pixels.
        edge: what stands beyond the tile's edge.
    """

    rotation_deg: float = 0.0
    shift: float = 0.0
    shear_deg: float = 0.0
    zoom: float = 0.0
    mirror: Literal["none", "horizontal", "all"] = "none"
    stain: float = 0.0
    colour: float = 0.0
    brightness: float = 0.0
    edge: Literal["reflection", "border"] = "reflection"


AUGMENTATIONS: dict[AugmentationName, Augmentation] = {
    "full": Augmentation(rotation_deg=45, shift=0.05, zoom=0.2, mirror="all", stain=0.25, colour=0.1, brightness=0.06),
    # For the last epochs of a training: tiles as sharp as those that will be scored, none of them interpolated.
    "light": Augmentation(mirror="all", stain=0.15, colour=0.06, brightness=0.04),
    "seed": Augmentation(rotation_deg=20, shift=0.1, shear_deg=10, zoom=0.1, mirror="horizontal", edge="border"),
}


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        schedule: `one-cycle` warms up and anneals by cosine over all epochs; `plateau` cuts the rate when the monitored
            figure stands still.
        patience: epochs without a better figure after which training stops; 0 for never.
        monitor: the validation figure by which the best epoch is kept.
        ema: decay of the weights' moving average; 0 for none.
        mixup: parameter of the Beta distribution (Zhang et al., ICLR 2018, arXiv:1710.09412); 0 for none.
        smoothing: label smoothing; labels become `smoothing / 2` and `1 - smoothing / 2`.
        stem: of `resnet50`; see `NetworkConfig`.
        teacher: a bundle, or a cross-validation, whose probabilities training tiles are taught beside their labels.
        context: let the neighbours of a tile take part in its probability, as far as the validation patients say.
    """

    activation: Activation
    contrast: Contrast
    flips: Flips
    optimizer: Literal["adamw", "rmsprop"]
    schedule: Literal["one-cycle", "plateau"]
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    patience: int
    monitor: Literal["val_auc", "val_loss"]
    augmentation: AugmentationName
    ema: float = 0.0
    mixup: float = 0.0
    smoothing: float = 0.0
    stem: Stem = "standard"
    teacher: Path | None = None
    context: bool = False


RECIPES: dict[RecipeName, Recipe] = {
    "default": Recipe(
        activation="relu",
        contrast="none",
        flips="none",
        optimizer="adamw",
        schedule="one-cycle",
        lr=2e-3,
        weight_decay=0.05,
        epochs=24,
        batch_size=64,
        patience=0,
        monitor="val_auc",
        ema=0.998,
        context=True,
        augmentation="full",
    ),
    "seed": Recipe(
        activation="elu",
        contrast="stretch",
        flips="none",
        optimizer="rmsprop",
        schedule="plateau",
        lr=1e-3,
        weight_decay=0.0,
        epochs=50,
        batch_size=32,
        patience=10,
        monitor="val_loss",
        augmentation="seed",
    ),
}


class TrainSettings(Settings):
    """Everything that `train` can be told; None leaves it to the recipe."""

    recipe: Annotated[RecipeName, Field(json_schema_extra=CONTENT)] = "default"
    network: Annotated[Kind, Field(json_schema_extra=CONTENT)] = "resnet50"
    activation: Annotated[Activation | None, Field(json_schema_extra=CONTENT)] = None
    input_px: Annotated[int | None, Field(ge=8, le=1024, json_schema_extra=CONTENT)] = None
    flips: Annotated[Flips | None, Field(json_schema_extra=CONTENT)] = None
    init: Annotated[Path | None, Field(json_schema_extra=CONTENT)] = None
    split_by: Annotated[Literal["patient", "tile"], Field(json_schema_extra=CONTENT)] = "patient"
    val_split: Annotated[float, Field(gt=0.0, le=0.5, json_schema_extra=CONTENT)] = 0.15
    folds: Annotated[int, Field(ge=0, le=100, json_schema_extra=CONTENT)] = 0
    positive_from: Annotated[float, Field(gt=0.0, le=1.0, json_schema_extra=CONTENT)] = 0.5
    balance: Annotated[Balance, Field(json_schema_extra=CONTENT)] = "none"
    epochs: Annotated[int | None, Field(ge=1, le=10000, json_schema_extra=CONTENT)] = None
    batch_size: Annotated[int | None, Field(ge=2, le=65536, json_schema_extra=CONTENT)] = None
    lr: Annotated[float | None, Field(gt=0.0, le=10.0, json_schema_extra=CONTENT)] = None
    patience: Annotated[int | None, Field(ge=0, le=10000, json_schema_extra=CONTENT)] = None
    augmentation: Annotated[AugmentationName | None, Field(json_schema_extra=CONTENT)] = None
    context: Annotated[bool | None, Field(json_schema_extra=CONTENT)] = None
    # Not content: the weights do not depend on it, so that a training that is done can be given one by --resume.
    cross_validation: Annotated[Path | None, Field(json_schema_extra=RUNTIME)] = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, json_schema_extra=CONTENT)] = 0
    gpus: Annotated[int, Field(ge=0, le=64, json_schema_extra=RUNTIME)] = 0
    processes: Annotated[int, Field(ge=1, le=64, json_schema_extra=RUNTIME)] = 1
    threads: Annotated[int, Field(ge=0, le=256, json_schema_extra=RUNTIME)] = 0
    memory_gb: Annotated[float, Field(gt=0.0, le=4096.0, json_schema_extra=RUNTIME)] = 4.0

    def content(self) -> dict[str, Any]:
        """What changes a result, as plain JSON types: what was said, and what only a recipe can say."""
        return super().content() | _by_recipe_alone(self.resolve())

    def recorded(self) -> dict[str, Any]:
        """The content for a model card: other bundles by name, without this machine's folders."""
        content = self.content()
        return content | {name: Path(content[name]).name for name in ("init", "teacher") if content[name] is not None}

    def unlike(self, record: Mapping[str, Any]) -> list[str]:
        """Names of what a card, or a cross-validation's summary, has recorded otherwise, sorted.

        Where the record has nothing for what only a recipe can say, it stands for the recipe's: so it was recorded when
        that could be said beside the recipe.
        """
        usual = _by_recipe_alone(RECIPES[self.recipe])
        known = {**record, **{name: usual[name] for name in usual if record.get(name) is None}}
        return sorted(name for name, value in self.recorded().items() if known.get(name) != value)

    def resolve(self) -> Recipe:
        """The recipe, with what was said put in."""
        names = {field.name for field in dataclasses.fields(Recipe)} & set(TrainSettings.model_fields)
        said = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(RECIPES[self.recipe], **said)

    def network_config(self, tile_px: TilePx) -> NetworkConfig:
        """The network for tiles of a size in pixels."""
        recipe = self.resolve()
        return NetworkConfig(
            kind=self.network,
            tile_px=tile_px,
            input_px=self.input_px or INPUT_PX[self.network],
            activation=recipe.activation,
            stem=recipe.stem,
            contrast=recipe.contrast,
            flips=recipe.flips,
        )


def _by_recipe_alone(recipe: Recipe) -> dict[str, Any]:
    """What only a recipe can say, no option: as plain JSON types."""
    teacher = None if recipe.teacher is None else str(recipe.teacher)
    return {"stem": recipe.stem, "teacher": teacher, "mixup": recipe.mixup, "smoothing": recipe.smoothing}
