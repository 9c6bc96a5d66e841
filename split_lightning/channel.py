"""The channel: all that passes between a client and the server goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from torch import Tensor

# What one segment hands to the next: a tensor, or several values.
Activations: TypeAlias = Tensor | tuple[Any, ...]

Observer: TypeAlias = Callable[[str, tuple[Any, ...]], None]

# A size that crosses beside the tensors travels as an int64.
_BYTES_PER_NUMBER = 8


@dataclass
class Traffic:
    """Bytes that would have travelled in training since the start of the run.

    Attributes:
        uplink_bytes: Smashed data and targets, from clients to the server.
        downlink_bytes: Gradients of the smashed data, from the server to clients.
        handoff_bytes: Client segments (and optimizer states, where they travel too),
            from client to client.
        handoffs: Number of hand-offs.
        averaging_bytes: Client segments (and optimizer states, where they travel too,
            or gradients, where those are averaged), from clients to where they are
            averaged and back.
        server_averaging_bytes: Server segments, between servers, in the same way.
    """

    uplink_bytes: int = 0
    downlink_bytes: int = 0
    handoff_bytes: int = 0
    handoffs: int = 0
    averaging_bytes: int = 0
    server_averaging_bytes: int = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the counts."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes counts over."""
        for name, count in state.items():
            setattr(self, name, count)


class CutLayerChannel:
    """Carries smashed data up and gradients down across a cut, and counts the bytes.

    The client's half and the server's half of a step meet here alone. Counted is what
    the tensors take as they are: 4 bytes a value in fp32, 2 in bfloat16, 8 a target.

    Args:
        traffic: Where the bytes are counted.

    Attributes:
        is_counting: Whether what crosses is counted: not where a process computes with
            samples that are another's.
        observers: Called with the name of the crossing (`uplink`, `targets`,
            `downlink`) and all values that cross, each time something does. They may
            look, and change nothing.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.is_counting = True
        self.observers: list[Observer] = []

    def uplink(self, activations: Activations) -> Activations:
        """Sends activations up to the server.

        Args:
            activations: What the client segment returned.

        Returns:
            The same values as detached leaves of autograd: nothing else crosses.
        """
        self.traffic.uplink_bytes += self._count(values_of(activations))
        smashed = tuple(map(_leaf, values_of(activations)))
        self._show("uplink", smashed)
        return smashed if isinstance(activations, tuple) else smashed[0]

    def uplink_targets(self, targets: Tensor) -> Tensor:
        """Sends the labels of a batch up to the server, which has the loss."""
        self.traffic.uplink_bytes += self._count([targets])
        self._show("targets", (targets,))
        return targets

    def downlink(self, smashed: Activations) -> tuple[Tensor | None, ...]:
        """Sends the gradient at the cut down to the client.

        Args:
            smashed: What `uplink` returned, after the server's backward.

        Returns:
            The gradient of each value, `None` where there is none.
        """
        gradients = tuple(getattr(v, "grad", None) for v in values_of(smashed))
        self.traffic.downlink_bytes += self._count(
            g for g in gradients if g is not None
        )
        self._show("downlink", gradients)
        return gradients

    def _count(self, values: Iterable[Any]) -> int:
        return num_bytes(values) if self.is_counting else 0

    def _show(self, crossing: str, values: tuple[Any, ...]) -> None:
        for observer in self.observers:
            observer(crossing, values)


def num_bytes(values: Iterable[Any]) -> int:
    """Returns the bytes that tensors (and plain numbers) take when they travel.

    >>> import torch
    >>> num_bytes([torch.zeros(2, 3), torch.tensor([1, 2])])
    40
    """
    return sum(
        v.numel() * v.element_size() if isinstance(v, Tensor) else _BYTES_PER_NUMBER
        for v in values
    )


def values_of(activations: Activations) -> tuple[Any, ...]:
    """Returns what crosses a cut as a tuple, of one element for a tensor."""
    return activations if isinstance(activations, tuple) else (activations,)


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)
