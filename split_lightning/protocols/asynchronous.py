"""`AsynchronousWeightPassing`: clients train at the same time, without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from split_lightning.protocols.actions import (
    Action,
    Begin,
    Buffers,
    Mix,
    OptimizerState,
    Send,
    Train,
)
from split_lightning.protocols.protocol import Protocol, check_count, check_policies
from split_lightning.protocols.round import Planned, Round
from split_lightning.system.asynchronous_round import (
    AsynchronousRound,
    Began,
    Event,
    Served,
    Turn,
)
from split_lightning.system.seconds import Seconds


class AsynchronousWeightPassing(Protocol):
    """All turns run at the same time; the newest weights take a share of each by age.

    A turn begins from the newest weights. At its end they become (1 - a) newest + a own
    with a = (1 + age) ** -staleness_exponent, where the age is the number of turns that
    ended since this one began: the polynomial rule of FedAsync (Xie et al. 2019,
    https://arxiv.org/abs/1903.03934). At age 0 a is 1: a hand-off. Each client has the
    turns that it would have in a round robin. A round begins for all at once, and ends
    when all are done. The order of events is simulated (`AsynchronousRound`).

    Departures from FedAsync: no factor beside the rule (its alpha is 1), and no
    proximal term; the server's segment is trained by all and never mixed.

    At the end of each round `staleness/mean` and `staleness/max` are logged: the ages.

    Args:
        staleness_exponent: How much age reduces a share; 0: not at all.
        shuffle: Whether the order of turns is random in each round; it decides among
            clients that would begin, or be served, at the same time.
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        local_steps: Number of batches in a turn; `None`: all of the round.
        max_staleness: No turn ends at a greater age: a client that could make one so
            old waits. 0 is the round robin. `None`: no client waits.
        in_flight: Number of batches that a client may have on their way. Its forward
            pass takes the weights from before the last `in_flight - 1` of them.
        optimizer_state: What happens to a client's optimizer state when weights move:
            each client keeps its own (`keep`), it is mixed with the weights (`travel`),
            or it is dropped (`reset`) unless the newest weights are its own.
        buffers: Whether buffers (BatchNorm's statistics) are mixed (`average`), or each
            client keeps its own (`keep`).

    Raises:
        ValueError: If an argument is out of range.

    Example::

        trainer = Trainer(callbacks=[AsynchronousWeightPassing(local_steps=5)])
    """

    overlapping = True
    steps_each_batch = "the batches of clients alternate"

    def __init__(
        self,
        staleness_exponent: float = 0.5,
        shuffle: bool = False,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
        max_staleness: int | None = None,
        in_flight: int = 1,
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
    ) -> None:
        super().__init__(clients_per_round)
        check_count("local_steps", local_steps, "batches, or null for no limit")
        check_policies(optimizer_state, buffers)
        if staleness_exponent < 0:
            raise ValueError(
                "Expected argument `staleness_exponent` to be a number from 0, but got "
                f"{staleness_exponent}."
            )
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(
                "Expected argument `max_staleness` to be an age from 0, or null for no "
                f"bound, but got {max_staleness}."
            )
        if in_flight < 1:
            raise ValueError(
                "Expected argument `in_flight` to be a positive number of batches, but "
                f"got {in_flight}."
            )
        self.staleness_exponent = staleness_exponent
        self.shuffle = shuffle
        self.local_steps = local_steps
        self.max_staleness = max_staleness
        self.in_flight = in_flight
        self.optimizer_state: OptimizerState = optimizer_state
        self.buffers: Buffers = buffers
        self._ages: list[int] = []  # of the round so far
        self._seconds: str | None = None  # the seconds of the run of a checkpoint

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        turns = self._turns(round)
        waiting: dict[int, deque[list[Planned]]] = {}
        for own in turns:
            waiting.setdefault(own[0].client_id, deque()).append(own)
        policies = self.optimizer_state, self.buffers
        running: dict[int, Iterator[Planned]] = {}
        unsent: dict[int, Iterator[Planned]] = {}
        for event in self._simulated(turns, round.seconds):
            client = event.client_id
            if isinstance(event, Began):
                turn = waiting[client].popleft()
                running[client] = iter(turn)
                unsent[client] = iter(turn if self.in_flight > 1 else ())
                yield Begin(client, *policies)
                yield from map(Send, islice(unsent[client], self.in_flight))
            elif isinstance(event, Served):
                batch = next(running[client])
                yield Train((batch._replace(ends_turn=event.ends_turn),))
                yield from map(Send, islice(unsent[client], 1))
            else:
                yield Mix(client, event.age, self.staleness_exponent, *policies)

    def events(self, round: Round) -> list[Event]:
        """Returns the events of a round, in order."""
        return self._simulated(self._turns(round), round.seconds)

    def _simulated(self, turns: list[list[Planned]], seconds: Seconds) -> list[Event]:
        numbered = [
            Turn(number, own[0].client_id, [batch.num_samples for batch in own])
            for number, own in enumerate(turns)
        ]
        return AsynchronousRound(
            numbered, seconds, self.in_flight, self.max_staleness
        ).run()

    def _turns(self, round: Round) -> list[list[Planned]]:
        """Returns the batches of each turn, in the order of the round robin."""
        clients = round.clients(self.clients_per_round, self.shuffle)
        turns: dict[tuple[int, int], list[Planned]] = {}
        for client, batches in round.turns(clients, self.local_steps, self.shuffle):
            for batch in batches:
                turn = batch.number // self.local_steps if self.local_steps else 0
                turns.setdefault((client, turn), []).append(batch)
        return list(turns.values())

    @override
    def carry_out(self, actions: Iterable[Action], module: Any) -> None:
        self._ages += [own.age for own in actions if isinstance(own, Mix)]
        super().carry_out(actions, module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.ckpt_path is None:
            self._ages = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        loader: Any = trainer.train_dataloader
        before, self._seconds = self._seconds, repr(loader.round().seconds)
        if trainer.ckpt_path is not None and before not in (None, self._seconds):
            raise ValueError(
                "Expected the devices and links that the run of `ckpt_path` began with "
                f"(`system`), to resume exactly ({before}), but got {self._seconds}."
            )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        ages, self._ages = self._ages, []
        if ages:
            pl_module.log("staleness/mean", sum(ages) / len(ages))
            pl_module.log("staleness/max", float(max(ages)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ages": list(self._ages), "seconds": self._seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ages = list(state_dict["ages"])
        self._seconds = state_dict["seconds"]
