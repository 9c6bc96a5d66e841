"""Schedule: which clients take part in a round, and in which order."""

from __future__ import annotations

import torch

from split_lightning.data.seeding import generator


class RoundRobinSchedule:
    """Clients take turns.

    Args:
        shuffle: Whether the order is drawn anew for each round; else it is 0, 1, 2, ...
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.

    Raises:
        ValueError: If `clients_per_round` is not positive.

    >>> RoundRobinSchedule().turns(num_clients=3, round_index=0, seed=0)
    [0, 1, 2]
    """

    def __init__(
        self, shuffle: bool = False, clients_per_round: int | None = None
    ) -> None:
        if clients_per_round is not None and clients_per_round < 1:
            raise ValueError(
                "Expected argument `clients_per_round` to be a positive number of "
                f"clients, or null for all, but got {clients_per_round}."
            )
        self.shuffle = shuffle
        self.clients_per_round = clients_per_round

    def turns(self, num_clients: int, round_index: int, seed: int) -> list[int]:
        """Returns the clients of a round in the order of their turns.

        Args:
            num_clients: Number of all clients.
            round_index: The round, from 0.
            seed: The run's seed; the order is a function of it and the round.

        Raises:
            ValueError: If fewer than `clients_per_round` clients exist.
        """
        count = self.clients_per_round or num_clients
        if count > num_clients:
            raise ValueError(
                f"Expected argument `clients_per_round` to be at most `num_clients` "
                f"({num_clients}), but got {count}."
            )
        drawn = torch.randperm(
            num_clients, generator=generator(seed, "turns", round_index)
        )[:count]
        return (drawn if self.shuffle else drawn.sort()[0]).tolist()
