"""Networks that torchvision lacks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models import resnet18


def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """Returns ResNet-18 with the stem that is usual for 32x32 images.

    A 3x3 convolution of stride 1 and no max pooling, as in He et al. 2015, section 4.2
    (https://arxiv.org/abs/1512.03385), in front of torchvision's own stages. What
    crosses a cut is 16 times larger than with torchvision's stem.

    Args:
        num_classes: Number of logits.
    """
    network: nn.Module = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class DigitsCNN(nn.Sequential):
    """A small convolutional network for small grey images.

    Args:
        in_channels: Number of the images' channels.
        num_classes: Number of logits.
        image_size: Height and width of the images (a multiple of 2).

    >>> import torch
    >>> DigitsCNN()(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: int = 8
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)  # (B, 32, image_size / 2, image_size / 2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(32 * (image_size // 2) ** 2, 64)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(64, num_classes)


class MLP(nn.Sequential):
    """A multilayer perceptron, for tables or small images: fc1, relu1, fc2, ...

    Args:
        in_channels: Number of columns of a table, or of the images' channels.
        num_classes: Number of logits.
        image_size: Height and width of the images; 1 for tables.
        hidden: Number of units of each hidden layer.

    >>> import torch
    >>> MLP(30, 2)(torch.rand(5, 30, 1, 1)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: int = 1,
        hidden: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        width = in_channels * image_size**2
        for number, units in enumerate(hidden, start=1):
            self.add_module(f"fc{number}", nn.Linear(width, units))
            self.add_module(f"relu{number}", nn.ReLU())
            width = units
        self.add_module(f"fc{len(hidden) + 1}", nn.Linear(width, num_classes))
