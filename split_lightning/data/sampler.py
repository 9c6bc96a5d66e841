"""Sampler: the batches of a round, each of one client, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from split_lightning.data.schedule import Draw, Schedule
from split_lightning.data.seeding import derive_seed, generator
from split_lightning.server_map import ServerMap


class BatchPlan(NamedTuple):
    """Which samples make a batch, and whose they are.

    Attributes:
        client_id: The client that owns them.
        indices: Their positions in the data set, of shape `(B,)`.
        ends_turn: Whether other clients act in the next step.
        seed: Seeds whatever is drawn for this batch.
        ends_round: Whether this is the client's last batch of the round.
    """

    client_id: int
    indices: Tensor
    ends_turn: bool
    seed: int
    ends_round: bool


class ClientBatchSampler:
    """Plans the batches of a round, in the schedule's steps.

    In a round a client passes `local_epochs` times over its partition, each time in a
    new order. All orders are functions of (seed, round, client), so that a position is
    all there is to resume. The last batch of a pass may be smaller. Clients of
    different servers do not meet within a round: one server's clients follow the
    other's.

    Args:
        partition: For each client the positions of its samples.
        schedule: Who takes part in a round, in which order, in which steps.
        batch_size: Number of samples in a batch.
        local_epochs: Number of passes in a round.
        seed: The run's seed.
        repeat_round: Whether every round is the first one again (to overfit batches).
        servers: Which server serves which client; `None`: one for all.
    """

    def __init__(
        self,
        partition: list[Tensor],
        schedule: Schedule,
        batch_size: int,
        local_epochs: int = 1,
        seed: int = 0,
        repeat_round: bool = False,
        servers: ServerMap | None = None,
    ) -> None:
        self.partition = partition
        self.schedule = schedule
        self.batch_size = batch_size
        self.local_epochs = local_epochs
        self.seed = seed
        self.repeat_round = repeat_round
        self.servers = servers or ServerMap()
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

    def steps(self) -> Iterator[list[Draw]]:
        """Yields who takes part in each step of the round, with how many samples."""
        groups: dict[int, dict[int, int]] = {}
        for client_id in self.turns():
            server = self.servers.server_of(client_id, len(self.partition))
            size = len(self.partition[client_id])
            groups.setdefault(server, {})[client_id] = size
        drawn = generator(self.seed, "steps", self.round_index)
        for sizes in groups.values():
            yield from self.schedule.steps(
                sizes, self.batch_size, self.local_epochs, drawn
            )

    def __len__(self) -> int:
        """Returns the number of steps in the round."""
        return sum(1 for _ in self.steps())

    @property
    def rounds_are_equal(self) -> bool:
        """Whether every round has the same number of steps."""
        loads = {
            self.schedule.load_of(len(part), self.batch_size) for part in self.partition
        }
        everyone = self.schedule.clients_per_round in (None, len(self.partition))
        same_groups = len(loads) == 1 and self.servers.is_single
        return everyone or same_groups or self.repeat_round

    def __iter__(self) -> Iterator[BatchPlan]:
        """Yields the batches of the round, step after step."""
        for step in self.plans():
            yield from step

    def plans(self) -> Iterator[list[BatchPlan]]:
        """Yields the batches of each step of the round, one of each client in it."""
        place, epochs = (self.seed, self.round_index), self.local_epochs
        passes = {
            k: _Passes(self.partition[k], epochs, *place, k) for k in self.turns()
        }
        for step, following in pairwise([*self.steps(), []]):
            ends_turn = {k for k, _ in step} != {k for k, _ in following}
            yield [passes[k].plan(k, n, ends_turn) for k, n in step]


class _Passes:
    """A client's samples, pass after pass, each in an order of its own."""

    def __init__(
        self,
        indices: Tensor,
        num_passes: int,
        seed: int,
        round_index: int,
        client_id: int,
    ) -> None:
        self.indices = indices
        self.seed, self.place = seed, (round_index, client_id)
        self._order = indices[:0]  # the rest of the pass
        self._passes = self._batches = 0
        self._left = num_passes * len(indices)

    def plan(self, client_id: int, count: int, ends_turn: bool) -> BatchPlan:
        """Returns the next batch, of so many samples."""
        if len(self._order) == 0:
            drawn = generator(self.seed, "order", *self.place, self._passes)
            places = torch.randperm(len(self.indices), generator=drawn)
            self._order = self.indices[places]
            self._passes += 1
        seed = derive_seed(self.seed, "batch", *self.place, self._batches)
        taken, self._order = self._order[:count], self._order[count:]
        self._batches += 1
        self._left -= count
        return BatchPlan(client_id, taken, ends_turn, seed, self._left == 0)
