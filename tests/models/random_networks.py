"""Networks at random: what a split must be true to, in any combination."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

WIDTH = 4  # channels of every value inside


class Step(NamedTuple):
    """An operation, and which of the values so far it takes, counted from the last."""

    kind: str
    first: int
    second: int


def joined(first, second):
    """Concatenates two values: their gradients are slices of a larger one."""
    return torch.cat((first, second), dim=1)


class Half(nn.Module):
    """Returns a slice of a convolution's channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, 2 * WIDTH, 1)

    def forward(self, x):
        return self.conv(x).chunk(2, dim=1)[1]


class Spread(nn.Module):
    """Returns the mean of each channel at each place: memory that is used again."""

    def forward(self, x):
        return x.mean(dim=(2, 3), keepdim=True).expand_as(x)


LAYERS = {
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 1, groups=2),
    "bn": lambda: nn.BatchNorm2d(WIDTH),
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "hardswish_": lambda: nn.Hardswish(inplace=True),
    "dropout": lambda: nn.Dropout(0.3),
    "identity": nn.Identity,
    "pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
    "block": lambda: nn.Sequential(
        nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), nn.Conv2d(WIDTH, WIDTH, 1)
    ),
    "half": Half,
    "spread": Spread,
    "joining": lambda: nn.Conv2d(2 * WIDTH, WIDTH, 1),
}
# Two values joined, or one that is changed where it is; no layers of their own.
JOINS = {
    "add": lambda a, b: a + b,
    "add_": lambda a, b: a.add_(b),
    "gate": lambda a, b: a * b.mean(dim=(2, 3), keepdim=True).sigmoid(),
    "functional_": lambda a, b: F.leaky_relu(a, 0.1, inplace=True),
    "scale_": lambda a, b: a.mul_(0.5),
    "last": lambda a, b: F.layer_norm(a.movedim(1, 3), (WIDTH,)).movedim(3, 1),
    "swapped": lambda a, b: a.transpose(2, 3) + b,
    "view": lambda a, b: a.flatten(2).view(a.shape),
    "halves": lambda a, b: joined(a.chunk(2, dim=1)[0], b.chunk(2, dim=1)[1]),
    "sliced": lambda a, b: a[:, :],
    "half_": lambda a, b: joined(a[:, :2].relu_(), b.split(2, dim=1)[1]),
    "dropped": lambda a, b: F.dropout(a, 0.4, training=False),
}


class RandomNetwork(nn.Module):
    """Runs steps, each on any of the values before it; images `(B, 3, 8, 8)`."""

    def __init__(self, steps, num_results):
        super().__init__()
        self.steps = steps
        self.num_results = num_results
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            LAYERS[step.kind]() if step.kind in LAYERS else nn.Module()
            for step in steps
        )
        self.fc = nn.Linear(WIDTH, 10)

    def forward(self, x):
        values = [self.stem(x)]
        for step, layer in zip(self.steps, self.layers, strict=True):
            first = values[-1 - step.first % len(values)]
            second = values[-1 - step.second % len(values)]
            if step.kind == "joining":
                values.append(layer(joined(first, second)))
            elif step.kind in LAYERS:
                values.append(layer(first))
            else:
                values.append(JOINS[step.kind](first, second))
        result = sum(values[-self.num_results :])
        return self.fc(result.mean(dim=(2, 3)))

    def __repr__(self):
        return f"RandomNetwork({self.steps}, {self.num_results})"


STEPS = st.builds(
    Step,
    st.sampled_from([*LAYERS, *JOINS]),
    st.sampled_from([0, 0, 0, 1, 2, 5]),  # mostly the last value
    st.integers(0, 6),
)
NETWORKS = st.builds(
    RandomNetwork, st.lists(STEPS, min_size=1, max_size=9), st.integers(1, 3)
)
