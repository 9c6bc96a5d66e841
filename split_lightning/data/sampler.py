"""Sampler: the batches of a round, each of one client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from split_lightning.data.schedule import RoundRobinSchedule
from split_lightning.data.seeding import derive_seed, generator


class BatchPlan(NamedTuple):
    """Which samples make a batch, and whose they are.

    Attributes:
        client_id: The client that owns them.
        indices: Their positions in the data set, of shape `(B,)`.
        ends_turn: Whether this is the last batch of the client's turn.
        seed: Seeds whatever is drawn for this batch.
    """

    client_id: int
    indices: Tensor
    ends_turn: bool
    seed: int


class ClientBatchSampler:
    """Plans the batches of a round: each client's turn, in the schedule's order.

    In a turn a client passes `local_epochs` times over its partition, each time in a
    new order. All orders are functions of (seed, round, client), so that a position is
    all there is to resume. The last batch of a pass may be smaller.

    Args:
        partition: For each client the positions of its samples.
        schedule: Who takes part in a round, and in which order.
        batch_size: Number of samples in a batch.
        local_epochs: Number of passes in a turn.
        seed: The run's seed.
        repeat_round: Whether every round is the first one again (to overfit batches).
    """

    def __init__(
        self,
        partition: list[Tensor],
        schedule: RoundRobinSchedule,
        batch_size: int,
        local_epochs: int = 1,
        seed: int = 0,
        repeat_round: bool = False,
    ) -> None:
        self.partition = partition
        self.schedule = schedule
        self.batch_size = batch_size
        self.local_epochs = local_epochs
        self.seed = seed
        self.repeat_round = repeat_round
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the round to plan; Lightning and plain loops call this each round."""
        self.epoch = epoch

    @property
    def round_index(self) -> int:
        """The round that is planned, from 0."""
        return 0 if self.repeat_round else self.epoch

    def turns(self) -> list[int]:
        """Returns the clients of the round in the order of their turns."""
        return self.schedule.turns(len(self.partition), self.round_index, self.seed)

    def batches_per_turn(self, client_id: int) -> int:
        """Returns the number of batches in a client's turn."""
        per_pass = -(-len(self.partition[client_id]) // self.batch_size)
        return per_pass * self.local_epochs

    def __len__(self) -> int:
        """Returns the number of batches in the round."""
        return sum(self.batches_per_turn(client_id) for client_id in self.turns())

    @property
    def rounds_are_equal(self) -> bool:
        """Whether every round has the same number of batches."""
        sizes = {self.batches_per_turn(k) for k in range(len(self.partition))}
        everyone = self.schedule.clients_per_round in (None, len(self.partition))
        return everyone or len(sizes) == 1 or self.repeat_round

    def __iter__(self) -> Iterator[BatchPlan]:
        """Yields the batches of the round."""
        for client_id in self.turns():
            yield from self._turn(client_id)

    def _turn(self, client_id: int) -> Iterator[BatchPlan]:
        indices, place = self.partition[client_id], (self.round_index, client_id)
        last = self.batches_per_turn(client_id) - 1
        number = 0
        for local_epoch in range(self.local_epochs):
            drawn = generator(self.seed, "order", *place, local_epoch)
            order = indices[torch.randperm(len(indices), generator=drawn)]
            for chosen in torch.split(order, self.batch_size):
                seed = derive_seed(self.seed, "batch", *place, number)
                yield BatchPlan(client_id, chosen, number == last, seed)
                number += 1
