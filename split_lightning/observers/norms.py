"""`Norms`: how large smashed data and their gradients are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from split_lightning.message import Message

_NAMES = {"smashed": "cut/smashed_norm", "gradient": "cut/gradient_norm"}


class Norms:
    """Measures the Euclidean norms of smashed data and gradients at each cut in a step.

    Attributes:
        looks: Whether messages are measured; else they cost nothing.
    """

    def __init__(self) -> None:
        self.looks = False
        self._norms: dict[str, Tensor] = {}

    def __call__(self, event: Message) -> None:
        """Measures a message."""
        if self.looks and event.kind in _NAMES:
            name, norm = _NAMES[event.kind], joint_norm(event.payload)
            name += f"_{event.cut + 1}" if event.cut else ""
            before = self._norms.get(name, torch.zeros_like(norm))  # other parties'
            self._norms[name] = torch.hypot(before, norm)

    def take(self) -> dict[str, Tensor]:
        """Returns the norms since the last call, by name."""
        norms, self._norms = self._norms, {}
        return norms


def joint_norm(values: Iterable[Any]) -> Tensor:
    """Returns the Euclidean norm of all floating-point tensors among values, as one.

    >>> joint_norm([torch.tensor([3.0]), None, torch.tensor([[4.0]]), 7])
    tensor(5.)
    """
    norms = [
        torch.linalg.vector_norm(value.detach(), dtype=torch.float32)
        for value in values
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)
