"""A user's own networks and data, as command lines name them: `own_code.Source`."""

import torch
from conftest import RandomImages
from torch import nn

from split_lightning.data import Images


class Source(RandomImages):
    """Grey images of 12 x 12 of four classes, from three hospitals."""

    def __init__(self, shape=(1, 12, 12), num_classes=4):
        super().__init__(60, 20, num_classes, tuple(shape))

    def load(self, train):
        images = super().load(train)
        owners = [f"hospital {i % 3}" for i in range(len(images.targets))]
        return images._replace(columns={"hospital": owners})


class Net(nn.Sequential):
    """Takes the whole shape of the data."""

    def __init__(self, in_channels, image_size, num_classes):
        super().__init__(
            nn.Conv2d(in_channels, 2, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * image_size**2, num_classes),
        )


class SmallMaps(Net):
    """Normalises one value per channel."""

    def __init__(self, in_channels, image_size, num_classes):
        super().__init__(in_channels, image_size, num_classes)
        self.append(nn.BatchNorm1d(num_classes))


class Fixed(Net):
    """Takes nothing."""

    def __init__(self):
        super().__init__(1, 12, 4)


def made(**options):
    """A function that passes on what it is given."""
    return OneSize(**options)


def strict(**options):
    """A function with options that refuses one of them in the end."""
    if options:
        raise TypeError(f"unexpected {options}")
    return Fixed()


class Pooled(nn.Sequential):
    """Has a default for the size."""

    def __init__(self, in_channels, num_classes, image_size=1):
        super().__init__(
            nn.Conv2d(in_channels, 2, 3),
            nn.AdaptiveAvgPool2d(image_size),
            nn.Flatten(),
            nn.Linear(2, num_classes),
        )


class Samples(torch.utils.data.Dataset):
    """A data set of PyTorch, which is no source."""

    classes = ("a", "b")

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.ones(1, 12, 12), index % 2


class OneSize(Net):
    """Takes the number of classes alone."""

    def __init__(self, num_classes):
        super().__init__(1, 12, num_classes)


class Ids:
    """Sequences of 7 ids below 30; the class is whether the last is large."""

    classes = ("small", "large")

    def load(self, train):
        drawn = torch.Generator().manual_seed(int(train))
        ids = torch.randint(0, 30, (80 if train else 20, 7), generator=drawn)
        return ids, ids[:, -1] >= 15


class Text(nn.Module):
    """An embedding and a GRU."""

    def __init__(self, num_classes, vocabulary=30):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, ids):
        states, _ = self.gru(self.embedding(ids))
        return self.head(states[:, -1])


class Signals:
    """Signals of 3 channels and 16 steps."""

    classes = ("a", "b")

    def load(self, train):
        drawn = torch.Generator().manual_seed(int(train))
        signals = torch.randn(40, 3, 16, generator=drawn)
        return Images(signals, (signals[:, 0].mean(1) > 0).long())


class SignalNet(nn.Sequential):
    """A one-dimensional convolution."""

    def __init__(self, num_classes, in_channels):
        super().__init__(
            nn.Conv1d(in_channels, 4, 3),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(4, num_classes),
        )


class Table:
    """Rows of 5 columns."""

    classes = ("a", "b")

    def load(self, train):
        drawn = torch.Generator().manual_seed(int(train))
        rows = torch.rand(40, 5, generator=drawn)
        return Images(rows, (rows[:, 0] > 0.5).long())


class Volumes(Table):
    """Volumes of 4 x 4 x 4."""

    def load(self, train):
        drawn = torch.Generator().manual_seed(int(train))
        return torch.rand(40, 1, 4, 4, 4, generator=drawn), torch.arange(40) % 2


class VolumeNet(nn.Sequential):
    """A three-dimensional convolution."""

    def __init__(self, num_classes, in_channels, image_size):
        super().__init__(
            nn.Conv3d(in_channels, 2, 3, padding=1),
            nn.Flatten(),
            nn.Linear(2 * image_size**3, num_classes),
        )


class Broken(Source):
    """Fails while it loads."""

    def load(self, train):
        return {}["samples"]


class BrokenAtOnce(Source):
    """Fails when it is built."""

    def __init__(self, path="nowhere"):
        raise ValueError(f"no {path}")


class NetThatFails(Net):
    """Fails when it is built."""

    def __init__(self, num_classes):
        raise RuntimeError("no memory for it")


class NetOfLogits(Fixed):
    """Returns a dict as Hugging Face's networks do."""

    def forward(self, inputs):
        return {"loss": None, "logits": super().forward(inputs)}


class NetOfDicts(Fixed):
    """Returns a dict without logits."""

    def forward(self, inputs):
        return {"scores": super().forward(inputs)}
