"""`Round`: the clients of a round and their batches, from which a plan is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from math import inf
from typing import Literal, NamedTuple, TypeAlias

import torch

from split_lightning.protocols.least_batch import Draw, LeastBatch, enlarged, sizes_of
from split_lightning.seeding import generator
from split_lightning.system.availability import Availability
from split_lightning.system.seconds import EqualSeconds, Seconds

# How a batch of several clients is drawn: a batch of each, or one from all of them.
Draws: TypeAlias = Literal["equal", "proportional"]


class Planned(NamedTuple):
    """A batch of one client, before its samples are loaded.

    Attributes:
        client_id: The client.
        number: Its number among the client's batches of the round, from 0.
        pass_number: The client's pass over its samples, from 0.
        start: The position of its first sample in the order of the pass.
        num_samples: Number of samples.
        ends_turn: Whether other clients train in the next step.
        ends_round: Whether it is the client's last batch of the round.
    """

    client_id: int
    number: int
    pass_number: int
    start: int
    num_samples: int
    ends_turn: bool
    ends_round: bool


class Round:
    """The clients of a round, and the batches that they make.

    All of it is a function of the seed, the round and the sizes of the partition. In a
    round a client passes `local_epochs` times over its samples. The last batch of a
    pass may be smaller; where it would be smaller than `least`, the last two are shared
    out evenly. Clients that are absent are left out, and so are the batches after which
    a client drops out.

    Args:
        number: The round, from 0.
        sizes: Number of samples of each client.
        batch_size: Number of samples in a batch.
        local_epochs: Number of passes.
        seed: The run's seed.
        availability: Which clients are absent or drop out.
        least: How small a batch may be.
        seconds: The seconds of each part of a step, for protocols that plan by time.
        drawn_as: The round whose random draws it has; `None`: its own.

    Attributes:
        repeats: Whether each round is the same.
        absent: The clients that were drawn and are absent, once the round is planned.
        dropped: For each client that drops out the numbers of batches that it makes and
            that were planned.
    """

    def __init__(
        self,
        number: int,
        sizes: Sequence[int],
        batch_size: int,
        local_epochs: int = 1,
        seed: int = 0,
        availability: Availability | None = None,
        least: LeastBatch | None = None,
        seconds: Seconds | None = None,
        drawn_as: int | None = None,
    ) -> None:
        self.number = number
        self.sizes = sizes
        self.batch_size = batch_size
        self.local_epochs = local_epochs
        self.seed = seed
        self.availability = availability or Availability()
        self.least = least or LeastBatch()
        self.seconds = seconds or EqualSeconds()
        self.drawn_as = number if drawn_as is None else drawn_as
        self.repeats = drawn_as is not None
        self.absent: list[int] = []
        self.dropped: dict[int, tuple[int, int]] = {}

    def is_due(self, every: int | None) -> bool:
        """Returns whether the round is one of every so many; `None`: none is."""
        return every is not None and (self.number + 1) % every == 0

    def clients(
        self, clients_per_round: int | None = None, shuffle: bool = False
    ) -> list[int]:
        """Returns the clients that take part, in ascending order or in a random one.

        Args:
            clients_per_round: How many are drawn; `None`: all.
            shuffle: Whether their order is random.

        Raises:
            ValueError: If there are fewer clients.
        """
        total = len(self.sizes)
        count = clients_per_round or total
        if count > total:
            raise ValueError(
                f"Expected argument `clients_per_round` to be at most `num_clients` "
                f"({total}), but got {count}."
            )
        stream = generator(self.seed, "turns", self.drawn_as)
        drawn = torch.randperm(total, generator=stream)[:count]
        listed: list[int] = (drawn if shuffle else drawn.sort()[0]).tolist()
        present = self.availability.present(listed, self.seed, self.drawn_as)
        self.absent = sorted(set(listed) - set(present))
        return present

    def turns(
        self,
        clients: Iterable[int],
        local_steps: int | None = None,
        shuffle: bool = False,
        groups: Mapping[int, int] | None = None,
    ) -> Iterator[tuple[int, list[Planned]]]:
        """Yields turns: a client, and the batches that it makes before the next one.

        Args:
            clients: The clients, in the order of their first turns.
            local_steps: Number of batches in a turn. A client with samples left gets
                another turn. `None`: each client has one turn.
            shuffle: Whether the turns of the round are in a random order.
            groups: The group of each client: one group trains after the other. `None`:
                they are one.
        """
        drawn = generator(self.seed, "steps", self.drawn_as)
        steps: list[list[Draw]] = []
        for sizes in self._grouped(clients, groups):
            batches = {k: self._batches(size) for k, size in sizes.items()}
            length = local_steps or max(map(len, batches.values()), default=1)
            turns = [[k] * -(-len(own) // length) for k, own in batches.items()]
            order = [k for rank in zip_longest(*turns) for k in rank if k is not None]
            if shuffle and local_steps is not None:
                numbers = torch.randperm(len(order), generator=drawn).tolist()
                order = [order[number] for number in numbers]
            for client in order:
                own = batches[client]
                turn, batches[client] = own[:length], own[length:]
                steps += [[Draw(client, count)] for count in turn]
        planned = (batch for step in self._planned(steps) for batch in step)
        for client, made in groupby(planned, key=lambda batch: batch.client_id):
            yield client, list(made)

    def together(
        self, clients: Iterable[int], draw: Draws = "equal"
    ) -> Iterator[tuple[Planned, ...]]:
        """Yields the batches of each step of clients that train together.

        Args:
            clients: The clients.
            draw: `equal`: each has a batch of its own in a step, as long as it has
                samples. `proportional`: the batch is drawn from all samples of all
                clients (GPSL, https://arxiv.org/abs/2407.15738).
        """
        (sizes,) = self._grouped(clients, None)
        steps: list[list[Draw]] = []
        if draw == "equal":
            batches = [self._batches(size) for size in sizes.values()]
            for counts in zip_longest(*batches, fillvalue=0):
                pairs = zip(sizes, counts, strict=True)
                steps.append([Draw(k, n) for k, n in pairs if n])
        else:
            drawn = generator(self.seed, "steps", self.drawn_as)
            for _ in range(self.local_epochs):
                steps += _drawn_from_all(sizes, self.batch_size, drawn)
        yield from self._planned(steps)

    def _grouped(
        self, clients: Iterable[int], groups: Mapping[int, int] | None
    ) -> list[dict[int, int]]:
        """Returns the sizes of the clients of each group."""
        found: dict[int, dict[int, int]] = {}
        for client in clients:
            group = 0 if groups is None else groups[client]
            found.setdefault(group, {})[client] = self.sizes[client]
        return list(found.values())

    def _batches(self, size: int) -> list[int]:
        """Returns the numbers of samples in a client's batches of the round."""
        return sizes_of(size, self.batch_size) * self.local_epochs

    def _planned(self, steps: list[list[Draw]]) -> Iterator[tuple[Planned, ...]]:
        """Yields the batches of steps that take place."""
        if not self.least.is_trivial:
            clients = {k for step in steps for k, _ in step}
            steps = enlarged(steps, {k: self.sizes[k] for k in clients}, self.least)
        steps = self._without_dropped(steps)
        left = Counter(k for step in steps for k, _ in step)
        following = [{k for k, _ in step} for step in steps[1:]] + [set()]
        made: dict[int, tuple[int, int, int]] = {}  # batches, passes, samples of a pass
        for step, others in zip(steps, following, strict=True):
            ends_turn = {k for k, _ in step} != others
            batches = []
            for client, count in step:
                number, passes, start = made.get(client, (0, 0, 0))
                if start == self.sizes[client]:
                    passes, start = passes + 1, 0
                count = min(count, self.sizes[client] - start)
                left[client] -= 1
                last = left[client] == 0
                batches.append(
                    Planned(client, number, passes, start, count, ends_turn, last)
                )
                made[client] = number + 1, passes, start + count
            yield tuple(batches)

    def _without_dropped(self, steps: list[list[Draw]]) -> list[list[Draw]]:
        """Returns steps without the batches after which a client dropped out."""
        planned = Counter(k for step in steps for k, _ in step)
        made = self.availability.batches_made(planned, self.seed, self.drawn_as)
        self.dropped = {k: (made[k], planned[k]) for k in sorted(made)}
        if not made:
            return steps
        begun: Counter[int] = Counter()
        kept = []
        for step in steps:
            begun.update(k for k, _ in step)
            kept.append([d for d in step if begun[d[0]] <= made.get(d[0], inf)])
        return [step for step in kept if step]


def _drawn_from_all(
    sizes: Mapping[int, int], batch_size: int, drawn: torch.Generator
) -> Iterator[list[Draw]]:
    """Yields how many of each client's samples a batch drawn from all of them has."""
    clients = torch.tensor(list(sizes))
    numbers = torch.arange(len(sizes))
    samples = numbers.repeat_interleave(torch.tensor(list(sizes.values())))
    samples = samples[torch.randperm(len(samples), generator=drawn)]
    for batch in torch.split(samples, batch_size):
        counts = torch.bincount(batch, minlength=len(sizes))
        there = counts.nonzero().flatten()
        pairs = zip(clients[there].tolist(), counts[there].tolist(), strict=True)
        yield [Draw(client, count) for client, count in pairs]
