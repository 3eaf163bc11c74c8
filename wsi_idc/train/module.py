"""The training step, validation and optimiser, as Lightning asks for them."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAUROC

from wsi_idc.model.network import TileNetwork
from wsi_idc.train.augment import augment, mix
from wsi_idc.train.settings import AUGMENTATIONS, Recipe


class Training(pl.LightningModule):  # type: ignore[misc]
    """A network in training.

    Args:
        network: what is trained.
        recipe: how.
        seed: of every draw; a step's draws depend on it, the step and the rank alone.
        steps: optimiser steps in the whole run.
        positive_weight: weight of a positive tile's loss.
    """

    def __init__(
        self, network: TileNetwork, recipe: Recipe, *, seed: int, steps: int, positive_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.network, self.recipe, self.seed, self.steps = network, recipe, seed, steps
        self.register_buffer("positive_weight", torch.tensor(positive_weight), persistent=False)
        self.auc = BinaryAUROC()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch, after augmentation."""
        tiles, targets = batch
        generator = torch.Generator(device=tiles.device)
        generator.manual_seed((self.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank)
        with torch.no_grad(), torch.autocast(tiles.device.type, enabled=False):
            images = augment(tiles, AUGMENTATIONS[self.recipe.augmentation], generator)
            targets = targets * (1.0 - self.recipe.smoothing) + 0.5 * self.recipe.smoothing
            if self.recipe.mixup:
                images, targets = mix(images, targets, self.recipe.mixup, generator)
        self.log("lr", self.optimizers().param_groups[0]["lr"], on_step=False, on_epoch=True, batch_size=len(tiles))
        logits = self.network.logits(images).float()
        loss = binary_cross_entropy_with_logits(logits, targets, pos_weight=self.positive_weight)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(tiles), sync_dist=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Loss and AUC of tiles as they are."""
        tiles, labels = batch
        if not len(tiles):
            return
        logits = self.network(tiles).float()
        loss = binary_cross_entropy_with_logits(logits, labels)
        self.auc.update(torch.sigmoid(logits), labels.long())
        self.log("val_loss", loss, on_epoch=True, batch_size=len(tiles), sync_dist=True, prog_bar=True)
        self.log("val_auc", self.auc, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """The recipe's optimiser and schedule."""
        recipe = self.recipe
        if recipe.optimizer == "rmsprop":
            optimizer: torch.optim.Optimizer = torch.optim.RMSprop(
                self.network.parameters(), recipe.lr, alpha=0.9, weight_decay=recipe.weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(decay_groups(self.network, recipe.weight_decay), recipe.lr, fused=True)
        if recipe.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="max" if recipe.monitor == "val_auc" else "min", factor=0.5, patience=3, min_lr=1e-6
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": recipe.monitor, "interval": "epoch"},
            }
        cycle = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def one_cycle(step: int, steps: int) -> float:
    """Part of the greatest rate at a step: up in a line for a tenth of the run, then down by a cosine to nought."""
    rise = max(1, round(steps / 10))
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices and kernels decay, biases and normalisation do not."""
    parameters = list(network.parameters())
    return [
        {"params": [value for value in parameters if value.ndim > 1], "weight_decay": weight_decay},
        {"params": [value for value in parameters if value.ndim <= 1], "weight_decay": 0.0},
    ]
