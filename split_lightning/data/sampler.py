"""Sampler: the batches of a round, each of one client, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from split_lightning.data.availability import Availability
from split_lightning.data.least_batch import LeastBatch, enlarged
from split_lightning.data.schedule import Draw, Schedule
from split_lightning.data.seeding import derive_seed, generator
from split_lightning.data.service import Service
from split_lightning.server_map import ServerMap


class BatchPlan(NamedTuple):
    """Which samples make a batch, and whose they are.

    Attributes:
        client_id: The client that owns them.
        indices: Their positions in the data set, of shape `(B,)`.
        ends_turn: Whether it is the last of a turn: in turn, other clients act in the
            next step.
        seed: Seeds whatever is drawn for this batch.
        ends_round: Whether this is the last batch that the client makes in the round.
        service: What happens around the step.
    """

    client_id: int
    indices: Tensor
    ends_turn: bool
    seed: int
    ends_round: bool
    service: Service = Service()


class ClientBatchSampler:
    """Plans the batches of a round, in the schedule's steps.

    In a round a client passes `local_epochs` times over its partition, each time in a
    new order. All orders are functions of (seed, round, client), so that a position is
    all there is to resume. The last batch of a pass may be smaller; where it would be
    smaller than `least`, the last two are shared out evenly (`enlarged`). Clients of
    different servers do not meet within a round: one server's clients follow the
    other's. Clients that are absent, and batches after which a client dropped out, are
    left out of what the schedule plans (see `Availability`); so are steps that nobody
    takes part in any more.

    Args:
        partition: For each client the positions of its samples.
        schedule: Who takes part in a round, in which order, in which steps.
        batch_size: Number of samples in a batch.
        local_epochs: Number of passes in a round.
        seed: The run's seed.
        repeat_round: Whether every round is the first one again (to overfit batches).
        servers: Which server serves which client; `None`: one for all.
        availability: Which clients are there in a round, and how far they come;
            `None`: all, to the end.
        least: How small a batch may be, as the network needs it; `None`: one sample.

    Raises:
        ValueError: If `availability` does not go with the clients or the schedule.
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
        availability: Availability | None = None,
        least: LeastBatch | None = None,
    ) -> None:
        self.partition = partition
        self.schedule = schedule
        self.batch_size = batch_size
        self.local_epochs = local_epochs
        self.seed = seed
        self.repeat_round = repeat_round
        self.servers = servers or ServerMap()
        self.availability = availability or Availability()
        if not self.availability.is_trivial:
            self.availability.check(len(partition), schedule)
        self.least = least or LeastBatch()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the round to plan; Lightning and plain loops call this each round."""
        self.epoch = epoch

    @property
    def round_index(self) -> int:
        """The round that is planned, from 0."""
        return 0 if self.repeat_round else self.epoch

    def turns(self) -> list[int]:
        """Returns the clients that are there in the round, in the order of their turns.

        Those of them that drop out before their first batch take no step.
        """
        return self.availability.present(self._drawn(), self.seed, self.round_index)

    def steps(self) -> Iterator[list[Draw]]:
        """Yields who takes part in each step of the round, with how many samples."""
        steps = list(self._planned_steps())
        dropped = self._batches_made(steps)
        begun: Counter[int] = Counter()
        for step in steps:
            begun.update(client_id for client_id, _ in step)
            made = [Draw(k, n) for k, n in step if begun[k] <= dropped.get(k, inf)]
            if made:
                yield made

    def absentees(self) -> tuple[list[int], dict[int, tuple[int, int]]]:
        """Returns who is not there in the round, and who drops out of it.

        Returns:
            Those who were drawn for the round and are absent, in ascending order; and
            of each who drops out the numbers of batches that are made and were planned.
        """
        steps = list(self._planned_steps())
        planned = _batches_in(steps)
        made = self._batches_made(steps)
        absent = sorted(set(self._drawn()) - set(self.turns()))
        return absent, {k: (made[k], planned[k]) for k in sorted(made)}

    def _drawn(self) -> list[int]:
        """Returns the clients that the schedule draws for the round."""
        return self.schedule.turns(len(self.partition), self.round_index, self.seed)

    def _planned_steps(self) -> Iterator[list[Draw]]:
        """Yields the steps of those who are there, if nobody drops out."""
        steps = self._scheduled_steps()
        if self.least.is_trivial:
            return steps
        sizes = {k: len(part) for k, part in enumerate(self.partition)}
        return iter(enlarged(list(steps), sizes, self.least))

    def _scheduled_steps(self) -> Iterator[list[Draw]]:
        """Yields the steps as the schedule plans them, whatever their sizes."""
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

    def _batches_made(self, steps: list[list[Draw]]) -> dict[int, int]:
        """Returns how many of the batches of planned steps who drops out makes."""
        planned = _batches_in(steps)
        return self.availability.batches_made(planned, self.seed, self.round_index)

    def __len__(self) -> int:
        """Returns the number of steps in the round."""
        return sum(1 for _ in self.steps())

    @property
    def rounds_are_equal(self) -> bool:
        """Whether every round has the same number of steps, whatever is drawn."""
        loads = {
            self.schedule.load_of(len(part), self.batch_size) for part in self.partition
        }
        everyone = self.schedule.clients_per_round in (None, len(self.partition))
        same_groups = len(loads) == 1 and self.servers.is_single
        all_there = self.availability.is_trivial and not self._may_merge
        return self.repeat_round or (all_there and (everyone or same_groups))

    @property
    def _may_merge(self) -> bool:
        """Whether batches may be merged, so that the number of steps may differ."""
        needed = max(self.least.own, self.least.total)
        batch_size = self.batch_size
        counts_are_drawn = self.schedule.load_of(3 * batch_size, batch_size) != 3
        return needed > 1 and (counts_are_drawn or batch_size < 2 * needed - 1)

    def __iter__(self) -> Iterator[BatchPlan]:
        """Yields the batches of the round, step after step."""
        for step in self.plans():
            yield from step

    def plans(self) -> Iterator[list[BatchPlan]]:
        """Yields the batches of each step of the round, one of each client in it."""
        steps = list(self.steps())
        left = _batches_in(steps)
        place = (self.seed, self.round_index)
        passes = {k: _Passes(self.partition[k], *place, k) for k in left}
        for draws, ends_turn, service in self.schedule.placed(steps):
            left.subtract(k for k, _ in draws)
            yield [
                passes[k].plan(k, n, ends_turn, left[k] == 0, service) for k, n in draws
            ]


def _batches_in(steps: list[list[Draw]]) -> Counter[int]:
    """Returns the number of batches of each client that takes part in steps."""
    return Counter(client_id for step in steps for client_id, _ in step)


class _Passes:
    """A client's samples, pass after pass, each in an order of its own."""

    def __init__(
        self,
        indices: Tensor,
        seed: int,
        round_index: int,
        client_id: int,
    ) -> None:
        self.indices = indices
        self.seed, self.place = seed, (round_index, client_id)
        self._order = indices[:0]  # the rest of the pass
        self._passes = self._batches = 0

    def plan(
        self,
        client_id: int,
        count: int,
        ends_turn: bool,
        ends_round: bool,
        service: Service,
    ) -> BatchPlan:
        """Returns the next batch, of so many samples."""
        if len(self._order) == 0:
            drawn = generator(self.seed, "order", *self.place, self._passes)
            places = torch.randperm(len(self.indices), generator=drawn)
            self._order = self.indices[places]
            self._passes += 1
        seed = derive_seed(self.seed, "batch", *self.place, self._batches)
        taken, self._order = self._order[:count], self._order[count:]
        self._batches += 1
        return BatchPlan(client_id, taken, ends_turn, seed, ends_round, service)
