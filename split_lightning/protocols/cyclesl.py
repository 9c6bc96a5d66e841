"""`CycleSL`: the server trains on what clients sent before they get gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from split_lightning.engines.engine import Engine
from split_lightning.engines.server_first import ServerFirst
from split_lightning.party import Party
from split_lightning.protocols.actions import (
    Average,
    Buffers,
    Contribute,
    OptimizerState,
    Policy,
    Train,
)
from split_lightning.protocols.least_batch import sizes_of
from split_lightning.protocols.protocol import Protocol, check_count, check_policies
from split_lightning.protocols.round import Round


class CycleSL(Protocol):
    """The server trains on the smashed data of all clients before they get gradients.

    CycleSL (https://arxiv.org/abs/2511.18611): in a step all clients send their smashed
    data; the server passes over it in batches that are drawn from all clients, and
    steps after each; then it computes, with its new weights, the gradients that the
    clients get. Departure from the paper: BatchNorm of the server segment sees the
    smashed data in training mode once more when these gradients are computed.

    Args:
        server_passes: Number of the server's passes over the smashed data of a step.
        server_batch_size: Number of samples in a batch of these; `None`: all at once.
        every: Average clients after every so many rounds; `None`: never.
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        optimizer_state: What happens to clients' optimizer state where weights are
            averaged: each keeps its own (`keep`), it is averaged (`travel`), or it is
            dropped (`reset`).
        buffers: Whether buffers (BatchNorm's statistics) are averaged with them.

    Raises:
        ValueError: If an argument is out of range.
    """

    together = True
    steps_each_batch = "the server trains first, in steps of its own"

    def __init__(
        self,
        server_passes: int = 1,
        server_batch_size: int | None = None,
        every: int | None = 1,
        clients_per_round: int | None = None,
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
    ) -> None:
        super().__init__(clients_per_round)
        check_count("server_passes", server_passes, "passes")
        check_count("server_batch_size", server_batch_size, "samples, or null for all")
        check_count("every", every, "rounds, or null for never")
        check_policies(optimizer_state, buffers)
        self.server_passes = server_passes
        self.server_work = server_passes + 1
        self.server_batch_size = server_batch_size
        self.every = every
        self.moves_weights = every is not None
        self.optimizer_state: OptimizerState = optimizer_state
        self.policy = Policy(optimizer_state, buffers=buffers)

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        is_due = round.is_due(self.every)
        for batches in round.together(round.clients(self.clients_per_round)):
            yield Train(batches)
            for batch in batches if is_due else ():
                if batch.ends_round:
                    yield Contribute(batch.client_id, ("client",), self.policy)
        if is_due:
            yield Average(("client",), self.policy)

    @override
    def serve(self, party: Party, engine: Engine) -> Any:
        def sizes(num_samples: int) -> list[int]:
            size = self.server_batch_size or num_samples
            return sizes_of(num_samples, size, engine.least_samples)

        return ServerFirst(party, engine, self.server_passes, sizes)
