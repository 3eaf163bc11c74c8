"""What runs beside the training loop: checkpoints that are whole or absent, averaged weights, lines for people."""

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from wsi_idc.errors import UsageError, WsiIdcError
from wsi_idc.files import whole_file
from wsi_idc.train.data import Say


class WholeCheckpoints(TorchCheckpointIO):  # type: ignore[misc]
    """Checkpoints written beside their place and renamed, and read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; an older one stays as it was until the new one is whole.

        Raises:
            WsiIdcError: the disk is full, or cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            advice = "the checkpoint before it is whole: make room, then --resume"
            raise WsiIdcError(path, f"checkpoint cannot be written ({reason})", advice) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """A checkpoint's contents.

        Raises:
            UsageError: the file is damaged.
        """
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, tensors and plain types only.

    Raises:
        UsageError: the file is absent or damaged.
    """
    try:
        contents: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        contents["state_dict"]
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UsageError(path, f"damaged checkpoint ({line})", "remove it and train anew, or copy it back") from error
    return contents


class AveragedWeights(WeightAveraging):  # type: ignore[misc]
    """An exponential moving average of the weights, which forgets its start: decay min(decay, (1 + n) / (10 + n))."""

    def __init__(self, decay: float) -> None:
        def average(means: list[Tensor], values: list[Tensor], count: Tensor) -> None:
            steps = float(count)
            share = 1.0 - min(decay, (1.0 + steps) / (10.0 + steps))
            if means[0].is_floating_point():
                torch._foreach_lerp_(means, values, share)
            else:
                torch._foreach_copy_(means, values)

        super().__init__(use_buffers=True, multi_avg_fn=average)


class Lines(Callback):  # type: ignore[misc]
    """A line an epoch: loss, AUC, rate, time left."""

    def __init__(self, say: Say, batch_size: int) -> None:
        self._say, self._batch_size = say, batch_size
        self._start = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how the epoch went."""
        if not trainer.is_global_zero:
            return
        seconds = time.monotonic() - self._start
        figures = {"train_loss": math.nan, "val_loss": math.nan, "val_auc": math.nan}
        figures |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs
        rate = trainer.num_training_batches * self._batch_size / seconds
        self._say(
            f"epoch {done} of {epochs}: loss {figures['train_loss']:.4f}, "
            f"val loss {figures['val_loss']:.4f}, val AUC {figures['val_auc']:.4f}, "
            f"{rate:,.0f} tiles/s, about {(epochs - done) * seconds / 60:,.0f} min left"
        )
