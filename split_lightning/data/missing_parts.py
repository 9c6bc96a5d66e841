"""`MissingParts`: which holders lack which samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from split_lightning.models.parts import Parts
from split_lightning.seeding import generator


class Lacking(NamedTuple):
    """Which samples of a data set each holder lacks.

    Attributes:
        parts: How samples are divided among holders.
        mask: Whether it lacks them, of shape `(N, holders)`.
    """

    parts: Parts
    mask: Tensor

    def blank(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """Puts NaN, the mark of a missing value, where holders lack samples.

        Args:
            inputs: Normalised samples, float32; changed in place.
            chosen: Their positions in the data set.
        """
        for part, lacks in zip(self.parts(inputs), self.mask[chosen].T, strict=True):
            part[lacks] = torch.nan  # a view of the inputs
        return inputs


class MissingParts:
    """Draws which samples holders lack, each with a probability.

    Which samples a holder lacks is a function of (seed, sample), the same in each
    round, in validation and in tests. A sample that all would lack stays with the
    holder with the luckiest draw.

    Args:
        parts: How samples are divided among holders; `None`: they are whole.
        probability: That a holder lacks a sample, in [0, 1): one for all or a list of
            one for each; `None`: no holder lacks any.
        seed: Seeds the draws.

    Raises:
        ValueError: If a probability is out of range, or there is not one for each.
    """

    def __init__(
        self,
        parts: Parts | None = None,
        probability: float | Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        given = [] if probability is None else probability
        listed = list(given) if isinstance(given, Sequence) else [given]
        if not all(0 <= share < 1 for share in listed):
            raise ValueError(
                f"Expected argument `probability` to be in [0, 1), but got "
                f"{probability}."
            )
        number = 0 if parts is None else len(parts)
        if len(listed) == 1:
            listed *= number
        if listed and len(listed) != number:
            raise ValueError(
                "Expected argument `probability` to be one for all, or one for each "
                f"of {number} holders, but got {probability}."
            )
        self.parts = parts
        self.probability = listed
        self.seed = seed

    def __repr__(self) -> str:
        return f"MissingParts({self.parts!r}, {self.probability}, seed={self.seed})"

    @property
    def is_trivial(self) -> bool:
        """Whether every holder has every sample."""
        return not any(self.probability)

    def lacking(self, num_samples: int, train: bool) -> Lacking | None:
        """Returns which holders lack which samples of a set; `None`: none does.

        Args:
            num_samples: Number of samples in the set.
            train: Which set.
        """
        if self.is_trivial or self.parts is None:
            return None
        drawn = torch.rand(
            num_samples,
            len(self.parts),
            generator=generator(self.seed, "missing parts", int(train)),
        )
        excess = drawn - torch.tensor(self.probability)  # lacks where it is negative
        mask = excess < 0
        nobody = mask.all(dim=1).nonzero()[:, 0]
        mask[nobody, excess[nobody].argmax(dim=1)] = False
        return Lacking(self.parts, mask)
