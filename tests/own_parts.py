"""Networks and sources as a user may write them, most of them wrong."""

import torch
from torch import nn

from split_lightning.data import DigitsImages, Images

number = 3


class Right(nn.Sequential):
    def __init__(self, size=10, in_channels=1, num_classes=10, image_size=8):
        first = nn.Linear(64, size)
        super().__init__(nn.Flatten(), first, nn.ReLU(), nn.Linear(size, num_classes))


class ReturnsTuple(Right):
    def forward(self, images):
        return super().forward(images), images


class ReturnsDict(Right):
    def forward(self, images):
        return {"logits": super().forward(images)}


class Raises(Right):
    def forward(self, images):
        raise ZeroDivisionError


class NeedsMore(Right):
    def forward(self, images, lengths):
        return super().forward(images) + lengths


class WrongShape(nn.Sequential):
    def __init__(self, in_channels=1, num_classes=10, image_size=8):
        super().__init__(nn.Flatten(), nn.Linear(63, 10), nn.Linear(10, 10))


class Branches(Right):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


class Source(DigitsImages):
    def __init__(self, size=1437):
        super().__init__()
        self.size = size

    def load(self, train):
        return Images(*(tensor[: self.size] for tensor in super().load(train)))


class SourceWithoutClasses:
    def load(self, train):
        return DigitsImages().load(train)


class SourceOfLists(DigitsImages):
    def load(self, train):
        return [0], [1]


class SourceThatRaises(DigitsImages):
    def load(self, train):
        raise RuntimeError("the disk is on fire")


class SourceOfOtherLengths(DigitsImages):
    def load(self, train):
        return Images(torch.zeros(3, 1, 8, 8), torch.zeros(1437, dtype=torch.int64))
