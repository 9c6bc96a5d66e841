"""`EvaluatedClassifier`: an image classifier of many parties, and its evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from split_lightning.channel import Traffic
from split_lightning.data.loader import ClientBatch
from split_lightning.models.logits import described, logits_in
from split_lightning.parties import Parties
from split_lightning.processes import summed
from split_lightning.replicas import Replicas


class EvaluatedClassifier(pl.LightningModule):
    """Evaluates the networks that parties hold; subclasses train them.

    Each client validates its own samples with its own network. The test set is put to
    each network that differs, and what is logged is the mean over them.

    Args:
        num_classes: Number of classes.
        criterion: The loss of logits `(B, K)` and labels `(B,)`; `None`: cross-entropy.
        channels_last: Whether images and weights are laid out channels-last in memory
            (faster on most devices; the same results but for rounding).
        parties: Who holds which weights.
    """

    def __init__(
        self,
        num_classes: int,
        criterion: nn.Module | None,
        channels_last: bool,
        parties: Parties,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.parties = parties
        self.more_clients = nn.ModuleList()  # live at once with the first
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self._metrics = {
            "val": (self.val_loss, self.val_accuracy),
            "test": (self.test_loss, self.test_accuracy),
        }
        # Of each client's own validation share: those that are right, and all.
        self._right: dict[int, tuple[Tensor | int, int]] = {}
        self.client_accuracies: dict[int, float] = {}  # of the last validation
        self.memory_format = (
            torch.channels_last if channels_last else torch.contiguous_format
        )

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of images `(B, C, H, W)`."""

    def logits_of(self, returned: Any) -> Tensor:
        """Returns the logits `(B, K)` in what the network returns.

        Of a mapping, such as a `ModelOutput` of Hugging Face, those under `logits`.

        Raises:
            ValueError: If it returns something else; says what.
        """
        logits = logits_in(returned)
        if isinstance(logits, Tensor) and logits.ndim == 2:
            return logits
        raise ValueError(
            "Expected the network to return logits of shape "
            f"(N, {self.num_classes}), but it returned {described(logits)}. Return the "
            "logits alone: wrap the network in a module that does."
        )

    @property
    def clients(self) -> Replicas:
        """The clients' segments, those that wait among them."""
        return self.parties.clients

    @property
    def traffic(self) -> Traffic:
        """The bytes that would have travelled so far, as this process counts them."""
        return self.parties.traffic

    @abstractmethod
    def segments(self) -> dict[str, nn.Module]:
        """Returns the parts of the network, by the party that holds them."""

    def stages(self, client_id: int | None = None) -> dict[str, nn.Module]:
        """Returns what computes one after the other, from images to logits.

        Args:
            client_id: Of which client's network; `None`: of that in place.
        """
        return self.segments()

    def places(self, client_id: int) -> list[nn.Module]:
        """Returns what computes one after the other for a client, each by itself.

        Of all clients there are as many.
        """
        return list(self.segments().values())

    def make_room(self, num_clients: int) -> None:
        """Makes room for so many clients' segments to be live at once.

        A checkpoint of clients that act together has as many.
        """
        for piece in self.parties.pieces.values():
            self.more_clients.extend(piece.make_room(num_clients))

    @override
    def validation_step(self, batch: ClientBatch, batch_idx: int) -> Tensor | None:
        if not isinstance(batch, ClientBatch):
            raise ValueError(
                "Expected batches of a SplitDataModule to validate on, which say whose "
                f"they are, but got {type(batch).__name__}. Pass datamodule=data."
            )
        self.parties.show(batch.client_id)  # each client validates its own
        targets = batch.targets
        logits = self._evaluate("val", batch.inputs, targets)
        right, count = self._right.get(batch.client_id, (0, 0))
        if logits is not None:
            right = right + (logits.argmax(dim=1) == targets).sum()
        self._right[batch.client_id] = (right, count + len(targets))
        return logits  # for callbacks

    @override
    def on_validation_epoch_end(self) -> None:
        self.parties.show_live()
        right, self._right = self._right, {}
        if right and not self.trainer.sanity_checking:
            counts = [[int(r), n] for r, n in right.values()]
            of_all = summed(self.trainer, torch.tensor(counts)).tolist()
            self.client_accuracies = {
                k: r / n for k, (r, n) in zip(right, of_all, strict=True)
            }
            self._log_by_client("accuracy", self.client_accuracies)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Tests the network; where clients differ each one's, for the mean over them.

        Returns:
            The logits of each network in turn, `(networks * B, K)`.
        """
        clients = self.parties.representatives()
        if not clients:
            return self._evaluate("test", *batch)
        found = []
        for client_id in clients:
            self.parties.show(client_id)
            found.append(self._evaluate("test", *batch))
        logits = [own for own in found if own is not None]
        return torch.cat(logits) if logits else None

    @override
    def on_test_epoch_end(self) -> None:
        self.parties.show_live()

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        probabilities: Tensor = self(inputs).softmax(dim=1)
        return probabilities

    def laid_out(self, inputs: Tensor) -> Tensor:
        """Returns images `(B, C, H, W)` in the memory layout of the weights."""
        if inputs.ndim != 4:  # only images have channels to put last
            return inputs
        return inputs.contiguous(memory_format=self.memory_format)

    def fed(self, inputs: Tensor) -> Tensor:
        """Returns inputs on the device, in the precision and layout of the weights."""
        weights = next((p for p in self.parameters() if p.is_floating_point()), inputs)
        dtype = weights.dtype if inputs.is_floating_point() else inputs.dtype
        return self.laid_out(inputs.to(weights.device, dtype))

    def _log_by_client(self, name: str, values: Mapping[int, Tensor | float]) -> None:
        # Past `self.log`, which would look at each client's metric in each batch.
        metrics = {client_metric(k, name): float(v) for k, v in values.items()}
        monitored = {key: torch.tensor(value) for key, value in metrics.items()}
        self.trainer.callback_metrics.update(monitored)
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        if not self.trainer.validating:
            step -= 1  # Lightning logs a round's metrics at its last batch
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def _evaluate(self, part: str, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Returns the logits; `None` where this process has no share of the batch."""
        loss, accuracy = self._metrics[part]
        logits: Tensor | None = None
        if len(targets):
            logits = self(inputs)
            accuracy.update(logits, targets)
            loss.update(self.criterion(logits, targets), len(targets))
        count = len(targets)
        self.log(f"{part}/loss", loss, batch_size=count, prog_bar=part == "val")
        self.log(f"{part}/accuracy", accuracy, batch_size=count, prog_bar=True)
        return logits


def client_metric(client_id: int, name: str) -> str:
    """Returns the name of a metric of one client."""
    return f"clients/{name}/{client_id}"
