"""What of Lightning goes with split learning, and what must be refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from split_lightning.callbacks.weight_passing import WeightPassing
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.kinds import ClientKinds
from split_lightning.parties import Parties

_PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")
_CALLBACKS = (BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging)

WEIGHT_PASSING_REMEDY = (
    "Add RoundRobinWeightPassing() to the Trainer's callbacks, or "
    "RoundRobinWeightPassing(enabled=False) for clients that never share weights."
)


def refuse_unsupported(trainer: pl.Trainer) -> None:
    """Stops where the Trainer is told what would be ignored or train wrongly.

    Raises:
        MisconfigurationException: Names what is refused, and what to use instead.
    """
    if trainer.gradient_clip_val is not None:
        raise MisconfigurationException(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) cannot clip two "
            "segments. Use SplitLightningModule(gradient_clip_val=...), in a "
            "configuration `model.gradient_clip_val`, which clips each by itself."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) knows "
            "nothing of turns. Use SplitLightningModule(accumulate_grad_batches=...), "
            "in a configuration `model.accumulate_grad_batches`."
        )
    require_processes(trainer)
    if trainer.precision not in _PRECISIONS:
        raise MisconfigurationException(
            f"Trainer(precision={trainer.precision!r}) would scale the client's "
            f"gradient twice. Use one of {_PRECISIONS}."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _CALLBACKS):
            raise MisconfigurationException(
                f"{type(callback).__name__} needs a single optimizer, and split "
                "learning has one for each segment. Leave it out."
            )


def require_processes(trainer: pl.Trainer) -> None:
    """Stops where several processes would not train as one does.

    Raises:
        MisconfigurationException: Names the strategy, and what to use instead.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy) or strategy._start_method != "popen":
        start = getattr(strategy, "_start_method", None)
        how = f"(start_method={start!r})" if start else ""
        raise MisconfigurationException(
            f"{type(strategy).__name__}{how} would not train as one process does. Use "
            "Trainer(strategy='ddp'), or one device: Trainer(devices=1, "
            "strategy='auto')."
        )
    if strategy._ddp_kwargs.get("find_unused_parameters"):
        raise MisconfigurationException(
            "DDPStrategy(find_unused_parameters=True) looks for parameters without a "
            "gradient when the server's backward is done, and the client's is still to "
            "come. Use Trainer(strategy='ddp')."
        )


def require_one_process(
    trainer: pl.Trainer, data: pl.LightningDataModule | None
) -> None:
    """Stops where several processes would share out steps of several clients.

    Raises:
        MisconfigurationException: Says what to set.
    """
    together = isinstance(data, SplitDataModule) and data.schedule.acts_together
    if together and trainer.world_size > 1:
        raise MisconfigurationException(
            f"{trainer.world_size} processes share out the batches of clients that "
            "act one at a time, and here several take part in a step. Use one device: "
            "Trainer(devices=1, strategy='auto')."
        )


def require_one_device(trainer: pl.Trainer) -> None:
    """Stops where something is for one process alone.

    Raises:
        MisconfigurationException: Names the strategy, and what to use instead.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} is for several processes. Use one "
            "device: Trainer(devices=1, strategy='auto')."
        )


def require_weight_passing(
    trainer: pl.Trainer, data: pl.LightningDataModule | None, optimizer_state: str
) -> None:
    """Stops where several clients would take turns and nothing passes the weights on.

    Raises:
        MisconfigurationException: Says what to add, or which policy would do nothing.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    passing = [c for c in callbacks if isinstance(c, WeightPassing)]
    parties = 1
    if isinstance(data, SplitDataModule):
        parties = data.schedule.num_parties(data.num_clients)
    if not passing and parties > 1:
        raise MisconfigurationException(
            f"{parties} clients take turns, and nothing passes the weights "
            f"on. {WEIGHT_PASSING_REMEDY}"
        )
    together = isinstance(data, SplitDataModule) and data.schedule.acts_together
    for callback in passing:
        if callback.acts_together not in (None, together):
            act = "Several clients act" if together else "One client acts"
            raise MisconfigurationException(
                f"{act} in each step, and {type(callback).__name__} is for "
                f"{'one' if together else 'several'}. Use another schedule "
                "(ParallelSchedule is for several), or another callback "
                "(ClientAveraging is for both, with every='step' for several)."
            )
    hands_in = isinstance(data, SplitDataModule) and data.schedule.hands_in
    for callback in passing:
        if hands_in and not callback.hands_in:
            raise MisconfigurationException(
                "The clients' turns run at the same time, and "
                f"{type(callback).__name__} is for turns that follow each other. Use "
                "AsynchronousWeightPassing()."
            )
    if optimizer_state != "keep" and not all(callback.enabled for callback in passing):
        raise MisconfigurationException(
            f"`optimizer_state={optimizer_state}` is a policy for weights that come "
            "from elsewhere, and with RoundRobinWeightPassing(enabled=False) or "
            "ClientAveraging(every=None) none do. Leave it at `keep`."
        )


def require_one_network(
    trainer: pl.Trainer, data: pl.LightningDataModule | None, parties: Parties
) -> None:
    """Stops where Lightning would average the weights of different clients over time.

    Raises:
        MisconfigurationException: Says what to leave out.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    passing = [c for c in callbacks if isinstance(c, WeightPassing)]
    pieces = parties.pieces.values()
    is_one = parties.server_map.is_single and not parties.kinds.are_several
    is_one = is_one and not any(piece.is_between for piece in pieces)
    number = 1
    if isinstance(data, SplitDataModule):
        number = data.schedule.num_parties(data.num_clients)
    if number == 1 or (is_one and all(callback.keeps_one for callback in passing)):
        return
    for callback in callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{type(callback).__name__} averages one network over time, and here "
                "clients have weights of their own, which it would mix. Leave it out, "
                "or train one network: RoundRobinWeightPassing() with one server "
                "(protocol=round_robin)."
            )


def require_like_clients(
    trainer: pl.Trainer,
    data: pl.LightningDataModule | None,
    kinds: ClientKinds,
    passing: Sequence[WeightPassing],
) -> None:
    """Stops where clients that hold different layers would have to hold the same.

    Raises:
        ValueError: If there are more kinds to deal out than clients.
        MisconfigurationException: Says what needs clients that are alike.
    """
    if isinstance(data, SplitDataModule):
        kinds.check(data.num_clients)
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"{trainer.world_size} processes train the same layers in each step, and "
            "here clients differ in the layers that they hold. Use one device: "
            "Trainer(devices=1, strategy='auto')."
        )
    if any(callback.acts_together and callback.num_seats == 1 for callback in passing):
        raise MisconfigurationException(
            "Clients that are averaged at each step act on the same weights, and here "
            "they differ in the layers that they hold. Average them at the ends of "
            "rounds (ClientAveraging(every=1); in a configuration protocol=parallel "
            "protocol.callbacks.weight_passing.every=1), or let all cut after the same "
            "layer."
        )
