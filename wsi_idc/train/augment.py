"""Augmentation of whole batches: one affine sampling, one matrix on optical densities.

All draws come from the generator that is passed in, so that a step's tiles depend on the seed and the step alone.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from wsi_idc.train.settings import Augmentation

STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical density (R, G, B) of haematoxylin, eosin and the residue (Ruifrok & Johnston, 2001, PMID 11531144)."""


def augment(tiles: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """A varied batch: float32 (n, 3, h, w) RGB in 0..1, from uint8 (n, h, w, 3) RGB."""
    images = tiles.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
    return jitter_stain(_move(images, how, generator), how, generator)


def _uniform(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Float32 in -1..1."""
    return torch.rand(shape, generator=generator, device=like.device).mul_(2.0).sub_(1.0)


def affine_matrices(count: int, how: Augmentation, generator: torch.Generator, like: Tensor) -> Tensor:
    """Output-to-input maps in the unit square of -1..1: float32 (n, 2, 3)."""
    angle = _uniform(generator, like, count) * math.radians(how.rotation_deg)
    flip = torch.ones(count, device=like.device)
    if how.mirror != "none":
        turn = torch.randint(0, 8, (count,), generator=generator, device=like.device)
        flip = 1.0 - 2.0 * (turn >= 4)
        if how.mirror == "all":
            angle = angle + (turn % 4) * (math.pi / 2)
    shear = torch.tan(_uniform(generator, like, count) * math.radians(how.shear_deg))
    zoom = _uniform(generator, like, count) * math.log1p(how.zoom)
    aspect = _uniform(generator, like, count) * (0.1 * math.log1p(how.zoom))
    along, across = torch.exp(zoom + aspect), torch.exp(zoom - aspect)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    shift = _uniform(generator, like, count, 2) * (2.0 * how.shift)
    first = torch.stack([flip * cosine * along, (flip * cosine * shear - flip * sine) * across, shift[:, 0]], dim=1)
    second = torch.stack([sine * along, (sine * shear + cosine) * across, shift[:, 1]], dim=1)
    return torch.stack([first, second], dim=1)


def _move(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    if not (how.rotation_deg or how.shift or how.shear_deg or how.zoom or how.mirror != "none"):
        return images
    matrices = affine_matrices(len(images), how, generator, images)
    grid = affine_grid(matrices, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode=how.edge, align_corners=False)


def jitter_stain(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Stains, channels and brightness changed in optical density: float32 (n, 3, h, w) in 0..1."""
    if not (how.stain or how.colour or how.brightness):
        return images
    count = len(images)
    stains = torch.tensor(STAINS, device=images.device)
    factors = torch.diag_embed(1.0 + _uniform(generator, images, count, 3) * how.stain)
    matrix = torch.linalg.inv(stains) @ factors @ stains
    matrix = matrix * (1.0 + _uniform(generator, images, count, 1, 3) * how.colour)
    offset = _uniform(generator, images, count, 1, 1) * how.brightness
    density = -torch.log(images.mul(255.0).add_(1.0).div_(256.0)).flatten(2)
    density = torch.baddbmm(offset, matrix.transpose(1, 2), density).clamp_(min=0.0)
    return torch.exp(-density).reshape(images.shape)


def mix(images: Tensor, labels: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., ICLR 2018, arXiv:1710.09412): each tile blended with another of the batch.

    Args:
        images: float32 (n, 3, h, w).
        labels: float32 (n,) in 0..1.
        alpha: parameter of the symmetric Beta distribution.
        generator: where the draws come from.
    """
    seed = int(torch.randint(0, 2**62, (), generator=generator, device=generator.device))
    import numpy as np

    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = torch.randperm(len(images), generator=generator, device=images.device)
    return torch.lerp(images[other], images, share), torch.lerp(labels[other], labels, share)
