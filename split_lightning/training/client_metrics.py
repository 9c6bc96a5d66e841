"""`ClientMetrics`: losses and accuracies of each client, and how they are logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from torch import Tensor

from split_lightning.callbacks.logs import is_logged, log_metrics
from split_lightning.data.loader import ClientBatch
from split_lightning.processes import summed
from split_lightning.step import StepLosses
from split_lightning.training.round_losses import RoundLosses

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule


class ClientMetrics:
    """Keeps each client's training loss of the round, and its validation accuracy.

    Attributes:
        losses: The training losses of the round so far.
        accuracies: The accuracy of each client on its own samples, in the last
            validation.
    """

    def __init__(self) -> None:
        self.losses = RoundLosses()
        self.accuracies: dict[int, float] = {}
        # Of each client's own validation share: those that are right, and all.
        self._right: dict[int, tuple[Tensor | int, int]] = {}

    def add(
        self, trainer: pl.Trainer, parts: Sequence[ClientBatch], losses: StepLosses
    ) -> None:
        """Adds the losses of a step; logs `train/batch_loss` where loggers are due."""
        for part, own in zip(parts, losses.own, strict=True):
            self.losses.add(part.client_id, own, part.num_samples)
        is_due = is_logged(trainer)
        # Past `self.log`, which would cost more than the rest of the step's own work.
        if is_due or trainer.is_last_batch:
            loss = losses.total
            if trainer.world_size > 1:
                loss = summed(trainer, loss * parts[0].share)
            trainer.callback_metrics["train/batch_loss"] = loss
            if is_due:
                log_metrics(trainer, {"train/batch_loss": float(loss)})

    def end_round(self, module: SplitLightningModule) -> None:
        """Logs each client's loss, and begins the next round."""
        losses = self.losses.by_client(module.trainer)
        _log(module.trainer, "loss", losses)
        self.losses = RoundLosses()

    def add_logits(self, batch: ClientBatch, logits: Tensor | None) -> None:
        """Counts a client's right predictions on its own samples."""
        right: Tensor | int = 0
        if logits is not None:
            right = (logits.argmax(dim=1) == batch.targets).sum()
        self.add_right(batch, right)

    def add_right(self, batch: ClientBatch, right: Tensor | int) -> None:
        """Adds the number of a client's right predictions on its own samples."""
        before, count = self._right.get(batch.client_id, (0, 0))
        self._right[batch.client_id] = (before + right, count + len(batch.targets))

    def end_validation(self, module: SplitLightningModule) -> None:
        """Logs each client's accuracy."""
        right, self._right = self._right, {}
        if right and not module.trainer.sanity_checking:
            counts = [[int(r), n] for r, n in right.values()]
            of_all = summed(module.trainer, torch.tensor(counts)).tolist()
            self.accuracies = {
                k: r / n for k, (r, n) in zip(right, of_all, strict=True)
            }
            _log(module.trainer, "accuracy", self.accuracies)


def client_metric(client_id: int, name: str) -> str:
    """Returns the name of a metric of one client."""
    return f"clients/{name}/{client_id}"


def _log(trainer: pl.Trainer, name: str, values: Mapping[int, Tensor | float]) -> None:
    # Past `self.log`, which would process each client's metric in each batch.
    metrics = {client_metric(k, name): float(v) for k, v in values.items()}
    monitored = {key: torch.tensor(value) for key, value in metrics.items()}
    trainer.callback_metrics.update(monitored)
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    if not trainer.validating:
        step -= 1  # Lightning logs a round's metrics at its last batch
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)
