"""`SplitLightningModule`: a network that a client and a server train together."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from split_lightning.channel import CutLayerChannel, Traffic, values_of
from split_lightning.classifier import (
    Classifier,
    OptimizerFactory,
    SchedulerFactory,
    make_optimizer,
    make_scheduler,
)
from split_lightning.clients import ClientStates, OptimizerState
from split_lightning.data.loader import ClientBatch
from split_lightning.finite import NonFinitePolicy
from split_lightning.models.split import split
from split_lightning.processes import summed
from split_lightning.support import (
    WEIGHT_PASSING_REMEDY,
    refuse_unsupported,
    require_weight_passing,
)

# Kept in checkpoints: plain values, so that `weights_only=True` loads them.
_HYPERPARAMETERS = (
    "cut_layer",
    "num_classes",
    "scheduler_interval",
    "optimizer_state",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "channels_last",
    "non_finite",
)


class SplitLightningModule(Classifier):
    """Trains a network in two segments, which meet only at the cut.

    The protocol of Gupta and Raskar 2018 (https://arxiv.org/abs/1810.06060): the client
    sends its activations at the cut and the labels up; the server runs the rest of the
    network and the loss, and sends the gradient at the cut back. Both step after both
    backward passes. The numbers are those of the unsplit network, bit for bit.

    Batches are `ClientBatch`es. One live client segment serves all clients in turn;
    who passes weights on to whom is the business of a callback, such as
    `RoundRobinWeightPassing`.

    Args:
        network: The unsplit network: images `(B, C, H, W)` to logits `(B, K)`.
        cut_layer: The layer after which to cut it (see `split`).
        client_optimizer: Makes the optimizer of the client segment's parameters.
        server_optimizer: Makes the optimizer of the server segment's parameters.
        num_classes: Number of classes.
        client_scheduler: Makes the learning-rate scheduler of the client's optimizer.
        server_scheduler: Makes the learning-rate scheduler of the server's optimizer.
        scheduler_interval: When schedulers step: after each `batch` that stepped the
            optimizers, or each `round`.
        optimizer_state: What becomes of the client's optimizer state at a hand-off:
            `keep` (each client has its own), `travel` or `reset`.
        criterion: The loss; `None`: cross-entropy.
        gradient_clip_val: Limit for each segment's gradient, by itself (no party sees
            the other's); `None`: no limit.
        gradient_clip_algorithm: Whether the limit is for the `norm` or each `value`.
        accumulate_grad_batches: Number of batches whose gradients make a step, each
            divided by this number. A turn's last step may have fewer (and be smaller,
            as in Lightning); nothing is carried into the next turn.
        channels_last: Whether images and weights are laid out channels-last.
        non_finite: Whether a batch whose loss, smashed data or gradients are not
            finite is to `stop` the run, or to be left out (`skip`).

    Attributes:
        client: The live client segment.
        server: The server segment.
        traffic: The bytes that would have travelled so far.

    Raises:
        ValueError: If an argument is out of range, or the network cannot be cut there.

    Example::

        module = SplitLightningModule(
            resnet18(num_classes=10),
            cut_layer="layer1",
            client_optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
            server_optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
            num_classes=10,
        )
        trainer = Trainer(max_epochs=5, callbacks=[RoundRobinWeightPassing()])
        trainer.fit(module, datamodule=data)
    """

    def __init__(
        self,
        network: nn.Module,
        cut_layer: str | int,
        client_optimizer: OptimizerFactory,
        server_optimizer: OptimizerFactory,
        num_classes: int,
        client_scheduler: SchedulerFactory | None = None,
        server_scheduler: SchedulerFactory | None = None,
        scheduler_interval: Literal["batch", "round"] = "round",
        optimizer_state: OptimizerState = "keep",
        criterion: nn.Module | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
        channels_last: bool = False,
        non_finite: NonFinitePolicy = "stop",
    ) -> None:
        super().__init__(num_classes, criterion, channels_last, non_finite)
        self.save_hyperparameters(*_HYPERPARAMETERS, logger=False)
        for name, value, choices in (
            ("scheduler_interval", scheduler_interval, ("batch", "round")),
            ("gradient_clip_algorithm", gradient_clip_algorithm, ("norm", "value")),
        ):
            if value not in choices:
                raise ValueError(
                    f"Expected argument `{name}` to be one of {choices}, but got "
                    f"{value!r}."
                )
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ValueError(
                "Expected argument `gradient_clip_val` to be positive, or null for no "
                f"limit, but got {gradient_clip_val}."
            )
        if accumulate_grad_batches < 1:
            raise ValueError(
                "Expected argument `accumulate_grad_batches` to be a positive integer, "
                f"but got {accumulate_grad_batches}."
            )
        self.automatic_optimization = False
        client, server = split(network, cut_layer)
        self.client = client.to(memory_format=self.memory_format)
        self.server = server.to(memory_format=self.memory_format)
        self.client_optimizer = client_optimizer
        self.server_optimizer = server_optimizer
        self.client_scheduler = client_scheduler
        self.server_scheduler = server_scheduler
        self.scheduler_interval = scheduler_interval
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.clients = ClientStates(self.client, optimizer_state)
        self.traffic = Traffic()
        self.channel = CutLayerChannel(self.traffic)
        self._accumulated = 0

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of images `(B, C, H, W)`.

        The client segment is that of the client that trained last.
        """
        activations = self.client(self.laid_out(inputs))
        logits: Tensor = self.server(*values_of(activations))
        return logits

    @override
    def training_step(self, batch: ClientBatch, batch_idx: int) -> Tensor:
        client_id, inputs, targets, ends_turn, share = batch
        self._check_turn(client_id)
        self.channel.is_counting = share > 0

        activations = self.client(self.laid_out(inputs))  # the client's forward
        smashed = self.channel.uplink(activations)  # detached: nothing else crosses
        targets = self.channel.uplink_targets(targets)
        loss: Tensor = self.criterion(self.server(*values_of(smashed)), targets)

        # 1: down to the cut. Gradients of several processes are averaged.
        weight = share * self.trainer.world_size
        self.manual_backward(loss * weight / self.accumulate_grad_batches)
        gradients = self.channel.downlink(smashed)
        crossed = zip(values_of(activations), gradients, strict=True)
        returned = [(a, g) for a, g in crossed if g is not None]
        if returned:  # 2: on to the client, unless nothing of it trains
            torch.autograd.backward([a for a, _ in returned], [g for _, g in returned])

        computed = {
            "the smashed data": values_of(smashed),
            "the loss": (loss,),
            "the gradient of the smashed data": gradients,
            "the server's gradient": [p.grad for p in self.server.parameters()],
            "the client's gradient": [p.grad for p in self.client.parameters()],
        }
        if not self.accepts(batch, batch_idx, computed):
            self._accumulated = 0
            return loss.detach()
        self._accumulated += 1
        if self.scheduler_interval == "batch":
            self._log_learning_rates(on_step=True)
        if self._is_time_to_step(ends_turn):
            client_optimizer, server_optimizer = self._both_optimizers()
            self._clip(self.client)
            self._clip(self.server)
            # Only the server's step ticks `trainer.global_step`: one tick a step, so
            # that `max_steps` counts steps as it does for an unsplit network.
            client_step = self.trainer.strategy.optimizer_step
            client_step(client_optimizer.optimizer, _no_closure)
            server_optimizer.step()
            client_optimizer.optimizer.zero_grad()
            server_optimizer.zero_grad()
            self._after_step()
        self.end_of_step(batch, loss, batch_idx)
        return loss.detach()

    @override
    def is_accumulating(self) -> bool:
        return self._accumulated > 0

    def _is_time_to_step(self, ends_turn: bool) -> bool:
        is_full = self._accumulated == self.accumulate_grad_batches
        return is_full or ends_turn or self.trainer.is_last_batch

    def _after_step(self) -> None:
        self._accumulated = 0
        if self.scheduler_interval == "batch":
            self._step_schedulers()

    def _both_optimizers(self) -> list[LightningOptimizer]:
        """Returns the client's optimizer and the server's."""
        both = self.optimizers()
        assert isinstance(both, list)
        return both

    def _clip(self, segment: nn.Module) -> None:
        if self.gradient_clip_val is None:
            return
        if self.gradient_clip_algorithm == "norm":
            nn.utils.clip_grad_norm_(segment.parameters(), self.gradient_clip_val)
        else:
            nn.utils.clip_grad_value_(segment.parameters(), self.gradient_clip_val)

    def _step_schedulers(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()  # type: ignore[call-arg]  # needs no metric

    def _log_learning_rates(self, on_step: bool) -> None:
        both = self._both_optimizers()
        for party, optimizer in zip(("client", "server"), both, strict=True):
            lr = optimizer.param_groups[0]["lr"]
            self.log(f"lr/{party}", lr, on_step=on_step, on_epoch=not on_step)

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path is None:  # a run of its own, not the last one's rest
            self._accumulated = 0
            self.clients.forget()
            self.traffic.load_state_dict(Traffic().state_dict())

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.scheduler_interval == "round":
            self._log_learning_rates(on_step=False)
            self._step_schedulers()

    def hand_over(self, client_id: int) -> None:
        """Passes the active client's segment on to a client, and counts the bytes."""
        optimizer = self._both_optimizers()[0].optimizer
        sent = self.clients.hand_over(client_id, optimizer)
        if self.trainer.is_global_zero:  # all processes hand the same over
            self.traffic.handoff_bytes += sent
            self.traffic.handoffs += 1

    def switch_to(self, client_id: int) -> None:
        """Gives the turn to a client, which goes on from its own segment."""
        optimizer = self._both_optimizers()[0].optimizer
        self.clients.switch(client_id, optimizer)

    @override
    def segments(self) -> dict[str, nn.Module]:
        return {"client": self.client, "server": self.server}

    @override
    def totals(self) -> dict[str, int]:
        counts = self.traffic.state_dict()
        of_all = summed(self.trainer, torch.tensor(list(counts.values())))
        return dict(zip(counts, of_all.tolist(), strict=True))

    def _check_turn(self, client_id: int) -> None:
        if self.clients.active is None:
            self.clients.active = client_id
        if self.clients.active != client_id:
            raise RuntimeError(
                f"It is the turn of client {client_id}, but client "
                f"{self.clients.active} is active: nothing has passed the weights on. "
                f"{WEIGHT_PASSING_REMEDY}"
            )

    @override
    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        client = make_optimizer("client", self.client_optimizer, self.client)
        server = make_optimizer("server", self.server_optimizer, self.server)
        schedulers = [
            {"scheduler": make_scheduler(make, optimizer), "name": f"lr/{party}"}
            for party, make, optimizer in (
                ("client", self.client_scheduler, client),
                ("server", self.server_scheduler, server),
            )
            if make is not None
        ]
        return [client, server], schedulers

    @override
    def verify(self, trainer: pl.Trainer, data: pl.LightningDataModule | None) -> None:
        refuse_unsupported(trainer)
        require_weight_passing(trainer, data, self.clients.optimizer_state)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["accumulated"] = self._accumulated
        checkpoint["clients"] = self.clients.state_dict()
        checkpoint["traffic"] = self.totals()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["state_dict"].keys() != self.state_dict().keys():
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of the same network, cut "
                f"after the same layer ({self.hparams['cut_layer']!r}), but its "
                "layers differ."
            )
        super().on_load_checkpoint(checkpoint)
        self._accumulated = checkpoint["accumulated"]
        self.clients.load_state_dict(checkpoint["clients"])
        if self.has_totals:
            self.traffic.load_state_dict(checkpoint["traffic"])


def _no_closure() -> None:
    """Does nothing: gradients are there before an optimizer steps."""
