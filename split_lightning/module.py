"""`SplitLightningModule`: a network that several parties train together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelSummary
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self, override

from split_lightning.callbacks.logs import is_logged
from split_lightning.callbacks.monitors import require_known_monitors
from split_lightning.callbacks.segment_summary import SegmentSummary
from split_lightning.channel import Channel
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.loader import EVERY_CLIENT, ClientBatch, TrainLoader
from split_lightning.digests import digest
from split_lightning.engines.engine import Engine
from split_lightning.engines.hello import Hello
from split_lightning.engines.networks import Networks, Score
from split_lightning.engines.remote import SampleRef
from split_lightning.engines.shapes import Shapes
from split_lightning.engines.site import CPU, Site
from split_lightning.finite import NotFinite
from split_lightning.observers.traffic import Traffic
from split_lightning.processes import summed
from split_lightning.protocols.plan import Step
from split_lightning.protocols.protocol import Protocol
from split_lightning.step import StepLosses
from split_lightning.store import PARTS, WEIGHTS
from split_lightning.task import Task
from split_lightning.topologies.client_network import ClientNetwork
from split_lightning.topologies.topology import CutLayers, Labels, make_topology
from split_lightning.training.client_metrics import ClientMetrics, client_metric
from split_lightning.training.finite_check import FiniteCheck, NonFinitePolicy
from split_lightning.training.fitness import set_least_batch
from split_lightning.training.loading import missing_arguments
from split_lightning.training.optimizers import (
    OptimizerFactory,
    SchedulerFactory,
    Uncounted,
    clipping,
    make_optimizer,
    make_scheduler,
)
from split_lightning.training.resumption import Resumption
from split_lightning.training.support import find_protocol, require_cut, require_fit

# Kept in checkpoints: plain values, so that `weights_only=True` loads them.
_HYPERPARAMETERS = (
    "cut_layer",
    "labels",
    "label_holder",
    "num_classes",
    "scheduler_interval",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "channels_last",
    "non_finite",
)
_LOOK_EVERY = 50  # batches on a GPU between looks whether numbers are finite


class SplitLightningModule(pl.LightningModule):
    """Trains a network whose segments are at different parties.

    The client sends its activations at the cut and the labels to the server; the server
    runs the rest of the network and the loss, and sends the gradient at the cut back
    (Gupta and Raskar 2018, https://arxiv.org/abs/1810.06060). All parties step after
    both stages of the backward pass. The numbers are those of the unsplit network, bit
    for bit.

    The module is composed of a task (the loss), segments of the network that a
    placement assigns to parties, a channel that delivers their messages, and an engine
    that computes. A protocol (a callback such as `RoundRobinWeightPassing`) plans
    which client trains when, and how weights flow.

    Args:
        network: The unsplit network: inputs `(B, C, H, W)` to logits `(B, K)`.
        cut_layer: The layer after which to cut it, or several in order (see `split`).
            The client computes up to the first, a server from each to the next. Instead
            of the first, a list gives clients different cuts: client `k` cuts after
            entry `k * entries // clients`, as in `[["layer1", "layer2"], "avgpool"]`.
            `None`: the network is not cut, for the baselines.
        client_optimizer: Makes the optimizer of the clients' parameters. `None`, where
            the network is not cut: the servers' optimizer is for all.
        server_optimizer: Makes the optimizer of the servers' parameters.
        num_classes: Number of classes.
        client_scheduler: Makes the learning-rate scheduler of the clients' optimizer.
        server_scheduler: Makes the learning-rate scheduler of the servers' optimizer.
        scheduler_interval: When schedulers step: after each `batch` that stepped the
            optimizers, or each `round`.
        criterion: The loss; `None`: cross-entropy.
        gradient_clip_val: Limit for each party's gradient, by itself: no party sees
            another's; `None`: no limit.
        gradient_clip_algorithm: Whether the limit is for the `norm` or each `value`.
        accumulate_grad_batches: Number of batches whose gradients make a step, each
            divided by this number. A turn's last step may have fewer (and be smaller,
            as in Lightning); nothing is carried into the next turn.
        channels_last: Whether images and weights are laid out channels-last.
        non_finite: Whether a batch whose loss or gradients are not finite stops the run
            (`stop`), or is left out (`skip`).
        labels: The party with the labels in training, and with the loss: the `server`
            behind the last cut, to which clients send them; or the `client`, which then
            computes what is behind the last cut, too (a U-shape, Vepakomma et al. 2018,
            https://arxiv.org/abs/1812.00564).
        label_holder: Where the network is a `VerticalNetwork`, so that a client is a
            group of holders that each have a part of its samples: which of them has the
            labels, from 0.
        client_networks: Networks of the clients' own: client `k` has
            entry `k * entries // clients`, whose lower layers replace those of
            `network`; `None` among them: those of `network`. Weights are passed on and
            averaged among clients with equal entries.
        image_shape: The shape of an image, `(C, H, W)`, which `client_networks` need.
        channel: Delivers what parties send each other; `None`: a plain one.
        engine: Computes; `None`: all parties in this process.

    Attributes:
        task: Loss and metrics.
        topology: The segments, and their parties.
        channel: Delivers messages. Its `observers` see all of them.
        engine: Computes.
        networks: The network of each client.
        traffic: Counts bytes.
        skipped_batches: Number of batches that were left out since the run's start.

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

    # How the command line built it, in plain containers; `None`: it did not.
    configuration: dict[str, Any] | None = None

    def __init__(
        self,
        network: nn.Module,
        cut_layer: CutLayers,
        client_optimizer: OptimizerFactory | None,
        server_optimizer: OptimizerFactory,
        num_classes: int,
        client_scheduler: SchedulerFactory | None = None,
        server_scheduler: SchedulerFactory | None = None,
        scheduler_interval: Literal["batch", "round"] = "round",
        criterion: nn.Module | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
        channels_last: bool = False,
        non_finite: NonFinitePolicy = "stop",
        labels: Labels = "server",
        label_holder: int = 0,
        client_networks: Sequence[ClientNetwork | None] | None = None,
        image_shape: Sequence[int] | None = None,
        channel: Channel | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("scheduler_interval", scheduler_interval, ("batch", "round")),
            ("gradient_clip_algorithm", gradient_clip_algorithm, ("norm", "value")),
            ("non_finite", non_finite, get_args(NonFinitePolicy)),
        ):
            if value not in choices:
                raise ValueError(
                    f"Expected argument `{name}` to be one of {choices}, but got "
                    f"{value!r}."
                )
        if accumulate_grad_batches < 1:
            raise ValueError(
                "Expected argument `accumulate_grad_batches` to be a positive integer, "
                f"but got {accumulate_grad_batches}."
            )
        if client_optimizer is None and cut_layer is not None:
            raise ValueError(
                "Expected argument `client_optimizer` to make an optimizer where the "
                "network is cut, but got None."
            )
        self.automatic_optimization = False
        self.save_hyperparameters(*_HYPERPARAMETERS, logger=False)
        # What makes the optimizer and the scheduler of each role.
        self.makes_optimizer = {"client": client_optimizer, "server": server_optimizer}
        self.makes_scheduler = {"client": client_scheduler, "server": server_scheduler}
        self.scheduler_interval = scheduler_interval
        self.accumulate_grad_batches = accumulate_grad_batches
        self.memory_format = (
            torch.channels_last if channels_last else torch.contiguous_format
        )
        given: dict[str, Any] = {
            "criterion": criterion,
            "client_networks": client_networks,
            "channel": channel,
            "engine": engine,
        }
        own = (name for name, value in given.items() if value is not None)
        self.objects = ("network", *own)  # arguments that are no plain options

        self.task = Task(num_classes, criterion)
        self.topology = make_topology(
            network, cut_layer, labels, label_holder, client_networks, image_shape
        )
        modules = self.topology.modules
        self.first_copies = nn.ModuleList(
            module.to(memory_format=self.memory_format) for module in modules
        )
        self.channel = channel or Channel()
        self.traffic = Traffic()
        self.channel.observers.append(self.traffic)
        self.engine = engine or Engine()
        self.engine.build(
            modules,
            self.topology.depths,
            self.topology.placement,
            self.channel,
            self.task,
        )
        self.networks = Networks(self.engine, self.topology)
        self.engine.clip = clipping(gradient_clip_val, gradient_clip_algorithm)
        self.more_copies = self.engine.copies
        self.finite = FiniteCheck(non_finite)
        self.engine.may_discard = non_finite == "skip"
        self.clients = ClientMetrics()
        self.resumption = Resumption()
        self.skipped_batches = 0

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.task.num_classes

    # The network

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of inputs `(B, C, H, W)`.

        The network is that of the client that trained last.
        """
        logits: Tensor = self.networks.predict(
            self.engine.last_client, self.laid_out(inputs)
        )
        return logits

    @property
    def client(self) -> nn.Module:
        """The live client segment."""
        return self.segments()["client"]

    @property
    def server(self) -> nn.Module:
        """The live server segment."""
        return self.segments()["server"]

    def segments(self, client_id: int | None = None) -> dict[str, nn.Module]:
        """Returns the layers of the network, by the role of the parties that have them.

        Args:
            client_id: The client; `None`: the one that trained last.
        """
        return self.networks.layers(client_id)

    def stages(self, client_id: int | None = None) -> dict[str, nn.Module]:
        """Returns the modules from inputs to logits, in order.

        Args:
            client_id: The client; `None`: the one that trained last.

        Returns:
            From cut to cut a module, by role: `client`, `server`, `client_2`.
        """
        return self.networks.stages(client_id)

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

    # Training

    @override
    def training_step(self, step: Step, batch_idx: int) -> Tensor | None:
        parts, first = step.parts, step.parts[0]
        self.traffic.counts_samples = first.share > 0
        # Gradients of several processes are averaged.
        scale = first.share * self.trainer.world_size / self.accumulate_grad_batches
        if self.memory_format == torch.channels_last:
            parts = tuple(p._replace(inputs=self.laid_out(p.inputs)) for p in parts)
        losses = self._compute(parts, scale, step.upcoming)
        if not self.finite.accepts(self, step, batch_idx, losses):
            self.skipped_batches += 1
            self._mark_trained(batch_idx)
            return torch.zeros((), device=self.device)
        assert isinstance(losses, StepLosses)
        if self.scheduler_interval == "batch":
            self._log_learning_rates(on_step=True)
        full = self.engine.accumulated == self.accumulate_grad_batches
        if full or first.ends_turn or self.trainer.is_last_batch:
            self.engine.step()
            if self.scheduler_interval == "batch":
                self._step_schedulers()
        self._mark_trained(batch_idx)
        self.engine.trained([part.num_samples_of_all for part in parts])
        self.clients.add(self.trainer, parts, losses)
        return losses.total if losses.are_here else None

    def _compute(
        self,
        parts: Sequence[ClientBatch],
        scale: float,
        upcoming: Sequence[ClientBatch],
    ) -> StepLosses | NotFinite:
        try:
            losses = self.engine.compute(parts, scale, upcoming)
            is_due = is_logged(self.trainer) or self.trainer.is_last_batch
            # Otherwise a site that has all of the network computes on meanwhile.
            return losses.here() if is_due or self.engine.may_discard else losses
        except NotFinite as found:
            return found

    def _mark_trained(self, batch_idx: int) -> None:
        loader = self.trainer.train_dataloader
        if isinstance(loader, TrainLoader):
            loader.mark_trained(batch_idx + 1)

    @override
    def on_train_epoch_end(self) -> None:
        self.finite.settle(self)
        self.log("train/loss", self.round_loss())
        loader = self.trainer.train_dataloader
        if isinstance(loader, TrainLoader):
            loader.mark_round_done()
        self.clients.end_round(self)
        if self.scheduler_interval == "round":
            self._log_learning_rates(on_step=False)
            self._step_schedulers()

    def round_loss(self) -> Tensor | float:
        """Returns the mean training loss over the samples of the round so far."""
        return self.clients.losses.mean(self.trainer)

    def client_losses(self) -> dict[int, float]:
        """Returns each client's mean training loss in the round so far."""
        losses = self.clients.losses.by_client(self.trainer)
        return {client_id: float(loss) for client_id, loss in losses.items()}

    def totals(self) -> dict[str, int]:
        """Returns the bytes, by counter, since the start of the run."""
        counts = self.traffic.counts
        if self.trainer.world_size == 1:
            return dict(counts)
        of_all = summed(self.trainer, torch.tensor(list(counts.values())))
        return dict(zip(counts, of_all.tolist(), strict=True))

    def is_accumulating(self) -> bool:
        """Returns whether gradients wait for the rest of a step's batches."""
        return self.engine.accumulated > 0

    # Optimizers

    @property
    def optimizer_names(self) -> tuple[str, ...]:
        """The roles of the optimizers, in order."""
        return ("client", "server") if self.topology.is_split else ("server",)

    @override
    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        optimizers, schedulers = list[Optimizer](), list[Any]()
        for role in self.optimizer_names:
            factory, parameters = (
                self.makes_optimizer[role],
                self.engine.parameters(role),
            )
            assert factory is not None
            optimizers.append(make_optimizer(role, factory, parameters))
            make = self.makes_scheduler[role]
            if make is not None:
                scheduler = make_scheduler(make, optimizers[-1])
                schedulers.append({"scheduler": scheduler, "name": f"lr/{role}"})
        return optimizers, schedulers

    def _step_schedulers(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()  # type: ignore[call-arg]  # needs no metric

    def _log_learning_rates(self, on_step: bool) -> None:
        for role, optimizer in zip(
            self.optimizer_names, self.trainer.optimizers, strict=True
        ):
            lr = optimizer.param_groups[0]["lr"]
            self.log(f"lr/{role}", lr, on_step=on_step, on_epoch=not on_step)

    # Evaluation

    @override
    def validation_step(self, batch: ClientBatch, batch_idx: int) -> Tensor | None:
        if not isinstance(batch, ClientBatch):
            raise ValueError(
                "Expected batches of a SplitDataModule to validate on, which name a "
                f"client, but got {type(batch).__name__}. Pass datamodule=data."
            )
        if batch.ref is not None:
            if self._is_there(batch.client_id):
                score = self._score("val", batch.client_id, batch.ref)
                self.clients.add_right(batch, score.right)
            return None
        logits = self._evaluate("val", batch.client_id, batch.inputs, batch.targets)
        self.clients.add_logits(batch, logits)
        return logits  # for callbacks

    @override
    def on_validation_epoch_end(self) -> None:
        self.clients.end_validation(self)

    @override
    def test_step(
        self, batch: tuple[Tensor, Tensor] | ClientBatch, batch_idx: int
    ) -> Tensor | None:
        """Tests each distinct network; the metrics are means over them.

        Returns:
            The logits of each network in turn, `(networks * B, K)`.
        """
        clients = self.networks.representatives() or [self.engine.last_client]
        if isinstance(batch, ClientBatch) and batch.ref is not None:
            if batch.client_id != EVERY_CLIENT:
                clients = [batch.client_id]
            for client in filter(self._is_there, clients):
                self._score("test", client, replace(batch.ref, client_id=client))
            return None
        found = [self._evaluate("test", client, *batch) for client in clients]
        logits = [own for own in found if own is not None]
        return torch.cat(logits) if logits else None

    def _evaluate(
        self, part: str, client_id: int, inputs: Tensor, targets: Tensor
    ) -> Tensor | None:
        """Returns the logits; `None` where this process has no share of the batch."""
        metrics: Any = self.task.metrics[part]
        logits: Tensor | None = None
        if len(targets):
            logits = self.networks.predict(client_id, self.laid_out(inputs))
            metrics["accuracy"].update(logits, targets)
            metrics["loss"].update(self.task.loss(logits, targets), len(targets))
        self._log_evaluation(part, len(targets))
        return logits

    def _is_there(self, client_id: int) -> bool:
        """Returns whether a client at another site is not absent."""
        absences = self.engine.sites.absences
        return absences is None or client_id not in absences.latest()

    def _score(self, part: str, client_id: int, ref: SampleRef) -> Score:
        """Evaluates samples at a client's site."""
        metrics: Any = self.task.metrics[part]
        score = self.networks.score(client_id, ref)
        metrics["loss"].update(score.loss, score.num_samples)
        wrong = torch.arange(score.num_samples) >= score.right  # right ones first
        metrics["accuracy"].update(wrong.long(), torch.zeros(score.num_samples).long())
        self._log_evaluation(part, score.num_samples)
        return score

    def _log_evaluation(self, part: str, num_samples: int) -> None:
        metrics: Any = self.task.metrics[part]
        for name, metric in metrics.items():
            self.log(
                f"{part}/{name}",
                metric,
                batch_size=num_samples,
                prog_bar=part == "val" or name == "accuracy",
            )

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        probabilities: Tensor = self(inputs).softmax(dim=1)
        return probabilities

    # The Trainer

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        # The first hook that knows the Trainer: before Lightning's own checks, whose
        # messages cannot name our arguments.
        added: list[pl.Callback] = []
        if self.trainer.state.fn == TrainerFn.FITTING:
            data = getattr(self.trainer, "datamodule", None)
            protocol, added = find_protocol(self.trainer, data)
            assert isinstance(data, SplitDataModule)
            self.verify(self.trainer, data, protocol)
            require_known_monitors(self.trainer, self, data, client_metric)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        summaries = [c for c in callbacks if isinstance(c, ModelSummary)]
        if any(summary._max_depth == 1 for summary in summaries):  # Lightning's own
            added.append(SegmentSummary())
        return added

    def verify(
        self, trainer: pl.Trainer, data: SplitDataModule, protocol: Protocol
    ) -> None:
        """Stops where this module cannot train with a Trainer, data and a protocol.

        Raises:
            MisconfigurationException: Says what to change.
        """
        require_cut(self, protocol)  # before the engine is prepared for it
        self.follow(protocol, data.num_clients)
        data.protocol = protocol
        require_fit(self, trainer, data, protocol)
        away, sites = self.engine.parties_away(), self.engine.sites
        data.ask = partial(sites.meet, away, self.agreed(data)) if away else None
        if sites.absences is not None:
            data.availability.absences = sites.absences

    def agreed(self, data: SplitDataModule) -> dict[str, str]:
        """Returns what all sites of a run have to agree on before training, by key."""
        found = {key: repr(self.hparams[key]) for key in _HYPERPARAMETERS}
        found |= {key: str(value) for key, value in data.plan_options().items()}
        role = self.optimizer_names[0]  # of the parameters at the clients
        parts = {
            f"{role}_optimizer": self.makes_optimizer[role],
            f"{role}_scheduler": self.makes_scheduler[role],
            "criterion": self.task.criterion,
            "augmentation": data.augmentation,
            **data.normalize.keywords,
        }
        found |= {key: digest(value) for key, value in parts.items()}
        if self.topology.parts is not None:  # holders validate on the same rows
            found["val_share"] = repr(data.val_share)
        found["network"] = self.engine.digest()
        return found

    def hello(self, data: SplitDataModule, clients: Iterable[int]) -> Hello:
        """Returns what the site of some clients says first.

        Args:
            data: Their samples, set up to fit.
            clients: The clients.
        """
        return Hello(self.agreed(data), data.client_data(clients))

    def end(self) -> None:
        """Tells clients at other sites that the run is complete.

        Each gets the weights of its part of the final network.
        """
        sites, clients = self.engine.sites, range(self.engine.placement.num_clients)
        away = () if sites.absences is None else sites.absences.latest()
        sites.end(self.networks.deliver([k for k in clients if k not in away]))

    def follow(
        self, protocol: Protocol, num_clients: int, num_live: int | None = None
    ) -> None:
        """Prepares the engine for a protocol and a number of clients.

        Args:
            protocol: The protocol.
            num_clients: Number of clients.
            num_live: Number of clients whose segments are live at once; `None`: as
                many as train in one step.
        """
        self.engine.follow(
            1 if protocol.pools_samples else num_clients,
            protocol.num_servers,
            protocol.unsplit_at,
            protocol.cohort,
            protocol.joint_norm,
            protocol.serve,
        )
        travels = getattr(protocol, "optimizer_state", "keep") == "travel"
        self.engine.passed_on = PARTS if travels else WEIGHTS
        if num_live is None:
            num_live = 1 if protocol.cohort else protocol.num_together(num_clients)
        self.engine.make_room(num_live)

    def as_site(
        self,
        data: SplitDataModule,
        protocol: Protocol,
        num_hosted: int,
        device: torch.device = CPU,
    ) -> Site:
        """Returns a site: it computes for clients of a Trainer in another process.

        Args:
            data: The clients' samples, set up to fit.
            protocol: The protocol of the run.
            num_hosted: Number of clients that it computes for.
            device: Computes.
        """
        require_cut(self, protocol)
        # A site begins a step ahead while it takes no part in another.
        at_once = min(protocol.num_together(data.num_clients), num_hosted)
        self.follow(protocol, data.num_clients, num_live=at_once)
        data.protocol = protocol
        optimizers, _ = self.configure_optimizers()
        by_role = dict(zip(self.optimizer_names, optimizers, strict=True))
        self.engine.use(by_role, by_role)
        self.train()
        return Site(self.engine, data.load, self._shapes(data), device)

    def _shapes(self, data: SplitDataModule) -> Shapes:
        factory = self.makes_optimizer["client"] or self.makes_optimizer["server"]
        assert factory is not None
        new_optimizer = partial(make_optimizer, "client", factory)
        return Shapes(self.engine, data.example(), data.batch_size, new_optimizer)

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.traffic.counts_weights = self.trainer.is_global_zero
        if stage == "fit":
            self.engine.open()
            if isinstance(data, SplitDataModule):
                least = set_least_batch(self, data, self.trainer.world_size)
                self.engine.least_samples = least.total
                if data.ask is not None:
                    self.engine.sites.expect(self._shapes(data))

    @override
    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:  # a new run
            self.networks.keep_only(self.engine.last_client)
            self.traffic.forget()
            self.clients = ClientMetrics()
            self.skipped_batches = 0
        if self.trainer.ckpt_path is None:
            self.engine.sites.begin({})
        wrapped = self.optimizers()
        counted = wrapped[-1] if isinstance(wrapped, list) else wrapped
        raw = dict(zip(self.optimizer_names, self.trainer.optimizers, strict=True))
        # Only one optimizer's step ticks `trainer.global_step`: one tick a step, so
        # that `max_steps` counts steps as it does for an unsplit network.
        steps: dict[str, Any] = {
            role: Uncounted(self.trainer.strategy, own) for role, own in raw.items()
        }
        self.engine.use(raw, {**steps, "server": counted})
        self.engine.backward_pass = self.manual_backward
        self.finite.every = 1 if self.device.type == "cpu" else _LOOK_EVERY
        self.resumption.take_over_optimizers(self, raw)

    @override
    def on_train_start(self) -> None:
        self.resumption.restore(self)

    # Checkpoints

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Returns the module of a checkpoint.

        One that the command line wrote needs no further arguments: it names the classes
        that build the module, so load none that you do not trust. For others give
        `network`, and what else is no plain option (`criterion`); to train on, the
        optimizers too. Nothing is unpickled.

        Args:
            checkpoint_path: The file.
            map_location: Where its tensors go.
            hparams_file: See Lightning.
            strict: Whether all weights must fit.
            weights_only: Whether nothing may be unpickled.
            kwargs: Arguments of the module, instead of those of the checkpoint.

        Raises:
            ValueError: If an argument must be given.
        """
        missing, configuration = missing_arguments(cls, checkpoint_path, kwargs)
        module: Self = super().load_from_checkpoint(
            checkpoint_path,
            map_location=map_location,
            hparams_file=hparams_file,
            strict=strict,
            weights_only=weights_only,
            **{**missing, **kwargs},
        )
        module.configuration = configuration
        return module

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite.settle(self)
        self.resumption.save(self, checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumption.load(self, checkpoint)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            # Now: other callbacks may look at states at sites.
            self.engine.sites.begin(self.engine.barrier)
