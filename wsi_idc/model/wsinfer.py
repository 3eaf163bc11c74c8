"""A folder of WSInfer's model zoo: its files, and what its `config.json` says."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from wsi_idc.model.graphs import Preparation
from wsi_idc.units import MPP_RANGE, Mpp, TilePx

CONFIG, WEIGHTS, SCRIPT, REGISTRY = (
    "config.json",
    "model.safetensors",
    "torchscript_model.pt",
    "wsinfer-zoo-registry.json",
)


class Transform(BaseModel):
    """One step from a tile to what the network takes, named as in torchvision."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Resize", "ToTensor", "Normalize"]
    arguments: dict[str, Any] | None = None


class WSInferConfig(BaseModel):
    """The `config.json` of WSInfer's model zoo, version 1.0 of its schema."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    spec_version: Literal["1.0"] = "1.0"
    architecture: Annotated[str, Field(min_length=1, max_length=200)]
    num_classes: Annotated[int, Field(ge=1, le=1000)]
    patch_size_pixels: Annotated[TilePx, Field(ge=8, le=4096)]
    spacing_um_px: Annotated[Mpp, Field(ge=MPP_RANGE[0], le=MPP_RANGE[1])]
    class_names: tuple[str, ...]
    transform: tuple[Transform, ...]

    @model_validator(mode="after")
    def _as_many_names(self) -> "WSInferConfig":
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names, num_classes is {self.num_classes}")
        return self

    def preparation(self) -> Preparation:
        """What `transform` says.

        Raises:
            ValueError: it says what cannot be done in a graph in that order.
        """
        names: list[str] = [step.name for step in self.transform]
        if names not in ([*first, "ToTensor", *last] for first in ([], ["Resize"]) for last in ([], ["Normalize"])):
            raise ValueError(f"{', '.join(names) or 'nothing'}: Resize, ToTensor, Normalize are known, in this order")
        said = {step.name: dict(step.arguments or {}) for step in self.transform}
        found = Preparation(self.patch_size_pixels, self.patch_size_pixels)
        if "Resize" in said:
            side = said["Resize"].pop("size", None)
            sides = side if isinstance(side, list) else [side]
            if len(set(map(str, sides))) != 1 or not isinstance(sides[0], int) or not 8 <= sides[0] <= 4096:
                raise ValueError(f"Resize: size {str(side)[:60]}: one side from 8 to 4096 is needed")
            found = replace(found, input_px=sides[0])
        if "Normalize" in said:
            values = [_three(said["Normalize"].pop(name, None), f"Normalize: {name}") for name in ("mean", "std")]
            found = replace(found, mean=values[0], std=_not_zero(values[1], "Normalize: std"))
        left = [f"{step}: {name}" for step, arguments in said.items() for name in arguments]
        if left:
            raise ValueError(f"{left[0]} is not known")
        return found


def _three(value: Any, what: str) -> tuple[float, float, float]:
    numbers = value if isinstance(value, list) else []
    fine = all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e6 for n in numbers)
    if len(numbers) != 3 or not fine:
        raise ValueError(f"{what}: three numbers are needed")
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def _not_zero(std: tuple[float, float, float], what: str) -> tuple[float, float, float]:
    if min(std) <= 0:
        raise ValueError(f"{what}: must be above zero")
    return std
