"""`UnsplitLightningModule`: the unsplit network, for the baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from split_lightning.classifier import Classifier
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.loader import ClientBatch
from split_lightning.finite import NonFinitePolicy
from split_lightning.kinds import CLIENT
from split_lightning.optimizers import (
    OptimizerFactory,
    SchedulerFactory,
    make_optimizer,
    make_scheduler,
)
from split_lightning.parties import Parties
from split_lightning.piece import Piece
from split_lightning.replicas import Buffers, OptimizerState, Replicas
from split_lightning.spill import SpillFolder
from split_lightning.support import (
    require_one_process,
    require_processes,
    require_weight_passing,
)

# Kept in checkpoints: plain values, so that `weights_only=True` loads them.
_HYPERPARAMETERS = (
    "num_classes",
    "scheduler_interval",
    "channels_last",
    "non_finite",
    "optimizer_state",
    "buffers",
)


class UnsplitLightningModule(Classifier):
    """Trains the unsplit network, with Lightning's own automatic optimization.

    No code of splitting is involved, so that it is a baseline to trust: of one party
    that has all samples (`PooledSchedule`), of clients that are averaged
    (`ClientAveraging`: federated averaging), or of clients that are each alone.

    Args:
        network: The network: images `(B, C, H, W)` to logits `(B, K)`.
        optimizer: Makes the optimizer of the network's parameters.
        num_classes: Number of classes.
        scheduler: Makes the learning-rate scheduler.
        scheduler_interval: When the scheduler steps: each `batch`, or each `round`.
        criterion: The loss; `None`: cross-entropy.
        channels_last: Whether images and weights are laid out channels-last.
        non_finite: Whether a batch whose loss or gradients are not finite is to `stop`
            the run, or to be left out (`skip`).
        optimizer_state: What becomes of the optimizer's state when weights come from
            elsewhere: `keep` (each client has its own), `travel` or `reset`.
        buffers: Whether averaging takes buffers (BatchNorm's statistics) along
            (`average`), or each client has its own (`keep`).
        spill_to: A folder in whose files what clients that wait must remember (weights,
            buffers, optimizer states) is kept in the place of memory; all of it is
            removed in the end. `None`: in memory. A checkpoint holds all of it, and is
            made in memory.
    """

    optimizer_names = ("server",)

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerFactory,
        num_classes: int,
        scheduler: SchedulerFactory | None = None,
        scheduler_interval: Literal["batch", "round"] = "round",
        criterion: nn.Module | None = None,
        channels_last: bool = False,
        non_finite: NonFinitePolicy = "stop",
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
        spill_to: str | Path | None = None,
    ) -> None:
        spill = None if spill_to is None else SpillFolder(spill_to)
        store = dict if spill is None else spill.store

        def replicas(segment: nn.Module) -> Replicas:
            return Replicas(segment, optimizer_state, buffers, store)

        piece = Piece(CLIENT, network, {"client": replicas})
        parties = Parties([piece], spill=spill)
        super().__init__(num_classes, criterion, channels_last, non_finite, parties)
        self.save_hyperparameters(*_HYPERPARAMETERS, logger=False)
        self.network = network.to(memory_format=self.memory_format)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self._lr = 0.0

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of images `(B, C, H, W)`."""
        return self.logits_of(self.network(self.laid_out(inputs)))

    @override
    def segments(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    @override
    def verify(self, trainer: pl.Trainer, data: pl.LightningDataModule | None) -> None:
        require_processes(trainer)
        require_one_process(trainer, data)
        if isinstance(data, SplitDataModule) and data.schedule.acts_together:
            raise MisconfigurationException(
                "Clients that each train a whole network act one at a time, and with "
                f"{type(data.schedule).__name__} several would in each step. Use "
                "RoundRobinSchedule; they do not meet within a round."
            )
        require_weight_passing(trainer, data, self.clients.optimizer_state)

    @override
    def training_step(self, batch: ClientBatch, batch_idx: int) -> Tensor:
        self.check_turn(batch)
        # Noted here: at the round's end Lightning has stepped the scheduler already.
        self._lr = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss: Tensor = self.criterion(self(batch.inputs), batch.targets)
        self._computed = (batch, batch_idx, loss.detach())
        # Lightning averages the gradients of several processes.
        return loss * (batch.share * self.trainer.world_size)

    @override
    def on_after_backward(self) -> None:
        batch, batch_idx, loss = self._computed
        computed = {
            "the loss": (loss,),
            "the gradient": [p.grad for p in self.parameters()],
        }
        if self.accepts(batch, batch_idx, computed):
            self.end_of_step(batch, [loss], batch_idx)

    @override
    def optimizers_of(self) -> dict[str, Optimizer]:
        return {"client": self.trainer.optimizers[0]}

    @override
    def is_accumulating(self) -> bool:
        return self.trainer.fit_loop._should_accumulate()

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("lr/server", self._lr)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer("server", self.optimizer, self.network)
        if self.scheduler is None:
            return optimizer
        interval = "step" if self.scheduler_interval == "batch" else "epoch"
        scheduler = make_scheduler(self.scheduler, optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval},
        }
