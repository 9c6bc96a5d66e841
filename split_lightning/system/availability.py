"""`Availability`: which clients are absent from a round or drop out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from split_lightning.paths import absence
from split_lightning.seeding import generator
from split_lightning.system.absences import Absences

# One for all clients, or one for each.
Probability: TypeAlias = float | tuple[float, ...]


class Availability:
    """Which clients are absent from a round or drop out of it.

    A client that is drawn for a round and is absent is skipped, as if it had not been
    drawn; no other client replaces it. If all are absent, the one with the luckiest
    draw is there: a round has at least one client.

    A client that drops out does so after a drawn number of its batches of the round,
    uniform from none to all but one; the others of that round do not take place. Where
    several train in a step together, the others continue without it. At number 0 a
    client takes no step; if no client would make one, the client with the luckiest draw
    makes all of its batches: a round has at least one step.

    Batches that do not take place are never given out, so that nothing is counted that
    was not trained on. All that is drawn is a function of (seed, round, client).

    Args:
        absent: Probability that a client takes no part in a round.
        dropout: Probability that a client that takes part breaks off in mid-round.
            Both are in [0, 1), and one for all clients or a list of one for each.
        recorded: A file of absences to replay, that a run with clients at other sites
            wrote (`Absences`); `None`: there is none.

    Attributes:
        absences: The clients that are absent beside those that are drawn.

    Raises:
        ValueError: If a probability is out of range, or the file is no record.

    >>> Availability(absent=[0.0, 0.9]).present([0, 1], seed=0, round_index=0)
    [0]
    """

    def __init__(
        self,
        absent: float | Sequence[float] = 0.0,
        dropout: float | Sequence[float] = 0.0,
        recorded: str | Path | None = None,
    ) -> None:
        self.absent = _checked("absent", absent)
        self.dropout = _checked("dropout", dropout)
        if recorded is not None and not Path(recorded).is_file():
            raise ValueError(
                "Expected argument `recorded` to be a file of absences, such as "
                f"RUN/absences.json, but {absence(Path(recorded))}."
            )
        self.absences = Absences(recorded)

    def __repr__(self) -> str:
        return f"Availability(absent={self.absent}, dropout={self.dropout})"

    @property
    def is_trivial(self) -> bool:
        """Whether all clients are always there, to the end."""
        is_drawn = _any(self.absent) or _any(self.dropout)
        return self.absences.is_trivial and not is_drawn

    def check(self, num_clients: int) -> None:
        """Stops where a list is not of one probability for each client.

        Raises:
            ValueError: Names the argument, and the number of clients.
        """
        for name, value in (("absent", self.absent), ("dropout", self.dropout)):
            if isinstance(value, tuple) and len(value) != num_clients:
                raise ValueError(
                    f"Expected argument `{name}` to be one probability, or a list of "
                    f"one for each client (`num_clients` is {num_clients}), but got "
                    f"{len(value)} of them."
                )

    def present(self, clients: Sequence[int], seed: int, round_index: int) -> list[int]:
        """Returns those of the clients of a round that are there, in the same order.

        Args:
            clients: The clients that are drawn for the round.
            seed: The run's seed.
            round_index: The round, from 0.
        """
        away = self.absences.of(round_index)
        clients = [k for k in clients if k not in away] or clients
        if not _any(self.absent):
            return list(clients)
        luck = {k: _draws(seed, "absent", round_index, k)[0] for k in clients}
        there = [k for k in clients if luck[k] >= _of(self.absent, k)]
        return there or [max(clients, key=luck.__getitem__)]

    def batches_made(
        self, planned: Mapping[int, int], seed: int, round_index: int
    ) -> dict[int, int]:
        """Returns how many batches those make that drop out of a round.

        Args:
            planned: For each client that is there its number of batches of the round.
            seed: The run's seed.
            round_index: The round, from 0.
        """
        if not _any(self.dropout):
            return {}
        draws = {k: _draws(seed, "dropout", round_index, k) for k in planned}
        made = {
            k: int(share * planned[k])
            for k, (luck, share) in draws.items()
            if luck < _of(self.dropout, k)
        }
        if made and made.keys() == planned.keys() and not any(made.values()):
            del made[max(made, key=lambda k: draws[k][0])]  # the luckiest makes all
        return made


def _checked(name: str, value: float | Sequence[float]) -> Probability:
    """Returns one probability, or a tuple of them.

    Raises:
        ValueError: If one is out of range.
    """
    listed: list[object] = [*value] if isinstance(value, Sequence) else [value]
    numbers = tuple(
        float(p)
        for p in listed
        if isinstance(p, (int, float)) and not isinstance(p, bool) and 0 <= p < 1
    )
    if len(numbers) < len(listed) or not numbers:
        raise ValueError(
            f"Expected argument `{name}` to be a probability in [0, 1), or a list of "
            f"one for each client, but got {value!r}."
        )
    return numbers if isinstance(value, Sequence) else numbers[0]


def _of(probability: Probability, client_id: int) -> float:
    """Returns a client's own probability."""
    return probability[client_id] if isinstance(probability, tuple) else probability


def _any(probability: Probability) -> bool:
    """Returns whether it may happen to any client."""
    return any(probability) if isinstance(probability, tuple) else probability > 0


def _draws(seed: int, purpose: str, round_index: int, client_id: int) -> list[float]:
    """Returns two numbers in [0, 1) of a client in a round."""
    drawn = generator(seed, purpose, round_index, client_id)
    numbers: list[float] = torch.rand(2, generator=drawn, dtype=torch.float64).tolist()
    return numbers
