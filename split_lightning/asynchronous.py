"""`AsynchronousSplitLightningModule`: batches on their way, and turns that skip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from split_lightning.channel import Activations, values_of
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.loader import StepBatch
from split_lightning.flow import Bundle, Crossed
from split_lightning.joint_step import Several
from split_lightning.kinds import Stop
from split_lightning.loss_skipping import LossSkipping
from split_lightning.module import SplitLightningModule
from split_lightning.support import require_one_device
from split_lightning.weight_stash import StaleWeights, WeightStash


class AsynchronousSplitLightningModule(SplitLightningModule):
    """Trains clients whose turns run at the same time, with two options.

    Pipelining, of an `AsynchronousSchedule(in_flight=n)`: a batch's forward is on the
    client's weights from before the last n - 1 batches of its turn, its gradient is
    computed for those weights, and the newest ones take the step (`WeightStash`). In a
    U-shape the head computes with the same weights as the layers before the cut.

    Skipping (`LossSkipping`): a client whose loss has settled gets no gradient, and
    then sends nothing.

    Args:
        loss_threshold: How much a client's loss must change to be worth an update of
            its weights; `None`: no skipping.
        options: The arguments of `SplitLightningModule`.

    Attributes:
        skipping: Says what of each turn takes place.
        stash: The weights of batches on their way.

    Raises:
        ValueError: If `loss_threshold` is negative, or labels stay with clients, which
            then take part in each batch.
    """

    stashes = True

    def __init__(
        self, *args: Any, loss_threshold: float | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        last = self.parties.kinds.routes[0][-1]
        if loss_threshold is not None and last.party == "client":
            raise ValueError(
                "Expected argument `loss_threshold` to be null where clients have the "
                "loss (`labels` is 'client'): without them the server cannot train on "
                f"what it stored. Got {loss_threshold}."
            )
        self.save_hyperparameters("loss_threshold", logger=False)
        self.skipping = LossSkipping(loss_threshold)
        self.stash = WeightStash()
        self._stale: StaleWeights | None = None  # of the batch that is computed

    @override
    def verify(self, trainer: pl.Trainer, data: pl.LightningDataModule | None) -> None:
        super().verify(trainer, data)
        if not (isinstance(data, SplitDataModule) and data.schedule.hands_in):
            raise MisconfigurationException(
                "AsynchronousSplitLightningModule is for clients whose turns run at "
                "the same time: give the data module an AsynchronousSchedule, or use "
                "SplitLightningModule."
            )
        if self.skipping.threshold is not None or data.schedule.in_flight > 1:
            # What is stored is of whole batches; gradients of stale weights would not
            # be averaged over processes.
            require_one_device(trainer)

    @override
    def begin_turn(self, client_id: int) -> None:
        self.skipping.begin(client_id)
        self.stash.begin(client_id)
        is_sent = self.skipping.state_of(client_id) != "C"
        self.parties.begin_turn(client_id, self.optimizers_of(), is_sent)

    @override
    def hand_in(self, client_id: int, share: float) -> bool:
        self.stash.begin(client_id)
        has_stepped = self.skipping.end(client_id) == "A"
        return super().hand_in(client_id, share if has_stepped else 0.0)

    @override
    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        part = batch.parts[0]
        weights = self.stash.oldest(part.client_id)
        if weights is not None:
            segment = self.clients.seat_of(part.client_id)
            self._stale = StaleWeights(segment, weights)
        return super().training_step(batch, batch_idx)

    @override
    def _compute_at(
        self, stop: Stop, batch: StepBatch, inputs: Several
    ) -> list[Activations]:
        if stop.party == "server":
            return super()._compute_at(stop, batch, inputs)
        part = batch.parts[0]
        if self.skipping.state_of(part.client_id) == "C":
            return [self.skipping.stored(part.client_id, self.device)[0]]
        if self._stale is None:
            return super()._compute_at(stop, batch, inputs)
        return [self._stale(*values_of(inputs[0]), stretch=stop.stretches)]

    @override
    def _send(
        self, place: int, batch: StepBatch, flow: Sequence[Bundle]
    ) -> tuple[list[Bundle], list[Crossed]]:
        part = batch.parts[0]
        if place == 0 and self.skipping.state_of(part.client_id) == "C":
            return list(flow), []  # it is there already
        after, sent = super()._send(place, batch, flow)
        if place == 0:
            smashed = values_of(after[0].values)
            self.skipping.store(part.client_id, smashed, batch.targets)
        return after, sent

    @override
    def _sent_targets(self, batch: StepBatch) -> Tensor:
        part = batch.parts[0]
        if self.skipping.state_of(part.client_id) == "C":
            return self.skipping.stored(part.client_id, self.device)[1]
        return super()._sent_targets(batch)

    @override
    def _returned(self, batch: StepBatch, crossed: Crossed) -> list[Tensor | None]:
        is_client = crossed.ends[0] == "client"
        if is_client and self.skipping.state_of(batch.parts[0].client_id) != "A":
            return [None for own in crossed.smashed for _ in values_of(own)]
        return super()._returned(batch, crossed)

    @override
    def _gather(self, batch: StepBatch) -> None:
        part = batch.parts[0]
        if self._stale is not None:
            self._stale.hand_gradients_on()
            self._stale = None
        segment = self.clients.seat_of(part.client_id)
        self.stash.push(part.client_id, segment, part.service.in_flight)

    @override
    def end_of_step(
        self, batch: StepBatch, losses: Sequence[Tensor], batch_idx: int
    ) -> None:
        super().end_of_step(batch, losses, batch_idx)
        part = batch.parts[0]
        self.skipping.trained(part.client_id, losses[0], part.num_samples)

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self.skipping.forget()
            self.stash = WeightStash()

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        turns = self.skipping.count()
        if self.skipping.threshold is not None:
            for state, number in turns.items():
                self.log(f"skipping/{state}", number / max(1, sum(turns.values())))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["skipping"] = self.skipping.state_dict()
        checkpoint["stash"] = self.stash.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.skipping.load_state_dict(checkpoint["skipping"])
        self.stash.load_state_dict(checkpoint["stash"])
