"""`SplitLightningModule`: a network that a client and a server train together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from split_lightning.callbacks.weight_passing import WeightPassing
from split_lightning.channel import Activations, CutLayerChannel, Traffic, values_of
from split_lightning.classifier import (
    Classifier,
    OptimizerFactory,
    SchedulerFactory,
    make_optimizer,
    make_scheduler,
)
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.loader import StepBatch
from split_lightning.finite import NonFinitePolicy
from split_lightning.models.split import split
from split_lightning.processes import summed
from split_lightning.replicas import SHARED, OptimizerState, Replicas
from split_lightning.server_map import ServerMap
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

    A step is that of one client (`ClientBatch`), or of several together
    (`JointBatch`), whose smashed data the server sees as one batch (Jeon and Kim 2020):
    it takes one step on their mean loss, and each gets its slice of the gradient.

    Live are the segments of those who act. Who passes weights on to whom is the
    business of a callback, such as `RoundRobinWeightPassing`.

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
        server_map: Which server serves which client; `None`: one for all.
        server_optimizer_state: The same for several servers.

    Attributes:
        client: The live client segment, the first where there are several.
        server: The live server segment.
        clients: The clients' segments, those that wait among them.
        servers: The replicas of the server segment.
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
        server_map: ServerMap | None = None,
        server_optimizer_state: OptimizerState = "keep",
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
        self.server_map = server_map or ServerMap()
        self.clients = Replicas(self.client, optimizer_state)
        self.servers = Replicas(self.server, server_optimizer_state)
        self.more_clients = nn.ModuleList()  # live at once with the first
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
    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        self._check_turn(batch)
        self.channel.is_counting = batch.share > 0

        activations = [  # each client's forward
            self.clients.seat_of(client_id)(self.laid_out(inputs))
            for client_id, inputs, *_ in batch.parts
        ]
        smashed = [self.channel.uplink(a) for a in activations]  # detached
        targets = self.channel.uplink_targets(batch.targets)
        logits = self.server(*joined(smashed))  # the server's forward, on all at once
        loss: Tensor = self.criterion(logits, targets)

        # 1: down to the cut. Gradients of several processes are averaged.
        weight = batch.share * self.trainer.world_size
        self.manual_backward(loss * weight / self.accumulate_grad_batches)
        gradients = [g for s in smashed for g in self.channel.downlink(s)]
        values = [value for a in activations for value in values_of(a)]
        returned = [
            (a, g) for a, g in zip(values, gradients, strict=True) if g is not None
        ]
        if returned:  # 2: on to the clients, unless nothing of them trains
            torch.autograd.backward([a for a, _ in returned], [g for _, g in returned])

        acting = self.clients.acting()
        computed = {
            "the smashed data": [value for s in smashed for value in values_of(s)],
            "the loss": (loss,),
            "the gradient of the smashed data": gradients,
            "the server's gradient": [p.grad for p in self.server.parameters()],
            "the client's gradient": [p.grad for c in acting for p in c.parameters()],
        }
        if not self.accepts(batch, batch_idx, computed):
            self._accumulated = 0
            return loss.detach()
        self._accumulated += 1
        if self.scheduler_interval == "batch":
            self._log_learning_rates(on_step=True)
        if self._is_time_to_step(batch.ends_turn):
            client_optimizer, server_optimizer = self._both_optimizers()
            for segment in (*acting, self.server):
                self._clip(segment)
            # Only the server's step ticks `trainer.global_step`: one tick a step, so
            # that `max_steps` counts steps as it does for an unsplit network.
            client_step = self.trainer.strategy.optimizer_step
            client_step(client_optimizer.optimizer, _no_closure)
            server_optimizer.step()
            client_optimizer.optimizer.zero_grad()
            server_optimizer.zero_grad()
            self._after_step()
        self.end_of_step(batch, self._losses_of(batch, loss, logits), batch_idx)
        return loss.detach()

    def _losses_of(
        self, batch: StepBatch, loss: Tensor, logits: Tensor
    ) -> list[Tensor]:
        """Returns the mean loss of each client that took part."""
        if len(batch.parts) == 1:
            return [loss]
        sizes = [len(part.targets) for part in batch.parts]
        pairs = zip(torch.split(logits.detach(), sizes), batch.parts, strict=True)
        return [self.criterion(own, part.targets) for own, part in pairs]

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
            self.servers.forget()
            self.traffic.load_state_dict(Traffic().state_dict())

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.scheduler_interval == "round":
            self._log_learning_rates(on_step=False)
            self._step_schedulers()

    def hand_over(self, client_id: int) -> None:
        """Gives the turn to a client, which goes on from the last one's weights.

        The last one is that of the same server. The bytes are counted.
        """
        self._enter({client_id: self._shared_line(client_id)})

    def switch_to(self, *client_ids: int) -> None:
        """Gives the turn to clients, each of which goes on from its own weights."""
        self._enter({client_id: client_id for client_id in client_ids})

    def _shared_line(self, client_id: int) -> int:
        """Returns the line of weights that the clients of a server share."""
        return SHARED - self._server_of(client_id)

    def _server_of(self, client_id: int) -> int:
        if self.server_map.is_single:
            return 0
        data = getattr(self.trainer, "datamodule", None)
        num_clients = getattr(data, "num_clients", client_id + 1)
        return self.server_map.server_of(client_id, num_clients)

    def _enter(self, lines: dict[int, int]) -> None:
        client_optimizer, server_optimizer = self._both_optimizers()
        sent = self.clients.enter(lines, client_optimizer.optimizer)
        if self.trainer.is_global_zero:  # all processes hand the same over
            self.traffic.handoff_bytes += sum(sent)
            self.traffic.handoffs += len(sent)
        if not self.server_map.is_single:
            (server,) = {self._server_of(client_id) for client_id in lines}
            self.servers.enter({server: server}, server_optimizer.optimizer)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            more = self._num_seats() - len(self.clients.seats)
            copies = [copy.deepcopy(self.client) for _ in range(more)]
            self.more_clients.extend(copies)
            self.clients.add_seats(copies)

    def _num_seats(self) -> int:
        """Returns how many client segments must be live at once."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, SplitDataModule):
            return 1
        together = data.schedule.most_together(data.num_clients)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        passing = [c for c in callbacks if isinstance(c, WeightPassing)]
        return min([together, *(c.num_seats or together for c in passing)])

    @override
    def show(self, client_id: int) -> None:
        self.clients.show(client_id)
        if not self.server_map.is_single:
            self.servers.show(self._server_of(client_id))

    @override
    def show_live(self) -> None:
        self.clients.show_live()
        self.servers.show_live()

    @override
    def segments(self) -> dict[str, nn.Module]:
        return {"client": self.client, "server": self.server}

    @override
    def totals(self) -> dict[str, int]:
        counts = self.traffic.state_dict()
        of_all = summed(self.trainer, torch.tensor(list(counts.values())))
        return dict(zip(counts, of_all.tolist(), strict=True))

    def _check_turn(self, batch: StepBatch) -> None:
        if self.clients.active is None and len(batch.parts) == 1:
            self.hand_over(batch.parts[0].client_id)
        for part in batch.parts:
            if part.client_id not in self.clients.seated:
                raise RuntimeError(
                    f"It is the turn of client {part.client_id}, but client "
                    f"{self.clients.active} is active: nothing has passed the weights "
                    f"on. {WEIGHT_PASSING_REMEDY}"
                )

    @override
    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        live = nn.ModuleList(self.clients.seats)
        client = make_optimizer("client", self.client_optimizer, live)
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
        checkpoint["servers"] = self.servers.state_dict()
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
        self.servers.load_state_dict(checkpoint["servers"])
        if self.has_totals:
            self.traffic.load_state_dict(checkpoint["traffic"])


def joined(smashed: Sequence[Activations]) -> tuple[Any, ...]:
    """Returns what several clients sent up as one batch; of one client as it is.

    Raises:
        ValueError: If numbers cross the cut that may depend on a client's batch.
    """
    if len(smashed) == 1:
        return values_of(smashed[0])
    values = list(zip(*map(values_of, smashed), strict=True))
    if not all(isinstance(value, Tensor) for several in values for value in several):
        raise ValueError(
            "Expected only tensors to cross the cut where clients act together, but "
            "the server segment takes sizes, too, which are those of one client's "
            "batch. Cut after another layer."
        )
    return tuple(torch.cat(several) for several in values)


def _no_closure() -> None:
    """Does nothing: gradients are there before an optimizer steps."""
