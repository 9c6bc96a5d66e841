"""Joins: combine the smashed data of several holders at the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from split_lightning.models.parts import Parts
from split_lightning.models.tracer import Leaf

JoinName: TypeAlias = Literal["concat", "sum", "mean", "attention"]
# What the join takes where a holder lacks a sample.
Missing: TypeAlias = Literal["zeros", "skip"]


class Concatenation(Leaf):
    """Puts holders' values side by side, where their parts were.

    Maps of image parts make one map again; vectors are one behind the other. Where a
    holder lacks a sample there are zeros.

    Args:
        parts: How samples are divided.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    def forward(
        self, values: Sequence[Tensor], present: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Returns `(B, F_1 + F_2 + ...)`, or maps side by side."""
        return self.parts.put_back(values)


class Sum(Leaf):
    """Adds holders' values; a missing sample counts as zeros."""

    def forward(
        self, values: Sequence[Tensor], present: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Returns a tensor of the shape of each."""
        _require_alike(values)
        return _added(values)


class Mean(Leaf):
    """Averages holders' values.

    Args:
        missing: Of a holder that lacks a sample `zeros` (so that it counts), or none
            (`skip`: the mean over those that have it).
    """

    def __init__(self, missing: Missing | None = None) -> None:
        super().__init__()
        self.missing = missing

    def forward(
        self, values: Sequence[Tensor], present: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Returns a tensor of the shape of each."""
        _require_alike(values)
        total = _added(values)
        if present is None or self.missing != "skip":
            return total / len(values)
        counts = torch.stack(list(present)).sum(dim=0).clamp(min=1)
        return total / _over(counts.to(total), total)


class Attention(Leaf):
    """A mean with weights that depend on what each holder sends.

    A linear layer scores each holder's values (of maps, their means over positions);
    the softmax of the scores over holders are the weights, of each sample its own.

    Args:
        num_features: Number of features (channels) of each holder's values.
        missing: A holder that lacks a sample is scored by `zeros`, or has no weight
            (`skip`).
    """

    def __init__(self, num_features: int, missing: Missing | None = None) -> None:
        super().__init__()
        self.score = nn.Linear(num_features, 1)
        self.missing = missing

    def forward(
        self, values: Sequence[Tensor], present: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Returns a tensor of the shape of each."""
        _require_alike(values)
        pooled = [v.flatten(2).mean(dim=2) if v.ndim > 2 else v for v in values]
        scores = torch.cat([self.score(own) for own in pooled], dim=1)  # (B, holders)
        if present is not None and self.missing == "skip":
            lacks = ~torch.stack(list(present), dim=1)
            scores = scores.masked_fill(lacks, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=1)
        pairs = zip(values, weights.unbind(dim=1), strict=True)
        return _added([_over(weight, value) * value for value, weight in pairs])


def join_of(
    name: JoinName, parts: Parts, num_features: int, missing: Missing | None = None
) -> nn.Module:
    """Returns a join by its name.

    Args:
        name: Which.
        parts: How samples are divided.
        num_features: Number of features (channels) of each holder's values.
        missing: What it takes where a holder lacks a sample.

    Raises:
        ValueError: If there is no such join, or no such rule for it.
    """
    if name not in get_args(JoinName):
        raise ValueError(
            f"Expected argument `join` to be one of {get_args(JoinName)}, but got "
            f"{name!r}."
        )
    if missing == "skip" and name in ("concat", "sum"):
        raise ValueError(
            f"Expected argument `missing` to be 'zeros' where the join is {name!r}, "
            "in which each holder has its place, but got 'skip', which is for 'mean' "
            "and 'attention'."
        )
    if name == "concat":
        return Concatenation(parts)
    if name == "sum":
        return Sum()
    return Mean(missing) if name == "mean" else Attention(num_features, missing)


def _added(values: Sequence[Tensor]) -> Tensor:
    first, *others = values
    for other in others:
        first = first + other
    return first


def _over(of_samples: Tensor, values: Tensor) -> Tensor:
    """Returns a number for each sample in the shape in which it meets values."""
    return of_samples.reshape(-1, *[1] * (values.ndim - 1))


def _require_alike(values: Sequence[Tensor]) -> None:
    shapes = [tuple(value.shape[1:]) for value in values]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"Expected holders' values to be of one shape, to be added up, but got "
            f"{', '.join(map(str, shapes))}. Join them by concatenation "
            "(`join='concat'`), or give each holder a part of the same size."
        )
