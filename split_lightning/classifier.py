"""`Classifier`: what split and unsplit training have in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelSummary
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self, override

from split_lightning.callbacks.monitors import require_known_monitors
from split_lightning.callbacks.segment_summary import SegmentSummary
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.least_batch import LeastBatch
from split_lightning.data.loader import ClientLoader, StepBatch
from split_lightning.evaluated_classifier import EvaluatedClassifier, client_metric
from split_lightning.finite import NonFiniteError, NonFinitePolicy, are_finite
from split_lightning.fitness import set_least_batch
from split_lightning.loading import CONFIGURATION, OBJECTS, missing_arguments
from split_lightning.parties import Parties
from split_lightning.processes import all_agree, gathered, processes_of, summed
from split_lightning.random_state import random_state, set_random_state
from split_lightning.resumed_options import (
    Options,
    StateFitter,
    describe,
    go_on,
    require_rounds,
)
from split_lightning.round_losses import RoundLosses
from split_lightning.route import Party
from split_lightning.support import WEIGHT_PASSING_REMEDY, require_one_network

_logger = logging.getLogger(__name__)


class Classifier(EvaluatedClassifier):
    """What split and unsplit training have in common; subclasses say how they train.

    Args:
        num_classes: Number of classes.
        criterion: The loss of logits `(B, K)` and labels `(B,)`; `None`: cross-entropy.
        channels_last: Whether images and weights are laid out channels-last.
        non_finite: What becomes of a batch whose numbers are not finite: `stop` the
            run with `NonFiniteError`, or `skip` it: no step, BatchNorm's statistics
            as before, gradients that wait for the same step dropped with it.
        parties: Who holds which weights.

    Attributes:
        skipped_batches: Number of batches that were skipped since the run's start.
        least: How small a batch may be, from the start of training on.

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
        if non_finite not in get_args(NonFinitePolicy):
            raise ValueError(
                "Expected argument `non_finite` to be one of "
                f"{get_args(NonFinitePolicy)}, but got {non_finite!r}."
            )
        super().__init__(num_classes, criterion, channels_last, parties)
        if criterion is not None:
            self.objects = (*self.objects, "criterion")
        self.non_finite = non_finite
        self.skipped_batches = 0
        self.least = LeastBatch()
        self._kept_buffers: list[tuple[Tensor, Tensor]] = []
        self._losses = RoundLosses()
        self._resumed: dict[str, Any] | None = None  # waits for the training's start
        self._checkpoint: dict[str, Any] | None = None  # waits for the optimizers
        self._options: Options = {}  # of optimizers and schedulers, when they were new

    optimizer_names: tuple[str, ...]  # as configurations have them, in order
    scheduler_interval: Literal["batch", "round"]

    # How the command line built it, in plain containers; `None`: it did not.
    configuration: dict[str, Any] | None = None
    objects: tuple[str, ...] = ("network",)  # arguments that are no plain options

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
            ValueError: If an argument must be given, or the module is of another class.
        """
        kind, missing, configuration = missing_arguments(cls, checkpoint_path, kwargs)
        above: Any = super(Classifier, kind)
        module: Self = above.load_from_checkpoint(
            checkpoint_path,
            map_location=map_location,
            hparams_file=hparams_file,
            strict=strict,
            weights_only=weights_only,
            **{**missing, **kwargs},
        )
        module.configuration = configuration
        return module

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

    def begin_turn(self, client_id: int) -> None:
        """Lets a client begin from the newest weights that were handed in.

        The bytes are counted where they come from another client.
        """
        self.parties.begin_turn(client_id, self.optimizers_of())

    def hand_in(self, client_id: int, share: float) -> bool:
        """Mixes a client's weights into the newest, at the end of its turn.

        Args:
            client_id: Whose.
            share: The part of the mixture that is its own; 1: a hand-off.

        Returns:
            Whether it had any to hand in.
        """
        self.parties.hand_in(client_id, share, self.optimizers_of())
        return share > 0

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

    def average(self, party: Party, is_remote: bool = True) -> int:
        """Lets all go on from the mean of a party's segments.

        The mean is weighted by the samples that each was trained on since the last.

        Args:
            party: Whose.
            is_remote: Whether they are at different places.

        Returns:
            The bytes that would travel, from all that were trained to where the mean
            is made, and back.
        """
        return self.parties.average(party, self.optimizers_of(), is_remote)

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        # The first hook that knows the Trainer: before Lightning's own checks, whose
        # messages cannot name our arguments.
        if self.trainer.state.fn == TrainerFn.FITTING:
            data = getattr(self.trainer, "datamodule", None)
            if not isinstance(data, SplitDataModule):
                raise MisconfigurationException(
                    "Expected the data of a fit to be a SplitDataModule, which plans "
                    "the clients' turns, but got "
                    f"{'loaders' if data is None else type(data).__name__}. Pass it "
                    "as trainer.fit(module, datamodule=data)."
                )
            self.verify(self.trainer, data)
            require_one_network(self.trainer, data, self.parties)
            require_known_monitors(self.trainer, self, data, client_metric)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        summaries = [c for c in callbacks if isinstance(c, ModelSummary)]
        if any(summary._max_depth == 1 for summary in summaries):  # Lightning's own
            return [SegmentSummary()]
        return []

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
        self._took_place(batch, batch_idx)
        return False

    def check_turn(self, batch: StepBatch) -> None:
        """Stops where others are to act than those whose weights are live.

        Raises:
            RuntimeError: Says what to add.
        """
        first = batch.parts[0].client_id
        if not self.parties.acting() and len(batch.parts) == 1:
            self.hand_over(first)  # the first of all
        acting = self.parties.acting()
        strangers = {p.client_id for p in batch.parts}.difference(acting)
        if strangers:
            raise RuntimeError(
                f"It is the turn of client {min(strangers)}, but client "
                f"{next(iter(acting), None)} is active: nothing has passed the weights "
                f"on. {WEIGHT_PASSING_REMEDY}"
            )

    def _took_place(self, batch: StepBatch, batch_idx: int) -> None:
        """Notes that a step is done, with its numbers or without."""
        self.parties.stepped(batch)
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
        self._took_place(batch, batch_idx)
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
        self.parties.num_clients = getattr(
            data, "num_clients", self.parties.num_clients
        )
        self.parties.is_counting = self.trainer.is_global_zero
        if stage == "fit":
            self.parties.open()
            if isinstance(data, SplitDataModule):
                self.least = set_least_batch(self, data, self.trainer.world_size)

    @override
    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:  # a run of its own, not the last one's rest
            self.parties.forget()
            self._losses = RoundLosses()
            self._resumed, self.skipped_batches = None, 0
        self._take_over_optimizers()

    def _take_over_optimizers(self) -> None:
        """Has a run that goes on do so with the optimizers' options of now."""
        optimizers = dict(
            zip(self.optimizer_names, self.trainer.optimizers, strict=False)
        )
        configs: list[Any] = self.trainer.lr_scheduler_configs
        schedulers = [config.scheduler for config in configs]
        self._options = describe(optimizers, schedulers, self.scheduler_interval)
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        differ = go_on(checkpoint, self._options, optimizers, schedulers)
        if differ:
            self.parties.fit_optimizer_states(StateFitter(optimizers))
            if self.trainer.is_global_zero:
                _logger.warning(
                    "The run goes on with other options: %s.", ", ".join(differ)
                )

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
        checkpoint["options"] = self._options
        checkpoint[OBJECTS] = list(self.objects)
        if self.configuration is not None:
            checkpoint[CONFIGURATION] = self.configuration
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
        if self._trainer is None and "SplitDataModule" in checkpoint:
            self.parties.num_clients = checkpoint["SplitDataModule"]["num_clients"]
        self.make_room(live)  # where it is no fit: there is none yet
        if len(self.clients.seats) > live:
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of a run in which as many "
                f"clients act together ({len(self.clients.seats)}), but there were "
                f"{live}: go on with the protocol that the run began with."
            )
        self._resumed = checkpoint["round"]
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            require_rounds(checkpoint, self._trainer.max_epochs)
            self._checkpoint = checkpoint
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

    def client_losses(self) -> dict[int, float]:
        """Returns each client's mean training loss in the round so far."""
        losses = self._losses.by_client(self.trainer)
        return {client_id: float(loss) for client_id, loss in losses.items()}

    @override
    def on_train_epoch_end(self) -> None:
        self.log("train/loss", self.round_loss())
        loader = self.trainer.train_dataloader
        if isinstance(loader, ClientLoader):
            loader.mark_round_done()
        self._log_by_client("loss", self.client_losses())
        self._losses = RoundLosses()


def num_live(checkpoint: dict[str, Any]) -> int:
    """Returns how many clients' segments are live at once in a checkpoint."""
    return len(checkpoint["parties"]["client"]["lines"])
