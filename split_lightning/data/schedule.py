"""Schedule: which clients take part in a round, in which order, and in which steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import pairwise, zip_longest
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from split_lightning.data.seeding import generator
from split_lightning.data.service import Service


class Draw(NamedTuple):
    """So many of a client's next samples, for one step."""

    client_id: int
    num_samples: int


class Step(NamedTuple):
    """A step in its place among others.

    Attributes:
        draws: Who takes part in it, with how many samples.
        ends_turn: Whether it is the last of a turn.
        service: What happens around it.
    """

    draws: list[Draw]
    ends_turn: bool
    service: Service


Draws: TypeAlias = Literal["equal", "proportional"]


class Schedule(ABC):
    """Says who takes part in a round, in which order, one at a time or together.

    A schedule of one's own gives `turns`; without `steps` of its own, clients act one
    at a time, each in a single turn.

    Args:
        clients_per_round: Number of clients that take part in a round; `None`: all.

    Raises:
        ValueError: If `clients_per_round` is not positive.
    """

    def __init__(self, clients_per_round: int | None = None) -> None:
        if clients_per_round is not None and clients_per_round < 1:
            raise ValueError(
                "Expected argument `clients_per_round` to be a positive number of "
                f"clients, or null for all, but got {clients_per_round}."
            )
        self.clients_per_round = clients_per_round

    @abstractmethod
    def turns(self, num_clients: int, round_index: int, seed: int) -> list[int]:
        """Returns the clients of a round in order, a function of seed and round.

        Args:
            num_clients: Number of all clients.
            round_index: The round, from 0.
            seed: The run's seed.

        Raises:
            ValueError: If fewer than `clients_per_round` clients exist.
        """

    def steps(
        self,
        sizes: Mapping[int, int],
        batch_size: int,
        local_epochs: int,
        drawn: torch.Generator,
    ) -> Iterator[list[Draw]]:
        """Yields the steps of a round: who takes part in each, with how many samples.

        In a round each client passes `local_epochs` times over its samples. The last
        batch of a pass may be smaller.

        Args:
            sizes: Number of samples of each client, in the order of `turns`. They share
                a server.
            batch_size: Number of samples in a batch.
            local_epochs: Number of passes.
            drawn: Whatever is drawn at random comes from here.
        """
        for client_id, size in sizes.items():
            for count in batches_of(size, batch_size, local_epochs):
                yield [Draw(client_id, count)]

    def placed(self, steps: list[list[Draw]]) -> list[Step]:
        """Returns the steps of a round in the order in which they take place.

        As they are, as a rule: a turn ends where other clients act in the next step.

        Args:
            steps: Those that are made, in the order of `steps`.
        """
        clients = [{client_id for client_id, _ in step} for step in steps]
        ends = [one != other for one, other in pairwise([*clients, set[int]()])]
        return [
            Step(step, end, Service()) for step, end in zip(steps, ends, strict=True)
        ]

    acts_together = False  # whether several clients may take part in a step
    hands_in = False  # whether clients' turns run at the same time, and are handed in
    in_flight = 1  # how many batches of a client may be on their way

    def most_together(self, num_clients: int) -> int:
        """Returns the largest number of clients that take part in one step."""
        return 1

    def regroup(self, parts: list[Tensor]) -> list[Tensor]:
        """Returns who holds which samples in training: the clients, as a rule."""
        return parts

    def num_parties(self, num_clients: int) -> int:
        """Returns the number of those who hold samples in training."""
        return num_clients

    def load_of(self, size: int, batch_size: int) -> int:
        """Returns what of a client decides on the number of steps of a round."""
        return -(-size // batch_size)

    def drawn_turns(
        self, num_clients: int, round_index: int, seed: int, shuffle: bool
    ) -> list[int]:
        """Returns clients that are drawn for a round, in ascending order or shuffled.

        Raises:
            ValueError: If fewer than `clients_per_round` clients exist.
        """
        count = self.clients_per_round or num_clients
        if count > num_clients:
            raise ValueError(
                f"Expected argument `clients_per_round` to be at most `num_clients` "
                f"({num_clients}), but got {count}."
            )
        place = generator(seed, "turns", round_index)
        drawn = torch.randperm(num_clients, generator=place)[:count]
        return (drawn if shuffle else drawn.sort()[0]).tolist()


class RoundRobinSchedule(Schedule):
    """Clients take turns.

    Args:
        shuffle: Whether the order is drawn anew for each round; else it is 0, 1, 2, ...
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        local_steps: Number of batches after which the turn goes to the next client;
            who has samples left gets another turn, until all have passed
            `local_epochs` times over theirs. With `shuffle` all these turns of the
            round are in one random order, so that whose turn it is, is drawn in
            proportion to the turns that are left. `None`: one turn for all.

    Raises:
        ValueError: If `clients_per_round` or `local_steps` is not positive.

    >>> RoundRobinSchedule().turns(num_clients=3, round_index=0, seed=0)
    [0, 1, 2]
    """

    def __init__(
        self,
        shuffle: bool = False,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
    ) -> None:
        super().__init__(clients_per_round)
        if local_steps is not None and local_steps < 1:
            raise ValueError(
                "Expected argument `local_steps` to be a positive number of batches, "
                f"or null for no limit to a turn, but got {local_steps}."
            )
        self.shuffle = shuffle
        self.local_steps = local_steps

    def turns(self, num_clients: int, round_index: int, seed: int) -> list[int]:
        """Returns the clients of a round in the order of their (first) turns."""
        return self.drawn_turns(num_clients, round_index, seed, self.shuffle)

    def steps(
        self,
        sizes: Mapping[int, int],
        batch_size: int,
        local_epochs: int,
        drawn: torch.Generator,
    ) -> Iterator[list[Draw]]:
        """Yields one client a step: each client's turns, one after the other."""
        if self.local_steps is None:
            yield from super().steps(sizes, batch_size, local_epochs, drawn)
            return
        batches = {k: batches_of(n, batch_size, local_epochs) for k, n in sizes.items()}
        for client_id in self._order(batches, drawn):
            own = batches[client_id]
            turn, batches[client_id] = own[: self.local_steps], own[self.local_steps :]
            for count in turn:
                yield [Draw(client_id, count)]

    def _order(
        self, batches: Mapping[int, list[int]], drawn: torch.Generator
    ) -> list[int]:
        """Returns whose turn it is, turn by turn."""
        steps = self.local_steps or 1
        turns = [[k] * -(-len(own) // steps) for k, own in batches.items()]
        order = [k for rank in zip_longest(*turns) for k in rank if k is not None]
        if not self.shuffle:
            return order
        places = torch.randperm(len(order), generator=drawn).tolist()
        return [order[place] for place in places]


class ParallelSchedule(Schedule):
    """Clients take part in each step together.

    Args:
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        draw: `equal`: each client brings a batch of its own to a step, as long as it
            has samples (parallel split learning, Jeon and Kim 2020). `proportional`:
            the batch is one of all clients together, drawn at random without
            replacement from all their samples of the pass, so that each client's part
            is in proportion to what it has left (GPSL,
            https://arxiv.org/abs/2407.15738).

    Raises:
        ValueError: If `clients_per_round` is not positive, or `draw` is none of these.
    """

    acts_together = True

    def __init__(
        self, clients_per_round: int | None = None, draw: Draws = "equal"
    ) -> None:
        super().__init__(clients_per_round)
        if draw not in get_args(Draws):
            raise ValueError(
                f"Expected argument `draw` to be one of {get_args(Draws)}, but got "
                f"{draw!r}."
            )
        self.draw = draw

    def turns(self, num_clients: int, round_index: int, seed: int) -> list[int]:
        """Returns the clients of a round in ascending order."""
        return self.drawn_turns(num_clients, round_index, seed, shuffle=False)

    def steps(
        self,
        sizes: Mapping[int, int],
        batch_size: int,
        local_epochs: int,
        drawn: torch.Generator,
    ) -> Iterator[list[Draw]]:
        """Yields all clients that have samples left, with their numbers of them."""
        if self.draw == "proportional":
            for _ in range(local_epochs):
                yield from _drawn_from_all(sizes, batch_size, drawn)
            return
        batches = [batches_of(n, batch_size, local_epochs) for n in sizes.values()]
        for counts in zip_longest(*batches, fillvalue=0):
            yield [Draw(k, n) for k, n in zip(sizes, counts, strict=True) if n]

    def most_together(self, num_clients: int) -> int:
        """Returns the number of clients in a round."""
        return min(self.clients_per_round or num_clients, num_clients)

    def load_of(self, size: int, batch_size: int) -> int:
        """Returns the number of batches, or of samples where they are drawn."""
        if self.draw == "proportional":
            return size
        return super().load_of(size, batch_size)


class PooledSchedule(Schedule):
    """One party holds all clients' samples: what split learning is compared with.

    >>> PooledSchedule().turns(num_clients=1, round_index=0, seed=0)
    [0]
    """

    def __init__(self) -> None:
        super().__init__()

    def turns(self, num_clients: int, round_index: int, seed: int) -> list[int]:
        """Returns the one party."""
        return [0]

    def regroup(self, parts: list[Tensor]) -> list[Tensor]:
        """Returns all samples as those of one party."""
        return [torch.cat(parts)]

    def num_parties(self, num_clients: int) -> int:
        """Returns 1."""
        return 1


def batches_of(size: int, batch_size: int, num_passes: int) -> list[int]:
    """Returns the numbers of samples in the batches of passes over some samples.

    >>> batches_of(5, batch_size=2, num_passes=2)
    [2, 2, 1, 2, 2, 1]
    """
    rest = size % batch_size
    return ([batch_size] * (size // batch_size) + [rest] * (rest > 0)) * num_passes


def _drawn_from_all(
    sizes: Mapping[int, int], batch_size: int, drawn: torch.Generator
) -> Iterator[list[Draw]]:
    """Yields how many of each client's samples a batch drawn from all of them has."""
    clients = torch.tensor(list(sizes))
    places = torch.arange(len(sizes))
    owners = places.repeat_interleave(torch.tensor(list(sizes.values())))
    owners = owners[torch.randperm(len(owners), generator=drawn)]
    for batch in torch.split(owners, batch_size):
        counts = torch.bincount(batch, minlength=len(sizes))
        there = counts.nonzero().flatten()
        pairs = zip(clients[there].tolist(), counts[there].tolist(), strict=True)
        yield [Draw(client_id, count) for client_id, count in pairs]
