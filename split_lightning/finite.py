"""Finite numbers: what is said of a NaN or an infinity in training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


class NonFiniteError(RuntimeError):
    """A number in training is not finite; no weights were changed."""


class NotFinite(Exception):
    """A result of a step is not finite; the message names it."""


def are_finite(values: Iterable[Any]) -> bool:
    """Returns whether tensors contain no NaN and no infinity.

    >>> are_finite([torch.zeros(2), torch.tensor([1, 2]), None])
    True
    >>> are_finite([torch.zeros(2), torch.tensor(float("nan"))])
    False
    """
    found = [v.detach() for v in values if isinstance(v, Tensor) and v.numel()]
    real = [v for v in found if v.is_floating_point()]
    # The Euclidean norm is far faster on CPUs; of huge numbers it overflows.
    return any(
        bool(torch.isfinite(get_total_norm(real, norm))) for norm in (2.0, float("inf"))
    )
