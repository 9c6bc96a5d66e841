"""`MultiServer`: groups of clients, each with a server; groups are averaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from split_lightning.placement import group_of
from split_lightning.protocols.actions import (
    Average,
    Buffers,
    OptimizerState,
    PassWeights,
    Policy,
    Train,
)
from split_lightning.protocols.protocol import Protocol, check_count, check_policies
from split_lightning.protocols.round import Round


class MultiServer(Protocol):
    """A round robin in each group of clients, with a server for each; then the mean.

    Clients `k` with the same `k * num_servers // num_clients` are a group. Groups do
    not meet within a round: one trains after the other. The means are weighted by the
    samples that each group trained on.

    Args:
        num_servers: Number of groups, and of servers.
        every: Average the clients' segments of the groups after every so many rounds;
            `None`: never.
        servers_every: The same for the servers' segments.
        shuffle: Whether the order of the turns is random in each round.
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        local_steps: Number of batches in a turn. A client with samples left gets
            another turn in the round. `None`: one turn for all its batches.
        optimizer_state: What happens to clients' optimizer state when weights move or
            are averaged: each keeps its own (`keep`), it travels with the weights
            (`travel`), or it is dropped (`reset`).
        server_optimizer_state: The same for the servers.
        buffers: Whether buffers (BatchNorm's statistics) are averaged.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_servers: int = 2,
        every: int | None = 1,
        servers_every: int | None = 1,
        shuffle: bool = False,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
        optimizer_state: OptimizerState = "keep",
        server_optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
    ) -> None:
        super().__init__(clients_per_round)
        check_count("num_servers", num_servers, "servers")
        check_count("every", every, "rounds, or null for never")
        check_count("servers_every", servers_every, "rounds, or null for never")
        check_count("local_steps", local_steps, "batches, or null for no limit")
        check_policies(optimizer_state, buffers, server_optimizer_state)
        self.num_servers = num_servers
        self.every = every
        self.servers_every = servers_every
        self.shuffle = shuffle
        self.local_steps = local_steps
        self.optimizer_state: OptimizerState = optimizer_state
        self.policy = Policy(
            optimizer_state, server_optimizer_state, buffers, ("client", "server")
        )

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        clients = round.clients(self.clients_per_round, self.shuffle)
        groups = {k: group_of(k, len(round.sizes), self.num_servers) for k in clients}
        turns = round.turns(clients, self.local_steps, self.shuffle, groups)
        for client, batches in turns:
            yield PassWeights(client, self.optimizer_state)
            for batch in batches:
                yield Train((batch,))
        if round.is_due(self.every):
            yield Average(("client",), self.policy)
        if round.is_due(self.servers_every):
            yield Average(("server",), self.policy)
