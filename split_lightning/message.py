"""`Message`: what one party sends another. Nothing else passes between parties."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

Kind: TypeAlias = Literal["smashed", "gradient", "labels", "weights", "statistics"]
Direction: TypeAlias = Literal["forward", "backward"]
# A payload: tensors, sizes as plain numbers, `None` for no gradient.
Values: TypeAlias = tuple[Any, ...]

AGGREGATOR = "aggregator/0"  # the party that averages or mixes weights
_BYTES_PER_NUMBER = 8  # a size travels as an int64


class Message(NamedTuple):
    """What one party sends another.

    Attributes:
        kind: The type of the payload.
        sender: The name of a party, such as `client/3`.
        receiver: The name of another.
        payload: The values, as they arrive.
        step: The number of the training step.
        cut: The number of the cut, from 0.
    """

    kind: Kind
    sender: str
    receiver: str
    payload: Values
    step: int = 0
    cut: int = 0

    @property
    def num_bytes(self) -> int:
        """The bytes of the payload."""
        return num_bytes(self.payload)


class Computed(NamedTuple):
    """A party has run a segment on some samples.

    Attributes:
        party: The name of the party.
        segment: The number of the segment, from 0.
        direction: Forward or backward.
        num_samples: Number of samples.
    """

    party: str
    segment: int
    direction: Direction
    num_samples: int


@lru_cache(maxsize=100_000)
def role_of(party: str) -> str:
    """Returns the role in a party's name: `client`, `server` or `aggregator`.

    >>> role_of("client/3")
    'client'
    """
    return party.partition("/")[0]


def num_bytes(values: Iterable[Any]) -> int:
    """Returns the bytes of a payload; `None` takes none.

    >>> import torch
    >>> num_bytes([torch.zeros(2, 3), torch.tensor([1, 2]), None, 7])
    48
    """
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif value is not None:
            total += _BYTES_PER_NUMBER
    return total


def as_values(outputs: Any) -> Values:
    """Returns what a segment returned as a tuple, of one element for a tensor."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
