"""`Adapter`: fits a client's smashed data to the server's inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Adapter(nn.Sequential):
    """Turns activations of one shape into those of another.

    Feature maps: a 1x1 convolution to the channels, where those differ, and adaptive
    average pooling to a smaller size, or bilinear interpolation to a larger one.
    Vectors: a linear layer; in front of it feature maps are flattened.

    Args:
        sent: The shape of a sample's activations: `(C, H, W)` or `(D,)`.
        taken: The shape that the server takes.

    Raises:
        ValueError: If it cannot fit the one to the other.

    >>> import torch
    >>> Adapter((16, 8, 8), (32, 4, 4))(torch.rand(5, 16, 8, 8)).shape
    torch.Size([5, 32, 4, 4])
    >>> Adapter((16, 8, 8), (10,))(torch.rand(5, 16, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(self, sent: Sequence[int], taken: Sequence[int]) -> None:
        super().__init__()
        if len(taken) == 1:
            size = 1
            for count in sent:
                size *= count
            self.flatten = nn.Flatten()
            self.linear = nn.Linear(size, taken[0])
        elif len(sent) == len(taken) == 3:
            if sent[0] != taken[0]:
                self.conv = nn.Conv2d(sent[0], taken[0], kernel_size=1)
            if sent[1:] != taken[1:]:
                self.resize = _resize(sent[1:], taken[1:])
        else:
            raise ValueError(
                "Expected an adapter between feature maps (C, H, W), or to vectors "
                f"(D,), but a client's network sends {tuple(sent)} and the server "
                f"takes {tuple(taken)}."
            )


def _resize(sent: Sequence[int], taken: Sequence[int]) -> nn.Module:
    if all(own >= other for own, other in zip(sent, taken, strict=True)):
        return nn.AdaptiveAvgPool2d(tuple(taken))
    return nn.Upsample(size=tuple(taken), mode="bilinear")
