"""`Task`: the loss and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from split_lightning.models.logits import described, logits_in


class Task(nn.Module):
    """Classification: a loss of logits `(B, K)` and labels `(B,)`, and the accuracy.

    Args:
        num_classes: Number of classes.
        criterion: The loss; `None`: cross-entropy.

    Attributes:
        metrics: Loss and accuracy, for `val` and `test`.
    """

    def __init__(self, num_classes: int, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.is_plain = criterion is None
        self.metrics = nn.ModuleDict(
            {
                part: nn.ModuleDict(
                    {
                        "loss": MeanMetric(),
                        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                    }
                )
                for part in ("val", "test")
            }
        )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss over all samples."""
        loss: Tensor = self.criterion(logits, targets)
        return loss

    def losses(
        self, total: Tensor, parts: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> list[Tensor]:
        """Returns each client's mean loss, to be logged.

        Args:
            total: The mean over all of them.
            parts: For each client its logits.
            targets: For each client its labels.
        """
        if len(parts) == 1:
            return [total]
        with torch.no_grad():
            if not self.is_plain:
                return [self.loss(*pair) for pair in zip(parts, targets, strict=True)]
            each = F.cross_entropy(
                torch.cat(list(parts)), torch.cat(list(targets)), reduction="none"
            )
            sizes = [len(own) for own in targets]
            return [own.mean() for own in torch.split(each, sizes)]

    def logits(self, outputs: Any) -> Tensor:
        """Returns the logits `(B, K)` in what the network returns.

        Of a mapping, such as a `ModelOutput` of Hugging Face, those under `logits`.

        Raises:
            ValueError: If it returns something else; says what.
        """
        logits = outputs
        if isinstance(logits, tuple) and len(logits) == 1:
            logits = logits[0]
        if not isinstance(logits, Tensor):
            logits = logits_in(logits)
        if isinstance(logits, Tensor) and logits.ndim == 2:
            return logits
        raise ValueError(
            "Expected the network to return logits of shape "
            f"(N, {self.num_classes}), but it returned {described(logits)}. Return the "
            "logits alone: wrap the network in a module that does."
        )
