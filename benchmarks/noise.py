"""Noise of CIFAR-10's shape, for benchmarks without downloads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from split_lightning.data import Images


class NoiseImages(CIFAR10):
    """Random images and labels: torchvision's data set and a source of ours at once.

    Args:
        num_samples: Number of images, the same for training and test.
        transform: The data set's transform, for torchvision's way in; `None`: only a
            source of ours, which holds the pixels once.
    """

    def __init__(
        self, num_samples: int, transform: Callable[..., Tensor] | None = None
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        shape = (num_samples, 3, 32, 32)
        self.images = Images(
            torch.randint(256, shape, dtype=torch.uint8, generator=draw),
            torch.randint(10, (num_samples,), generator=draw),
        )
        pixels = self.images.inputs.permute(0, 2, 3, 1)  # (N, H, W, C)
        self.data = (pixels.contiguous() if transform else pixels).numpy()
        self.targets = self.images.targets.tolist()
        self.classes = tuple("0123456789")
        self.transform, self.target_transform = transform, None

    def load(self, train: bool) -> Images:
        """Returns the images."""
        return self.images
