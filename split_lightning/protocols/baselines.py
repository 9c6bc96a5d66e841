"""`Centralized`, `FedAvg`, `Local`: one party has the whole network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from split_lightning.protocols.actions import (
    Average,
    Buffers,
    Contribute,
    OptimizerState,
    Policy,
    Train,
)
from split_lightning.protocols.protocol import Protocol, check_count, check_policies
from split_lightning.protocols.round import Round


class Centralized(Protocol):
    """One party trains the whole network on the samples of all clients."""

    unsplit_at = "server"
    pools_samples = True
    moves_weights = False

    def __init__(self) -> None:
        super().__init__()

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        for _, batches in round.turns(round.clients()):
            for batch in batches:
                yield Train((batch,))


class FedAvg(Protocol):
    """Each client trains the whole network on its own samples; they are averaged.

    Federated averaging (McMahan et al. 2017, https://arxiv.org/abs/1602.05629). The
    mean is weighted by the samples that each client trained on.

    Args:
        every: Average after every so many rounds.
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        local_steps: Number of a client's batches before another computes; `None`: all
            of its round. Clients do not depend on each other within a round, so this
            changes the order of computations alone: at other sites they compute at the
            same time.
        optimizer_state: What happens to clients' optimizer state where weights are
            averaged: each keeps its own (`keep`), it is averaged (`travel`), or it is
            dropped (`reset`).
        buffers: Whether buffers (BatchNorm's statistics) are averaged (`average`), or
            each client keeps its own (`keep`).

    Raises:
        ValueError: If an argument is out of range.
    """

    unsplit_at = "client"

    def __init__(
        self,
        every: int = 1,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
    ) -> None:
        super().__init__(clients_per_round)
        check_count("every", every, "rounds")
        check_count("local_steps", local_steps, "batches, or null for no limit")
        check_policies(optimizer_state, buffers)
        self.every = every
        self.local_steps = local_steps
        self.optimizer_state: OptimizerState = optimizer_state
        self.policy = Policy(optimizer_state, buffers=buffers)

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        is_due = round.is_due(self.every)
        clients = round.clients(self.clients_per_round)
        for client, batches in round.turns(clients, self.local_steps):
            for batch in batches:
                yield Train((batch,))
            if is_due and batches[-1].ends_round:
                yield Contribute(client, ("client",), self.policy)
        if is_due:
            yield Average(("client",), self.policy)


class Local(Protocol):
    """Each client trains the whole network on its own samples, alone.

    Args:
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        local_steps: See `FedAvg`.

    Raises:
        ValueError: If an argument is not positive.
    """

    unsplit_at = "client"
    moves_weights = False

    def __init__(
        self, clients_per_round: int | None = None, local_steps: int | None = None
    ) -> None:
        super().__init__(clients_per_round)
        check_count("local_steps", local_steps, "batches, or null for no limit")
        self.local_steps = local_steps

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        clients = round.clients(self.clients_per_round)
        for _, batches in round.turns(clients, self.local_steps):
            for batch in batches:
                yield Train((batch,))
