"""`ServerFirst`: a server's party that trains before clients get their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from split_lightning.engines.engine import Engine
from split_lightning.finite import NotFinite, are_finite
from split_lightning.message import Values
from split_lightning.party import Key, Losses, Party, joined


class ServerFirst:
    """A server's party that trains on what arrived before it computes the loss.

    It takes the same calls as the party.

    Args:
        party: The server.
        engine: Steps its optimizer.
        passes: Number of passes over what arrived.
        sizes: Returns the sizes of a pass's batches, from the number of samples.
    """

    def __init__(
        self,
        party: Party,
        engine: Engine,
        passes: int,
        sizes: Callable[[int], list[int]],
    ) -> None:
        self.party = party
        self.name, self.role = party.name, party.role
        self.parameters = party.parameters
        self.engine = engine
        self.passes = passes
        self.sizes = sizes
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
        passes = [torch.randperm(num_samples) for _ in range(self.passes)]
        sizes = self.sizes(num_samples)
        return [batch for order in passes for batch in torch.split(order, sizes)]
