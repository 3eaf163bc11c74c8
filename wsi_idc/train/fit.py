"""Lightning's trainer over prepared tiles: loggers, checkpoints, early stop, several devices."""

import json
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from wsi_idc.errors import UsageError, WsiIdcError
from wsi_idc.model.network import TileNetwork
from wsi_idc.train.callbacks import AveragedWeights, Lines, WholeCheckpoints, read_checkpoint
from wsi_idc.train.data import Batches, Order, Say
from wsi_idc.train.module import Training
from wsi_idc.train.outputs import put_json
from wsi_idc.train.settings import Recipe, TrainSettings

VAL_BATCH = 256


class Tiles(pl.LightningDataModule):  # type: ignore[misc]
    """Loaders of prepared tiles; the order of training tiles depends on the seed and the epoch alone."""

    def __init__(
        self,
        pixels: Mapping[str, NDArray[np.uint8]],
        targets: Mapping[str, NDArray[np.float32]],
        batch_size: int,
        settings: TrainSettings,
    ) -> None:
        super().__init__()
        self.pixels, self.targets = pixels, targets
        self.batch_size, self.settings = batch_size, settings

    def order(self, rank: int = 0, world: int = 1) -> Order:
        """The training batches of one process."""
        targets = self.targets["train"]
        positive = targets >= 0.5 if self.settings.balance == "sampling" else None
        return Order(len(targets), self.batch_size, seed=self.settings.seed, positive=positive, rank=rank, world=world)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches."""
        order = self.order(self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(Batches(self.pixels["train"], self.targets["train"]), sampler=order, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches in order."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        order = Order(len(self.targets["val"]), VAL_BATCH, seed=None, rank=rank, world=world)
        return DataLoader(Batches(self.pixels["val"], self.targets["val"]), sampler=order, batch_size=None)


def fit(
    network: TileNetwork,
    settings: TrainSettings,
    recipe: Recipe,
    pixels: Mapping[str, NDArray[np.uint8]],
    targets: Mapping[str, NDArray[np.float32]],
    work: Path,
    say: Say,
    *,
    progress: bool,
) -> int:
    """Train a network in place, to the weights of its best epoch; a run that was broken off goes on.

    Args:
        network: what is trained.
        settings: what the user said.
        recipe: the settings, resolved.
        pixels: `train` and `val`, uint8 (n, size, size, 3) RGB.
        targets: `train` and `val`, float32 (n,) in 0..1.
        work: where checkpoints and logs are.
        say: takes lines for the user.
        progress: draw a progress bar.

    Returns:
        Epochs that were trained.

    Raises:
        UsageError: a checkpoint is damaged.
        WsiIdcError: the disk is full.
        KeyboardInterrupt: interrupted; the last checkpoint is whole.
    """
    last, best, trained = work / "last.ckpt", work / "best.ckpt", work / "trained.json"
    if not trained.exists():
        data = Tiles(pixels, targets, recipe.batch_size, settings)
        module = Training(
            network,
            recipe,
            seed=settings.seed,
            steps=len(data.order()) * recipe.epochs,
            positive_weight=_positive_weight(targets["train"], settings),
        )
        start = read_checkpoint(last)["epoch"] + 1 if last.exists() else 0
        if start:
            say(f"going on after epoch {start}")
        trainer = _trainer(settings, recipe, work, say, progress=progress)
        with _quiet(), _own_group(trainer):
            try:
                trainer.fit(module, data, ckpt_path=str(last) if start else None, weights_only=True)
            except SystemExit:
                if trainer.interrupted:
                    raise KeyboardInterrupt from None
                raise
            except OSError as error:
                reason, advice = error.strerror or error, "the last checkpoint is whole: mend that, then --resume"
                raise WsiIdcError(work, f"training stopped ({reason})", advice) from error
        if not trainer.is_global_zero:
            return int(trainer.current_epoch)
        put_json(trained, {"epochs": trainer.current_epoch})
    state = read_checkpoint(best)["state_dict"]
    prefix = "network."
    network.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if prefix in key[:8]})
    epochs: int = json.loads(trained.read_text(encoding="utf-8"))["epochs"]
    return epochs


def _positive_weight(targets: NDArray[np.float32], settings: TrainSettings) -> float:
    share = float(targets.mean())
    return (1.0 - share) / share if settings.balance == "weights" else 1.0


def _trainer(settings: TrainSettings, recipe: Recipe, work: Path, say: Say, *, progress: bool) -> pl.Trainer:
    mode = "max" if recipe.monitor == "val_auc" else "min"
    checkpoint = ModelCheckpoint(
        dirpath=work,
        filename="best",
        monitor=recipe.monitor,
        mode=mode,
        save_top_k=1,
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    callbacks: list[Callback] = [checkpoint]
    if recipe.patience:
        callbacks.append(EarlyStopping(monitor=recipe.monitor, mode=mode, patience=recipe.patience))
    if recipe.ema:
        callbacks.append(AveragedWeights(recipe.ema))
    callbacks.append(RichProgressBar() if progress else Lines(say, recipe.batch_size))
    devices = settings.gpus or settings.processes
    if recipe.batch_size % devices:
        problem = f"{recipe.batch_size} tiles cannot be shared evenly by {devices} devices"
        raise UsageError("--batch-size", problem, "give a multiple")
    attempt = len(list((work / "logs").glob("*")))
    with _quiet():
        return pl.Trainer(
            accelerator="gpu" if settings.gpus else "cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision="16-mixed" if settings.gpus else "32-true",
            max_epochs=recipe.epochs,
            callbacks=callbacks,
            plugins=[WholeCheckpoints()],
            logger=[
                CSVLogger(work, name="logs", version=f"{attempt:03d}"),
                TensorBoardLogger(work, name="tensorboard", version=""),
            ],
            log_every_n_steps=50,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            default_root_dir=work,
        )


@contextmanager
def _own_group(trainer: pl.Trainer) -> Iterator[None]:
    """Helper processes for one training alone: afterwards they have ended, and this process is as it was before.

    Lightning leaves LOCAL_RANK and the group's address in the environment. A second training in this process would take
    them for a sign that somebody else starts its helpers, start none, and wait for them without end.
    """
    before = dict(os.environ)
    try:
        yield
        if torch.distributed.is_initialized():
            # All have come here, so that no helper finds its group gone in the middle of a last exchange.
            trainer.strategy.barrier()
            torch.distributed.destroy_process_group()
            for helper in trainer.strategy.launcher.procs:
                helper.wait()
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's banners and hints out of the user's terminal, and an interrupt what it was."""
    handler = signal.getsignal(signal.SIGINT)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)
