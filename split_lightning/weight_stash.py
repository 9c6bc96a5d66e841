"""`WeightStash`: the weights of a client's batches that are on their way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


class WeightStash:
    """Keeps what weights a client had before each of its last few batches.

    A batch's forward and its gradient are of the same weights, and by then the client
    has newer ones (PipeDream, Harlap et al. 2018, https://arxiv.org/abs/1806.03377). Of
    n batches on their way n - 1 copies are kept, and none where there is one.

    Only parameters are kept: BatchNorm's statistics are always the current ones.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[Weights]] = {}  # of each client, the oldest first

    def begin(self, client_id: int) -> None:
        """Forgets the weights of a client's last turn."""
        self._kept.pop(client_id, None)

    def oldest(self, client_id: int) -> Weights | None:
        """Returns the weights that a client's next batch is computed with.

        `None`: the live ones, since no other batch is on its way.
        """
        kept = self._kept.get(client_id)
        return kept[0] if kept else None

    def push(self, client_id: int, segment: nn.Module, in_flight: int) -> None:
        """Keeps a client's live weights, before a batch changes them."""
        if in_flight == 1:
            return
        kept = self._kept.setdefault(client_id, [])
        del kept[: max(0, len(kept) + 2 - in_flight)]
        kept.append({k: p.detach().clone() for k, p in segment.named_parameters()})

    def state_dict(self) -> dict[int, list[Weights]]:
        """Returns all copies, in plain containers."""
        return {
            client_id: [{k: t.detach() for k, t in own.items()} for own in kept]
            for client_id, kept in self._kept.items()
        }

    def load_state_dict(self, state: dict[int, list[Weights]]) -> None:
        """Takes over what `state_dict` returned."""
        self._kept = {client_id: list(kept) for client_id, kept in state.items()}


class StaleWeights:
    """A segment's forward with other weights than its own, and their gradients.

    Args:
        segment: The live segment; its buffers are used and changed.
        weights: Parameters by name.
    """

    def __init__(self, segment: nn.Module, weights: Weights) -> None:
        self.segment = segment
        self.weights = {  # from a checkpoint they come on the CPU
            name: weights[name]
            .to(parameter.device)
            .requires_grad_(parameter.requires_grad)
            for name, parameter in segment.named_parameters()
        }

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Computes with these weights."""
        return torch.func.functional_call(self.segment, self.weights, inputs, options)

    def hand_gradients_on(self) -> None:
        """Gives the gradients of these weights to the live ones."""
        for name, parameter in self.segment.named_parameters():
            parameter.grad = self.weights[name].grad
            self.weights[name].grad = None
