"""`SplitLightningModule`: a network that a client and a server train together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from split_lightning import joint_step
from split_lightning.batch_norm import Normalisation
from split_lightning.callbacks.averaging import ServerAveraging
from split_lightning.callbacks.weight_passing import WeightPassing
from split_lightning.channel import CutLayerChannel, values_of
from split_lightning.client_groups import grouped
from split_lightning.client_network import ClientNetwork
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.loader import StepBatch
from split_lightning.finite import NonFinitePolicy
from split_lightning.flow import Crossed
from split_lightning.holders import (
    fan_in_of,
    require_parts,
    stretches_of_holders,
)
from split_lightning.kinds import (
    CLIENT,
    SERVER,
    CutLayers,
    kinds_of,
    named,
    stages_of,
)
from split_lightning.manual_optimization import no_closure
from split_lightning.models.segment import Stretches
from split_lightning.models.vertical import holders_of
from split_lightning.optimizers import (
    OptimizerFactory,
    SchedulerFactory,
)
from split_lightning.parties import Parties
from split_lightning.piece import Piece
from split_lightning.processes import summed
from split_lightning.replicas import Buffers, OptimizerState, Replicas
from split_lightning.route import Party
from split_lightning.server_map import ServerMap
from split_lightning.spill import SpillFolder
from split_lightning.split_step import SplitStep
from split_lightning.support import (
    refuse_unsupported,
    require_like_clients,
    require_one_process,
    require_weight_passing,
)

# Kept in checkpoints: plain values, so that `weights_only=True` loads them.
_HYPERPARAMETERS = (
    "cut_layer",
    "labels",
    "label_holder",
    "num_classes",
    "scheduler_interval",
    "optimizer_state",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "channels_last",
    "non_finite",
    "server_optimizer_state",
    "buffers",
    "cut_gradient",
    "batch_norm",
    "server_lr_exponent",
    "average_cut_gradients",
)


class SplitLightningModule(SplitStep):
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
        cut_layer: The layer after which to cut it, or several in order (see `split`).
            The client computes up to the first, a server from each to the next. In the
            place of the first a list deals out cuts to clients: client `k` cuts after
            entry `k * entries // clients`, as in `[["layer1", "layer2"], "avgpool"]`.
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
        buffers: Whether averaging takes buffers (BatchNorm's statistics) along
            (`average`), or each party has its own (`keep`).
        cut_gradient: Of which mean loss the gradient at the cut is where several
            clients take part in a step: of the `joint` batch of B samples, so that
            each client's is a slice of one gradient; or of the client's `own` b
            samples, which is B / b times as large. With clients that are averaged at
            each step `own` is what makes them the unsplit network: the mean of their
            gradients, weighted by b / B, is then the sum of the slices.
        batch_norm: Whose samples BatchNorm of the client segment sees where clients act
            on the same weights together: each client's by themselves (`own`), or those
            of the step (`joint`), for which clients exchange sums over their samples,
            in the forward and in the backward, as torch's SyncBatchNorm does.
        server_lr_exponent: The server's learning rate is multiplied by K to this power,
            where K clients take part in a step (SGLR, Pal et al. 2021,
            https://arxiv.org/abs/2112.05929).
        average_cut_gradients: So many clients of a step, the first, get the mean of
            their gradients at the cut in the place of their own, position by position
            in their batches (SGLR; there the subset is drawn). Batches of different
            sizes are left as they are. `None`: none.
        spill_to: A folder in whose files what clients that wait must remember (weights,
            buffers, optimizer states) is kept in the place of memory; all of it is
            removed in the end. `None`: in memory. A checkpoint holds all of it, and is
            made in memory.
        labels: Who has the labels in training, and with them the loss: the `server`
            behind the last cut, to which clients send them; or the `client`, which then
            computes what is behind the last cut, too (a U-shape, Vepakomma et al. 2018,
            https://arxiv.org/abs/1812.00564), and to which no label is ever asked for.
        client_networks: Networks of clients' own, dealt out to them: client `k` has
            entry `k * entries // clients`, the lower layers of that network in the
            place of those of `network`; `None` among them: those of `network`. Weights
            are handed over and averaged within groups of equal entries.
        image_shape: The shape of an image, `(C, H, W)`, which `client_networks` need.
        label_holder: Where the network is a `VerticalNetwork`, so that a client is a
            group of holders that each have a part of its samples: which of them has the
            labels, from 0.

    Attributes:
        server_work: How often the server computes a batch in a step.
        client: The live client segment, the first where there are several.
        server: The live server segment.
        channel: What carries all that crosses the cut.

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

    server_work = 1

    def __init__(
        self,
        network: nn.Module,
        cut_layer: CutLayers,
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
        buffers: Buffers = "average",
        cut_gradient: Literal["joint", "own"] = "joint",
        batch_norm: Normalisation = "own",
        server_lr_exponent: float = 0.0,
        average_cut_gradients: int | None = None,
        spill_to: str | Path | None = None,
        labels: Party = "server",
        client_networks: Sequence[ClientNetwork | None] | None = None,
        image_shape: Sequence[int] | None = None,
        label_holder: int = 0,
    ) -> None:
        policies = get_args(OptimizerState)
        for name, value, choices in (
            ("scheduler_interval", scheduler_interval, ("batch", "round")),
            ("gradient_clip_algorithm", gradient_clip_algorithm, ("norm", "value")),
            ("labels", labels, get_args(Party)),
            ("cut_gradient", cut_gradient, ("joint", "own")),
            ("batch_norm", batch_norm, get_args(Normalisation)),
            ("optimizer_state", optimizer_state, policies),
            ("server_optimizer_state", server_optimizer_state, policies),
        ):
            if value not in choices:
                raise ValueError(
                    f"Expected argument `{name}` to be one of {choices}, but got "
                    f"{value!r}."
                )
        kept = holders_of(network)
        if not 0 <= label_holder < kept.number:
            raise ValueError(
                "Expected argument `label_holder` to be one of a client's holders, "
                f"from 0 to {kept.number - 1}, but got {label_holder}."
            )
        cut, kinds = kinds_of(network, cut_layer, labels, kept.number)
        segments: dict[str, nn.Module] = {**cut}
        if client_networks is not None:
            segments, kinds = grouped(
                segments, kinds, client_networks, image_shape, labels
            )
        spill = None if spill_to is None else SpillFolder(spill_to)
        store = dict if spill is None else spill.store
        make: dict[Party, Callable[[nn.Module], Replicas]] = {
            "client": lambda own: Replicas(own, optimizer_state, buffers, store),
            "server": lambda own: Replicas(own, server_optimizer_state, buffers, store),
        }
        layout = torch.channels_last if channels_last else torch.contiguous_format
        pieces = [
            Piece(
                name,
                segment.to(memory_format=layout),
                {party: make[party] for party in kinds.holders_of(name)},
            )
            for name, segment in segments.items()
        ]
        parties = Parties(pieces, kinds, server_map, spill)
        super().__init__(
            num_classes,
            criterion,
            channels_last,
            non_finite,
            parties,
            client_optimizer=client_optimizer,
            server_optimizer=server_optimizer,
            client_scheduler=client_scheduler,
            server_scheduler=server_scheduler,
            scheduler_interval=scheduler_interval,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            accumulate_grad_batches=accumulate_grad_batches,
            server_lr_exponent=server_lr_exponent,
        )
        self.save_hyperparameters(*_HYPERPARAMETERS, logger=False)
        cut_apart = any(piece.is_between for piece in pieces)
        if cut_apart and average_cut_gradients is not None:
            raise ValueError(
                "Expected argument `average_cut_gradients` to be null where clients "
                "cut after different layers, since their gradients differ in shape, "
                f"but got {average_cut_gradients}."
            )
        if average_cut_gradients is not None and average_cut_gradients < 2:
            raise ValueError(
                "Expected argument `average_cut_gradients` to be at least 2 clients, "
                f"or null for none, but got {average_cut_gradients}."
            )
        given = {"client_networks": client_networks, "server_map": server_map}
        own = (name for name, value in given.items() if value is not None)
        self.objects = (*self.objects, *own)
        self.client, self.server = segments[CLIENT], segments[SERVER]
        others = [piece for piece in pieces if piece.name not in (CLIENT, SERVER)]
        self.other_segments = nn.ModuleList(
            live for piece in others for own in piece.live.values() for live in own
        )
        self.cut_gradient = cut_gradient
        self.batch_norm = batch_norm
        self.average_cut_gradients = average_cut_gradients
        route = kinds.routes[0]
        self.holders = kept
        self.label_holder = label_holder
        self.stretches_of_holders = stretches_of_holders(route, label_holder)
        self.channel = CutLayerChannel(
            self.traffic,
            [stop.party for stop in route],
            fan_in_of(kept),
            label_holder,
        )

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of images `(B, C, H, W)`.

        The client segment is that of the client that trained last.
        """
        values: Any = self.laid_out(inputs)
        for stop in self.parties.route_shown():
            segment = self.parties.shown(self.parties.pieces[stop.piece])
            values = segment(*values_of(values), stretch=stop.stretches)
        return self.logits_of(values)

    @override
    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        self.check_turn(batch)
        self.channel.is_counting = batch.share > 0

        # Forward, from stretch to stretch: what crosses a cut is detached.
        flow, crossed = self._inputs_of(batch), list[Crossed]()
        for place in range(self.num_places):
            flow = self._compute(place, batch, flow)
            flow, sent = self._send(place, batch, flow)
            crossed += sent
        logits = [self.logits_of(bundle.values) for bundle in flow]
        targets = self._sent_targets(batch)
        losses, loss = self._loss_of(batch, logits, targets)

        # Back to the last cut, and on from cut to cut. Gradients of several processes
        # are averaged.
        weight = batch.share * self.trainer.world_size
        self.manual_backward(loss * weight / self.accumulate_grad_batches)
        gradients: list[Tensor | None] = []
        for crossing in reversed(crossed):
            returned = self._returned(batch, crossing)
            outputs, slopes = joint_step.with_gradients(crossing.activations, returned)
            if slopes:  # unless nothing trains before the cut
                torch.autograd.backward(outputs, slopes)
            gradients += returned
        self._gather(batch)

        clients, servers = self._of_clients(batch), self._of_servers(batch)
        computed = {
            "the smashed data": [
                value for c in crossed for own in c.smashed for value in values_of(own)
            ],
            "the loss": losses,
            "the gradient of the smashed data": gradients,
            "the server's gradient": [p.grad for own in servers for p in own],
            "the client's gradient": [p.grad for own in clients for p in own],
        }
        if not self.accepts(batch, batch_idx, computed):
            self._accumulated = 0
            return loss.detach()
        self._accumulated += 1
        if self.scheduler_interval == "batch":
            self._log_learning_rates(on_step=True)
        if self._is_time_to_step(batch.ends_turn):
            client_optimizer, server_optimizer = self._both_optimizers()
            self._clip(*clients, *servers)
            # Only the server's step ticks `trainer.global_step`: one tick a step, so
            # that `max_steps` counts steps as it does for an unsplit network.
            client_step = self.trainer.strategy.optimizer_step
            client_step(client_optimizer.optimizer, no_closure)
            server_optimizer.step()
            client_optimizer.optimizer.zero_grad()
            server_optimizer.zero_grad()
            self._after_step()
        self.end_of_step(batch, [own.detach() for own in losses], batch_idx)
        return loss.detach()

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self.channel.forget()

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.parties.kinds.check(self.parties.num_clients)
        if stage == "fit":
            passing = _passing_of(self.trainer)
            self.parties.set_pools(not passing or any(c.enabled for c in passing))
            self.parties.servers_are_remote = any(
                callback.remote
                for callback in self.trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, ServerAveraging)
            )
            self.make_room(self._num_seats())

    def _num_seats(self) -> int:
        """Returns how many client segments must be live at once."""
        together = self._num_together()
        passing = _passing_of(self.trainer)
        return min([together, *(c.num_seats or together for c in passing)])

    @override
    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        made, schedulers = super().configure_optimizers()
        travels = self.clients.optimizer_state == "travel"
        moves = any(piece.is_between for piece in self.parties.pieces.values())
        if travels and moves and type(made[0]) is not type(made[1]):
            raise ValueError(
                "Expected argument `optimizer_state` to be 'keep' or 'reset' where "
                "layers go between clients and servers whose optimizers are of "
                "different kinds, but got 'travel', and the client's is "
                f"{type(made[0]).__name__}, the server's {type(made[1]).__name__}."
            )
        return made, schedulers

    @override
    def segments(self) -> dict[str, nn.Module]:
        pieces = self.parties.pieces
        return {name: self.parties.shown(piece) for name, piece in pieces.items()}

    @override
    def stages(self, client_id: int | None = None) -> dict[str, nn.Module]:
        route = self.parties.route_shown()
        if client_id is not None:
            route = self.parties.route_of(client_id)
        passed = Counter(stop.piece for stop in route for _ in stop.stretches)
        found: dict[str, nn.Module] = {}
        for stage, stops in zip(named(route), stages_of(route), strict=True):
            held = [self.parties.pieces[s.piece].of(s.party).live for s in stops]
            is_whole = len(stops) == 1 and passed[stops[0].piece] == 1
            whole = Stretches(held, [stop.stretches for stop in stops])
            found[stage.name] = held[0] if is_whole else whole
        return found

    @override
    def places(self, client_id: int) -> list[nn.Module]:
        pieces = self.parties.pieces
        return [
            Stretches([pieces[stop.piece].of(stop.party).live], [stop.stretches])
            for stop in self.parties.route_of(client_id)
        ]

    @override
    def verify(self, trainer: pl.Trainer, data: pl.LightningDataModule | None) -> None:
        refuse_unsupported(trainer)
        require_one_process(trainer, data)
        require_weight_passing(trainer, data, self.clients.optimizer_state)
        require_parts(self.holders, trainer, data, self.batch_norm)
        if self.parties.kinds.are_several:
            require_like_clients(
                trainer, data, self.parties.kinds, _passing_of(trainer)
            )
        if self.batch_norm == "joint" and not _act_on_the_same_weights(trainer, data):
            raise MisconfigurationException(
                "Expected argument `batch_norm` to be 'own' where clients do not act "
                "on the same weights together, but got 'joint', which is for "
                "ParallelSchedule with clients averaged at each step "
                '(`ClientAveraging(every="step")`; in a configuration protocol=gpsl, '
                "or protocol=parallel "
                "protocol.callbacks.weight_passing.every=step)."
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        counts = torch.tensor([*self.channel.by_cut, *self.channel.by_holder])
        of_all = summed(self.trainer, counts).tolist()
        cuts = len(self.channel.by_cut)
        checkpoint["by_cut"], checkpoint["by_holder"] = of_all[:cuts], of_all[cuts:]
        checkpoint["kinds"] = list(self.parties.kinds.entries)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["state_dict"].keys() != self.state_dict().keys():
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of the same network, cut "
                f"after the same layer ({self.hparams['cut_layer']!r}), but its "
                "layers differ."
            )
        entries = list(self.parties.kinds.entries)
        if checkpoint["kinds"] != entries:
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of a run with the same "
                f"entries of `{self.parties.kinds.argument}` for its clients, but by "
                f"kind they were {checkpoint['kinds']}, and now are {entries}."
            )
        if self.has_totals:
            self.channel.by_cut = checkpoint["by_cut"]
            self.channel.by_holder = checkpoint.get("by_holder", [])


def _passing_of(trainer: pl.Trainer) -> list[WeightPassing]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, WeightPassing)]


def _act_on_the_same_weights(
    trainer: pl.Trainer, data: pl.LightningDataModule | None
) -> bool:
    """Tells whether clients of a step act together, and share their weights."""
    together = isinstance(data, SplitDataModule) and data.schedule.acts_together
    return together and any(c.num_seats == 1 for c in _passing_of(trainer))
