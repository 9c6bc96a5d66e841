"""`CycleSL`: the server trains on what clients sent before they get gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from split_lightning.engines.local import LocalEngine
from split_lightning.finite import NotFinite, are_finite
from split_lightning.message import Values
from split_lightning.party import Key, Losses, Party, joined
from split_lightning.protocols.actions import (
    Average,
    Buffers,
    Contribute,
    OptimizerState,
    Policy,
    Train,
)
from split_lightning.protocols.least_batch import shared_out
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
    def serve(self, party: Party, engine: LocalEngine) -> Any:
        return ServerFirst(party, engine, self.server_passes, self.server_batch_size)


class ServerFirst:
    """A server's party that trains on what arrived before it computes the loss.

    It takes the same calls as the party.

    Args:
        party: The server.
        engine: Steps its optimizer.
        passes: Number of passes over what arrived.
        batch_size: Number of samples in a batch; `None`: all at once.
    """

    def __init__(
        self, party: Party, engine: LocalEngine, passes: int, batch_size: int | None
    ) -> None:
        self.party = party
        self.name, self.role = party.name, party.role
        self.parameters = party.parameters
        self.engine = engine
        self.passes = passes
        self.batch_size = batch_size
        self._arrived: tuple[Sequence[Values], Sequence[int]] = ((), ())

    def forward(
        self, key: Key, several: Sequence[Values], sizes: Sequence[int]
    ) -> list[Values]:
        """Keeps what arrived until the labels are there."""
        self._arrived = several, sizes
        return [() for _ in sizes]

    def loss(
        self,
        key: Key,
        targets: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        shares: Sequence[Tensor] | None = None,
        scale: float = 1.0,
    ) -> Losses:
        """Trains the server, then runs stage 1 with its new weights.

        Raises:
            NotFinite: If a batch of the server's passes is not finite.
        """
        several, sizes = self._arrived
        inputs, labels = joined(several), torch.cat(list(targets))
        for chosen in self._batches(len(labels)):
            own = tuple(value.detach()[chosen] for value in inputs)
            self.party.forward(key, [own], [len(chosen)])
            found = self.party.loss(key, [labels[chosen]])
            gradients = [p.grad for p in self.party.parameters()]
            for name, values in (
                ("the server's loss", [found.total]),
                ("the server's gradient", gradients),
            ):
                if not are_finite(values):
                    raise NotFinite(name)
            self.engine.step_one(self.party)
        self.party.forward(key, several, sizes)
        losses = self.party.loss(key, targets, weights, shares, scale)
        for parameter in self.party.parameters():
            parameter.grad = None
        return losses

    def _batches(self, num_samples: int) -> list[Tensor]:
        """Returns the samples of each batch of the server's passes."""
        size = self.batch_size or num_samples
        passes = [torch.randperm(num_samples) for _ in range(self.passes)]
        full, rest = divmod(num_samples, size)
        counts = [size] * full + [rest] * (rest > 0)
        least = self.engine.least_samples
        if len(counts) > 1 and counts[-1] < least:
            *others, first, second = counts
            counts = others + [n for n in shared_out(first, second, least) if n]
        return [batch for order in passes for batch in torch.split(order, counts)]
