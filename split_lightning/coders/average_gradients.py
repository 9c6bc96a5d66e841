"""`AverageGradients`: some clients of a step get the mean of their gradients."""

from __future__ import annotations

import torch

from split_lightning.message import Values


class AverageGradients:
    """The first clients of a step get the mean of their gradients at the cut.

    SGLR (Pal et al. 2021, https://arxiv.org/abs/2112.05929; there the clients are
    drawn). The mean is taken position by position in their batches. Where their batches
    differ in size, the gradients stay as they are.

    Args:
        count: Number of clients.

    Raises:
        ValueError: If there are fewer than two.
    """

    def __init__(self, count: int) -> None:
        if count < 2:
            raise ValueError(
                f"Expected argument `count` to be at least 2 clients, but got {count}."
            )
        self.count = count

    def __call__(self, gradients: list[dict[str, Values]]) -> list[dict[str, Values]]:
        """Returns the gradients, for each client by party."""
        averaged = gradients[: self.count]
        several = [next(iter(own.values())) for own in averaged]
        means = tuple(map(_mean, zip(*several, strict=True)))
        changed = [dict.fromkeys(own, means) for own in averaged]
        return changed + gradients[self.count :] if None not in means else gradients


def _mean(alike: Values) -> torch.Tensor | None:
    if any(g is None for g in alike) or len({g.shape for g in alike}) > 1:
        return None
    return torch.stack(alike).mean(dim=0)
