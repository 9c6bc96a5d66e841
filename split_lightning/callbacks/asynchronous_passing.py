"""`AsynchronousWeightPassing`: clients hand in, and begin from the newest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from split_lightning.callbacks.weight_passing import WeightPassing
from split_lightning.data.asynchronous_schedule import AsynchronousSchedule
from split_lightning.data.service import TurnEvent

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule


class AsynchronousWeightPassing(WeightPassing):
    """Mixes the weights of each client that is done into the newest, by their age.

    A turn begins from the newest weights that were handed in. At its end the client
    hands its own in, and the newest become (1 - a) newest + a own, with
    a = (1 + age) ** -staleness_exponent, where the age is the number of hand-ins since
    the turn began: the polynomial rule of FedAsync (Xie et al. 2019,
    https://arxiv.org/abs/1903.03934). Of age 0 a is 1: a hand-off. When turns begin and
    end is what an `AsynchronousSchedule` says.

    Departures from FedAsync: no factor beside the rule (its alpha is 1), and no
    proximal term; the server's segment is trained by all and never mixed.

    Buffers (BatchNorm's statistics) are mixed with the parameters, or stay with each
    client (`buffers`). The optimizer's state is each client's own, is mixed with the
    weights, or is cleared (`optimizer_state`: keep, travel, reset) where the newest
    weights are another's.

    At the end of each round `staleness/mean` and `staleness/max` are logged: the age of
    its hand-ins.

    Args:
        staleness_exponent: How much age takes from a hand-in's share; 0: nothing, so
            that the last hand-in is the newest weights, whatever its age.

    Raises:
        ValueError: If `staleness_exponent` is negative.

    Example::

        data = SplitDataModule(images, 10, schedule=AsynchronousSchedule(local_steps=5))
        trainer = Trainer(callbacks=[AsynchronousWeightPassing()])
        trainer.fit(module, datamodule=data)
    """

    hands_in = True

    def __init__(self, staleness_exponent: float = 0.5) -> None:
        if staleness_exponent < 0:
            raise ValueError(
                "Expected argument `staleness_exponent` to be a number from 0, but got "
                f"{staleness_exponent}."
            )
        self.staleness_exponent = staleness_exponent
        self._ages: list[int] = []  # of the round's hand-ins
        self._seconds: str | None = None  # by which the run of a checkpoint planned

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        schedule = _schedule_of(trainer)
        if not isinstance(schedule, AsynchronousSchedule):
            raise MisconfigurationException(
                "AsynchronousWeightPassing needs to know when turns begin and end: "
                "give the data module an AsynchronousSchedule; got "
                f"{type(schedule).__name__}."
            )
        parties = pl_module.parties
        if parties.servers is None or not parties.server_map.is_single:
            raise MisconfigurationException(
                "AsynchronousWeightPassing is for clients that train against one "
                "server, whose steps give the order of all that happens: use a split "
                "network and num_servers=1."
            )
        if parties.kinds.are_several:
            raise MisconfigurationException(
                "AsynchronousWeightPassing mixes the weights of each client into those "
                "of all: give all clients the same network and the same cut layer, or "
                "let them take turns (RoundRobinWeightPassing)."
            )
        if pl_module.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "Expected argument `accumulate_grad_batches` to be 1 where the server "
                "takes a step on each batch as it arrives, but got "
                f"{pl_module.accumulate_grad_batches}."
            )
        if schedule.in_flight > 1 and not pl_module.stashes:
            raise MisconfigurationException(
                f"AsynchronousSchedule(in_flight={schedule.in_flight}) needs a module "
                "that keeps the weights of batches on their way: use "
                "AsynchronousSplitLightningModule."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        schedule = _schedule_of(trainer)
        before, self._seconds = self._seconds, repr(schedule.seconds)
        if trainer.ckpt_path is None:
            self._ages = []
        elif before not in (None, self._seconds):
            raise ValueError(
                "Expected the devices and links that the run of `ckpt_path` began with "
                f"(`system`), to go on exactly ({before}), but got {self._seconds}."
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow(batch.service.before, pl_module)
        pl_module.switch_to(batch.client_id)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._follow(batch.service.after, pl_module)
        if trainer.is_last_batch:
            self._end_turns(pl_module)

    def _follow(
        self, events: tuple[TurnEvent, ...], module: SplitLightningModule
    ) -> None:
        for client_id, begins in events:
            if begins:
                module.begin_turn(client_id)
            else:
                self._hand_in(client_id, module)

    def _end_turns(self, module: SplitLightningModule) -> None:
        """Ends turns that still run, where a round was cut short."""
        for client_id in module.clients.running():
            self._hand_in(client_id, module)

    def _hand_in(self, client_id: int, module: SplitLightningModule) -> None:
        age = module.clients.age_of(client_id)
        if module.hand_in(client_id, (1 + age) ** -self.staleness_exponent):
            self._ages.append(age)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._end_turns(pl_module)  # of a run that ends in mid-round (`max_steps`)
        ages, self._ages = self._ages, []
        if ages:
            pl_module.log("staleness/mean", sum(ages) / len(ages))
            pl_module.log("staleness/max", float(max(ages)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ages": self._ages, "seconds": self._seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ages = list(state_dict["ages"])
        self._seconds = state_dict["seconds"]


def _schedule_of(trainer: pl.Trainer) -> Any:
    return getattr(getattr(trainer, "datamodule", None), "schedule", None)
