"""What a network is made of, without torch: for the command line and `bundle.json`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from wsi_idc.units import TilePx, Um

Kind = Literal["resnet50", "idc-2016"]
Activation = Literal["relu", "elu"]
Stem = Literal["standard", "stride-1", "no-pool"]
Contrast = Literal["none", "stretch"]
Flips = Literal["none", "averaged"]


class Context(BaseModel):
    """How the neighbours of a tile on its slide take part in its probability; see `model/context.py`.

    Attributes:
        reach_um: distance in um at which two places' logits are hardly correlated any more (about 0.14).
        spread: standard deviation of the true logits over a slide, in units of a single tile's error.
        mean: the logit that is expected where no tile is near.
        limit: a tile's own logit beyond this, either way, is taken as this, so that no tile outweighs all around it.
        temperature: logits are divided by it at the end,
        shift: and this is added to them.
        threshold: the operating point of the result; the graph alone has the bundle's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    reach_um: Annotated[Um, Field(gt=0.0, le=1e5)]
    spread: Annotated[float, Field(gt=0.0, le=100.0)]
    mean: Annotated[float, Field(ge=-20.0, le=20.0)] = 0.0
    limit: Annotated[float, Field(gt=0.0, le=20.0)] = 20.0
    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    shift: Annotated[float, Field(ge=-20.0, le=20.0)] = 0.0
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5


class NetworkConfig(BaseModel):
    """Everything that rebuilds a network, kept in `bundle.json`.

    Attributes:
        kind: `resnet50` is torchvision's with one logit; `idc-2016` the three-convolution network of J Pathol Inform
            2016;7:29.
        tile_px: side of the tiles that come in, pixels.
        input_px: side that the body works at, pixels; tiles of another size are resized, with antialiasing.
        activation: of every block.
        stem: `standard` is ResNet's (stride 2, then pooling); `stride-1` keeps the pooling and not the stride;
            `no-pool` the stride and not the pooling. The gentle ones cost about four times as much.
        contrast: `stretch` spreads each tile's values over the full range, all channels alike.
        flips: `averaged` gives the mean logit of a tile and its three mirror images, at four times the cost.
        mean: subtracted from each channel, values in 0..1.
        std: each channel is divided by it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Kind = "resnet50"
    tile_px: Annotated[TilePx, Field(ge=8, le=4096)] = TilePx(50)
    input_px: Annotated[int, Field(ge=8, le=1024)] = 50
    activation: Activation = "relu"
    stem: Stem = "standard"
    contrast: Contrast = "none"
    flips: Flips = "none"
    mean: tuple[float, float, float] = (0.81, 0.69, 0.77)
    std: tuple[float, float, float] = (0.16, 0.21, 0.16)


class Known(BaseModel):
    """What a bundle answers to the made tiles (`model/known.py`), by its float32 weights where it was written.

    Attributes:
        tiles: checksum of those tiles: answers to others say nothing.
        probability: of each tile, as the model gives it; of more than two classes one a class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tiles: str
    probability: tuple[float, ...] | tuple[tuple[float, ...], ...]
