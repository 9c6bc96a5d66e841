"""`Classifier`: what split and unsplit training have in common."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from split_lightning.channel import Traffic
from split_lightning.data.loader import ClientBatch, ClientLoader, StepBatch
from split_lightning.finite import NonFiniteError, NonFinitePolicy, are_finite
from split_lightning.parties import Parties, Party
from split_lightning.processes import all_agree, gathered, processes_of, summed
from split_lightning.random_state import random_state, set_random_state
from split_lightning.replicas import Replicas
from split_lightning.round_losses import RoundLosses
from split_lightning.support import WEIGHT_PASSING_REMEDY

_logger = logging.getLogger(__name__)

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler]


class Classifier(pl.LightningModule):
    """Evaluation and logging of an image classifier; subclasses say how it trains.

    Args:
        num_classes: Number of classes.
        criterion: The loss of logits `(B, K)` and labels `(B,)`; `None`: cross-entropy.
        channels_last: Whether images and weights are laid out channels-last in memory
            (faster on most devices; the same results but for rounding).
        non_finite: What becomes of a batch whose numbers are not finite: `stop` the
            run with `NonFiniteError`, or `skip` it: no step, BatchNorm's statistics
            as before, gradients that wait for the same step dropped with it.
        parties: Who holds which weights.

    Attributes:
        skipped_batches: Number of batches that were skipped since the run's start.

    Raises:
        ValueError: If `non_finite` is neither.
    """

    def __init__(
        self,
        num_classes: int,
        criterion: nn.Module | None,
        channels_last: bool,
        non_finite: NonFinitePolicy,
        parties: Parties,
    ) -> None:
        super().__init__()
        if non_finite not in get_args(NonFinitePolicy):
            raise ValueError(
                "Expected argument `non_finite` to be one of "
                f"{get_args(NonFinitePolicy)}, but got {non_finite!r}."
            )
        self.num_classes = num_classes
        self.parties = parties
        self.more_clients = nn.ModuleList()  # live at once with the first
        self.non_finite = non_finite
        self.skipped_batches = 0
        self._kept_buffers: list[tuple[Tensor, Tensor]] = []
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self._metrics = {
            "val": (self.val_loss, self.val_accuracy),
            "test": (self.test_loss, self.test_accuracy),
        }
        self._losses = RoundLosses()
        # Of each client's own validation share: those that are right, and all.
        self._right: dict[int, tuple[Tensor | int, int]] = {}
        self._resumed: dict[str, Any] | None = None  # waits for the training's start
        self.memory_format = (
            torch.channels_last if channels_last else torch.contiguous_format
        )

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of images `(B, C, H, W)`."""

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

    def make_room(self, num_clients: int) -> None:
        """Makes room for so many clients' segments to be live at once.

        A checkpoint of clients that act together has as many.
        """
        more = num_clients - len(self.clients.seats)
        copies = [copy.deepcopy(self.clients.seats[0]) for _ in range(more)]
        self.more_clients.extend(copies)
        self.clients.add_seats(copies)

    @abstractmethod
    def verify(self, trainer: pl.Trainer, data: pl.LightningDataModule | None) -> None:
        """Stops where this module cannot train with a Trainer and data as they are.

        Raises:
            MisconfigurationException: Says what to change.
        """

    @abstractmethod
    def optimizers_of(self) -> dict[str, Optimizer]:
        """Returns each party's optimizer."""

    def totals(self) -> dict[str, int]:
        """Returns what was counted since the start of the run (bytes)."""
        counts = self.parties.traffic.state_dict()
        of_all = summed(self.trainer, torch.tensor(list(counts.values())))
        return dict(zip(counts, of_all.tolist(), strict=True))

    def hand_over(self, client_id: int) -> None:
        """Gives the turn to a client, which goes on from the last one's weights.

        The last one is that of the same server. The bytes are counted.
        """
        self.parties.hand_over(client_id, self.optimizers_of())

    def switch_to(self, *client_ids: int) -> None:
        """Gives the turn to clients, each of which goes on from its own weights."""
        self.parties.switch_to(list(client_ids), self.optimizers_of())

    def share(self, *client_ids: int) -> None:
        """Gives the turn to clients that act on the same weights together.

        Their gradients are averaged at each step.
        """
        self.parties.share(list(client_ids), self.optimizers_of())

    def collect(self, party: Party, *client_ids: int) -> None:
        """Takes clients that are done for a round into account for `average`.

        What they alone hold of a party need not be remembered then.
        """
        self.parties.collect(party, list(client_ids), self.optimizers_of())

    def average(self, party: Party) -> int:
        """Lets all go on from the mean of a party's segments.

        The mean is weighted by the samples that each was trained on since the last.

        Returns:
            The bytes that would travel, from all that were trained to where the mean
            is made, and back.
        """
        return self.parties.average(party, self.optimizers_of())

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        # The first hook that knows the Trainer: before Lightning's own checks, whose
        # messages cannot name our arguments.
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.verify(self.trainer, getattr(self.trainer, "datamodule", None))
        return []

    @override
    def validation_step(self, batch: ClientBatch, batch_idx: int) -> Tensor | None:
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
            shares = {k: r / n for k, (r, n) in zip(right, of_all, strict=True)}
            self._log_by_client("accuracy", shares)

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

    @override
    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        if self.non_finite == "skip":
            self._kept_buffers = [(b, b.clone()) for b in self.buffers()]

    def accepts(
        self, batch: StepBatch, batch_idx: int, values: Mapping[str, Iterable[Any]]
    ) -> bool:
        """Tells whether a batch's numbers are finite, or else does what is to be done.

        Args:
            batch: The batch.
            batch_idx: Its place in the round.
            values: What training computed from it, before any step, by name.

        Raises:
            NonFiniteError: Names what is not finite and where, if a run is to stop.
        """
        sound = are_finite(v for tensors in values.values() for v in tensors)
        if all_agree(self.trainer, sound):
            return True
        unsound = (name for name, tensors in values.items() if not are_finite(tensors))
        what = next(unsound, "what another process computed")
        clients = ", ".join(str(part.client_id) for part in batch.parts)
        place = (
            f"round {self.trainer.current_epoch + 1}, client {clients}, "
            f"batch {batch_idx + 1} of the round"
        )
        if self.non_finite == "stop":
            raise NonFiniteError(
                f"Not finite in {place}: {what}. Lower the learning rate, limit the "
                "gradient (`gradient_clip_val`), look at the client's data, or skip "
                "such batches (`non_finite=skip`; `model.` before both in a "
                "configuration)."
            )
        _logger.warning("Skipped %s: %s is not finite.", place, what)
        for buffer, kept in self._kept_buffers:
            buffer.copy_(kept)
        self.zero_grad()
        self.skipped_batches += 1
        self._mark_trained(batch_idx)
        return False

    def check_turn(self, batch: StepBatch) -> None:
        """Stops where others are to act than those whose weights are live.

        Raises:
            RuntimeError: Says what to add.
        """
        first = batch.parts[0].client_id
        if self.clients.active is None and len(batch.parts) == 1:
            self.hand_over(first)  # the first of all
        strangers = {p.client_id for p in batch.parts} - self.clients.seated.keys()
        if strangers:
            raise RuntimeError(
                f"It is the turn of client {min(strangers)}, but client "
                f"{self.clients.active} is active: nothing has passed the weights on. "
                f"{WEIGHT_PASSING_REMEDY}"
            )

    def _mark_trained(self, batch_idx: int) -> None:
        loader = self.trainer.train_dataloader
        if isinstance(loader, ClientLoader):
            loader.mark_trained(batch_idx + 1)

    @property
    def has_totals(self) -> bool:
        """Whether a checkpoint's sums over all processes are this one's to keep."""
        return self._trainer is None or self._trainer.is_global_zero

    def end_of_step(
        self, batch: StepBatch, losses: Sequence[Tensor], batch_idx: int
    ) -> None:
        """Logs a step's mean loss, and keeps each client's for the round's means.

        Args:
            batch: What was trained on.
            losses: The mean loss of each of its parts.
            batch_idx: Its place in the round.
        """
        self._mark_trained(batch_idx)
        own = batch.num_samples
        found = [loss.detach().float() for loss in losses]
        counts = [part.num_samples for part in batch.parts]
        loss = found[0]
        if len(found) > 1:
            weighted = zip(found, counts, strict=True)
            loss = torch.stack([mean * (n / own) for mean, n in weighted]).sum()
        if self.trainer.world_size == 1:
            self.log("train/batch_loss", loss, batch_size=own, prog_bar=True)
        else:  # the mean over processes of this is the batch's mean
            part = loss * (batch.share * self.trainer.world_size)
            self.log(
                "train/batch_loss", part, batch_size=1, prog_bar=True, sync_dist=True
            )
        for own_part, mean, count in zip(batch.parts, found, counts, strict=True):
            self._losses.add(own_part.client_id, mean, count)
        self.parties.trained(batch)

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.parties.num_clients = getattr(data, "num_clients", 1)
        self.parties.is_counting = self.trainer.is_global_zero
        if stage == "fit":
            self.parties.open()

    @override
    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:  # a run of its own, not the last one's rest
            self.parties.forget()
            self._losses = RoundLosses()
            self._resumed, self.skipped_batches = None, 0

    @override
    def on_train_start(self) -> None:
        # After all that may draw random numbers, or clear gradients, before training.
        if self._resumed is not None:
            states = self._resumed["processes"]
            own = states[self.trainer.global_rank % len(states)]
            set_random_state(own["random_state"])
            parameters = dict(self.named_parameters())
            for name, gradient in self._resumed["gradients"].items():
                parameters[name].grad = gradient.to(parameters[name].device)
            self._resumed = None

    @abstractmethod
    def is_accumulating(self) -> bool:
        """Tells whether gradients wait for the rest of a step's batches."""

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        waiting = self.named_parameters() if self.is_accumulating() else ()
        checkpoint["parties"] = self.parties.state_dict()
        checkpoint["traffic"] = self.totals()
        checkpoint["round"] = {
            "skipped_batches": self.skipped_batches,
            "processes": gathered(
                self.trainer,
                {"losses": self._losses.sums, "random_state": random_state()},
            ),
            "gradients": {n: p.grad for n, p in waiting if p.grad is not None},
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        live = num_live(checkpoint)
        self.make_room(live)  # where it is no fit: there is none yet
        if len(self.clients.seats) > live:
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of a run in which as many "
                f"clients act together ({len(self.clients.seats)}), but there were "
                f"{live}: go on with the protocol that the run began with."
            )
        self._resumed = checkpoint["round"]
        self.parties.load_state_dict(checkpoint["parties"])
        if self.has_totals:
            self.parties.traffic.load_state_dict(checkpoint["traffic"])
        losses = [process["losses"] for process in checkpoint["round"]["processes"]]
        place = processes_of(self._trainer)
        self._losses.take_over(losses, place.rank, place.world_size)
        self.skipped_batches = checkpoint["round"]["skipped_batches"]

    def round_loss(self) -> Tensor | float:
        """Returns the mean training loss over the samples of the round so far."""
        return self._losses.mean(self.trainer)

    @override
    def on_train_epoch_end(self) -> None:
        self.log("train/loss", self.round_loss())
        loader = self.trainer.train_dataloader
        if isinstance(loader, ClientLoader):
            loader.mark_round_done()
        losses, self._losses = self._losses, RoundLosses()
        self._log_by_client("loss", losses.by_client(self.trainer))

    def _log_by_client(self, name: str, values: dict[int, Tensor | float]) -> None:
        # Past `self.log`, which would look at each client's metric in each batch.
        metrics = {f"client_{k}/{name}": float(value) for k, value in values.items()}
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


def num_live(checkpoint: dict[str, Any]) -> int:
    """Returns how many clients' segments are live at once in a checkpoint."""
    return len(checkpoint["parties"]["client"]["lines"])


def make_optimizer(
    party: str, factory: OptimizerFactory, segment: nn.Module
) -> Optimizer:
    """Returns the optimizer of a party's parameters.

    Raises:
        ValueError: If its options are out of range, or not its own.
    """
    try:
        return factory(segment.parameters())
    except (TypeError, ValueError) as error:
        options = getattr(factory, "keywords", {})
        raise ValueError(
            f"Expected the {party}'s optimizer (`optimizer.{party}` in a "
            f"configuration) to have valid options, but got {options}: {error}"
        ) from error


def make_scheduler(factory: SchedulerFactory, optimizer: Optimizer) -> LRScheduler:
    """Returns the learning-rate scheduler of a party's optimizer.

    Raises:
        ValueError: If it needs a metric to step.
    """
    scheduler = factory(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "Expected a scheduler that steps without a metric, but got "
            "ReduceLROnPlateau."
        )
    return scheduler
