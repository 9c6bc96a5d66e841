"""`SplitFedV1`, `SplitFedV2`, `SplitFedV3`: segments are averaged after each round."""

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


class SplitFedV1(Protocol):
    """Each client trains with a copy of the server; both segments are averaged.

    SplitFed v1 (Thapa et al. 2020, https://arxiv.org/abs/2004.12088). The copies are at
    one server, so averaging them sends nothing. They do not meet within a round. The
    mean is weighted by the samples that each client trained on.

    Args:
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        local_steps: Number of a client's batches before another computes; `None`: all
            of its round. Clients do not depend on each other within a round, so this
            changes the order of computations alone: at other sites they compute at the
            same time.
        every: Average after every so many rounds.
        optimizer_state: What happens to clients' optimizer state where weights are
            averaged: each keeps its own (`keep`), it is averaged (`travel`), or it is
            dropped (`reset`).
        server_optimizer_state: The same for the copies of the server.
        buffers: Whether buffers (BatchNorm's statistics) are averaged (`average`), or
            each party keeps its own (`keep`).

    Raises:
        ValueError: If an argument is out of range.
    """

    num_servers = None

    def __init__(
        self,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
        every: int = 1,
        optimizer_state: OptimizerState = "keep",
        server_optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
    ) -> None:
        super().__init__(clients_per_round)
        check_count("local_steps", local_steps, "batches, or null for no limit")
        check_count("every", every, "rounds")
        check_policies(optimizer_state, buffers, server_optimizer_state)
        self.local_steps = local_steps
        self.every = every
        self.optimizer_state: OptimizerState = optimizer_state
        self.policy = Policy(optimizer_state, server_optimizer_state, buffers)

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        roles, is_due = ("client", "server"), round.is_due(self.every)
        clients = round.clients(self.clients_per_round)
        for client, batches in round.turns(clients, self.local_steps):
            for batch in batches:
                yield Train((batch,))
            if is_due and batches[-1].ends_round:
                yield Contribute(client, roles, self.policy)
        if is_due:
            yield Average(roles, self.policy)


class SplitFedV2(Protocol):
    """Clients train with one server in a random order, and are averaged.

    SplitFed v2 (Thapa et al. 2020, https://arxiv.org/abs/2004.12088). The server is
    trained by one client after the other. The mean is weighted by the samples that each
    client trained on.

    Args:
        shuffle: Whether the order of the turns is random in each round.
        clients_per_round: See `SplitFedV1`, as for the others.
        local_steps: Number of batches in a turn. A client with samples left gets
            another turn in the round. `None`: one turn for all its batches.
        every: Average after every so many rounds.
        optimizer_state: What happens to clients' optimizer state.
        buffers: Whether buffers are averaged.

    Raises:
        ValueError: If an argument is out of range.
    """

    sequential = True

    def __init__(
        self,
        shuffle: bool = True,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
        every: int = 1,
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
    ) -> None:
        super().__init__(clients_per_round)
        check_count("local_steps", local_steps, "batches, or null for no limit")
        check_count("every", every, "rounds")
        check_policies(optimizer_state, buffers)
        self.shuffle = shuffle
        self.local_steps = local_steps
        self.every = every
        self.optimizer_state: OptimizerState = optimizer_state
        self.policy = Policy(optimizer_state, buffers=buffers)

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        clients = round.clients(self.clients_per_round, self.shuffle)
        is_due = round.is_due(self.every)
        for client, batches in round.turns(clients, self.local_steps, self.shuffle):
            for batch in batches:
                yield Train((batch,))
            if is_due and batches[-1].ends_round:
                yield Contribute(client, ("client",), self.policy)
        if is_due:
            yield Average(("client",), self.policy)


class SplitFedV3(Protocol):
    """Each client trains with a copy of the server; only the copies are averaged.

    SplitFed v3 (Gawali et al. 2020, https://arxiv.org/abs/2012.12591): clients keep
    their own segments.

    Args:
        clients_per_round: See `SplitFedV1`, as for the others.
        local_steps: See `SplitFedV1`.
        every: Average after every so many rounds.
        server_optimizer_state: What happens to the optimizer state of the copies.
        buffers: Whether their buffers are averaged.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_servers = None
    moves_weights = False

    def __init__(
        self,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
        every: int = 1,
        server_optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
    ) -> None:
        super().__init__(clients_per_round)
        check_count("local_steps", local_steps, "batches, or null for no limit")
        check_count("every", every, "rounds")
        check_policies("keep", buffers, server_optimizer_state)
        self.local_steps = local_steps
        self.every = every
        self.policy = Policy("keep", server_optimizer_state, buffers)

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        roles, is_due = ("server",), round.is_due(self.every)
        clients = round.clients(self.clients_per_round)
        for client, batches in round.turns(clients, self.local_steps):
            for batch in batches:
                yield Train((batch,))
            if is_due and batches[-1].ends_round:
                yield Contribute(client, roles, self.policy)
        if is_due:
            yield Average(roles, self.policy, pooled=False)
