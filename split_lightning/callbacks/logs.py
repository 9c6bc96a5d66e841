"""Logging past `self.log`, which would cost time in every batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


def is_logged(trainer: pl.Trainer) -> bool:
    """Returns whether loggers are due in this batch: `trainer.log_every_n_steps`."""
    if not trainer.loggers:
        return False
    due: bool = trainer._logger_connector.should_update_logs  # as Lightning's monitors
    return due or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Gives metrics to all loggers, at the step of the current batch."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step)


def log_figure(trainer: pl.Trainer, tag: str, figure: Figure) -> None:
    """Gives a picture to the loggers that show pictures: TensorBoard, W&B, MLflow."""
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [figure], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{tag}.png")


def tensorboard_writers(trainer: pl.Trainer) -> Iterator[SummaryWriter]:
    """Yields TensorBoard's writers, in the process that writes."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield logger.experiment
