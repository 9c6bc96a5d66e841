"""`Classifier`: what split and unsplit training have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override


class Classifier(pl.LightningModule):
    """Evaluation and logging of an image classifier; subclasses say how it trains.

    Args:
        num_classes: Number of classes.
        criterion: The loss of logits `(B, K)` and labels `(B,)`; `None`: cross-entropy.
        channels_last: Whether images and weights are laid out channels-last in memory
            (faster on most devices; the same results but for rounding).
    """

    def __init__(
        self, num_classes: int, criterion: nn.Module | None, channels_last: bool
    ) -> None:
        super().__init__()
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.memory_format = (
            torch.channels_last if channels_last else torch.contiguous_format
        )

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of images `(B, C, H, W)`."""

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", self.val_accuracy, batch)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", self.test_accuracy, batch)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(inputs).softmax(dim=1)

    def laid_out(self, inputs: Tensor) -> Tensor:
        """Returns images `(B, C, H, W)` in the memory layout of the weights."""
        if inputs.ndim != 4:  # only images have channels to put last
            return inputs
        return inputs.contiguous(memory_format=self.memory_format)

    def log_training(self, client_id: int, loss: Tensor, batch_size: int) -> None:
        """Logs a training batch's mean loss, by round and by client."""
        names = ["train/loss", f"client_{client_id}/loss"]
        self.log_dict(
            dict.fromkeys(names, loss.detach()),
            on_step=False,
            on_epoch=True,
            batch_size=batch_size,
        )
        self.log("train/batch_loss", loss.detach(), batch_size=batch_size, prog_bar=True)

    def _evaluate(
        self, part: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]
    ) -> None:
        inputs, targets = batch
        logits = self(inputs)
        accuracy.update(logits, targets)
        loss = self.criterion(logits, targets)
        self.log(f"{part}/loss", loss, batch_size=len(targets), prog_bar=part == "val")
        self.log(f"{part}/accuracy", accuracy, batch_size=len(targets), prog_bar=True)
