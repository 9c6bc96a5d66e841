"""`MetaParty`: computes shapes instead of numbers, for plans that are not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from split_lightning.message import Values
from split_lightning.party import Key, Losses
from split_lightning.store import Seat

# What a segment sends for two samples: tensors without numbers.
Outputs = Callable[[nn.Module], Values]


class MetaParty:
    """A party that takes the same calls as `Party`, and computes no numbers.

    Args:
        outputs: Returns what a segment sends for two samples.
        name: Such as `client/3` or `server/0`.
        segments: The live segments that it has, by their depths in the network.
        unused: Further arguments of a party.
    """

    def __init__(
        self,
        outputs: Outputs,
        name: str,
        segments: Mapping[int, Seat],
        *unused: Any,
    ) -> None:
        self.outputs = outputs
        self.name = name
        self.segments = dict(segments)
        self._inputs: dict[Key, list[Values]] = {}

    def forward(
        self, key: Key, several: Sequence[Values], sizes: Sequence[int]
    ) -> list[Values]:
        """Returns tensors of the shapes that a segment sends."""
        self._inputs[key] = list(several)
        outputs = self.outputs(self.segments[key[1]].module)
        return [tuple(_of_size(own, size) for own in outputs) for size in sizes]

    def loss(
        self,
        key: Key,
        targets: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        shares: Sequence[Tensor] | None = None,
        scale: float = 1.0,
    ) -> Losses:
        """Returns gradients of the shapes of what came."""
        zero = torch.zeros(())
        return Losses(zero, [zero] * len(targets), self._returned(key))

    def backward(
        self,
        key: Key,
        gradients: Sequence[Values],
        shares: Sequence[Tensor] | None = None,
    ) -> list[Values]:
        """Returns gradients of the shapes of what came."""
        return self._returned(key)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of its live segments."""
        return [p for seat in self.segments.values() for p in seat.module.parameters()]

    def _returned(self, key: Key) -> list[Values]:
        return [
            tuple(v if getattr(v, "requires_grad", False) else None for v in own)
            for own in self._inputs.pop(key)
        ]


def _of_size(value: Any, size: int) -> Any:
    """Returns a tensor of so many samples, without numbers."""
    if not isinstance(value, Tensor):
        return value
    found = torch.empty((size, *value.shape[1:]), dtype=value.dtype, device="meta")
    return found.requires_grad_(value.requires_grad)
