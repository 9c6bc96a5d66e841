"""Layers that a trace alone would not be true to, each with one habit of real code.

They take and return maps `(B, 8, 8, 8)`, and have the layer `conv` inside.
"""

import itertools
import random
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CALLS = 0
SEEN = []


class Habit(nn.Module):
    """A convolution, to which each adds its habit."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, kernel_size=3, padding=1)

    def forward(self, x):
        return self.conv(x)


class PythonRandom(Habit):
    def forward(self, x):
        return self.conv(x) if random.random() < 0.5 else x


class NumpyRandom(Habit):
    def forward(self, x):
        return self.conv(x) * float(np.random.rand())


class OwnGenerator(Habit):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x):
        return self.conv(x) * float(self.generator.random())


class OwnRandom(OwnGenerator):
    def __init__(self):
        super().__init__()
        self.generator = random.Random(0)


class TorchGenerator(Habit):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.conv(x) * torch.rand(8, 1, 1, generator=self.generator)


class Steps(Habit):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        return self.conv(x) / self.steps


class Remembers(Habit):
    def __init__(self):
        super().__init__()
        self.seen, self.last = [0], {"mean": deque([0.0], maxlen=1)}

    def forward(self, x):
        self.seen.append(len(self.seen))
        self.last["mean"].append(0.5)
        return self.conv(x) * self.seen[-1] + self.last["mean"][0]


class Iterates(Habit):
    def __init__(self):
        super().__init__()
        self.count = itertools.count(1)

    def forward(self, x):
        return self.conv(x) / next(self.count)


class ClassAttribute(Habit):
    calls = 0

    def forward(self, x):
        ClassAttribute.calls += 1
        return self.conv(x) if self.calls % 2 else x


class GlobalVariable(Habit):
    def forward(self, x):
        global CALLS
        CALLS += 1
        SEEN.append(CALLS)
        return self.conv(x) * (1 + CALLS % 2)


def counted(x):
    global CALLS
    CALLS += 1
    return x * (1 + CALLS % 2)


GENERATOR = random.Random(0)


def drawn(x, *, generator=GENERATOR):
    drawn.calls = getattr(drawn, "calls", 0) + 1
    return x * generator.random() / drawn.calls


class CallsFunction(Habit):
    """Calls a function that changes a global variable."""

    def forward(self, x):
        return counted(self.conv(x))


class CallsFunctionWithState(Habit):
    """Calls a function that changes its attribute and its default."""

    def forward(self, x):
        return drawn(self.conv(x))


class Seeds(Habit):
    """Draws the same random numbers in each pass."""

    def forward(self, x):
        torch.manual_seed(7)
        return F.dropout(self.conv(x), 0.5, self.training)


class SeedsInPassing(Habit):
    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return F.dropout(self.conv(x), 0.5, self.training)


class SeedsNumpy(Habit):
    def forward(self, x):
        np.random.seed(7)
        return self.conv(x)


class Freezes(Habit):
    """Sets a layer to eval mode in its forward."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        self.bn.eval()
        return self.bn(self.conv(x))


class KeepsActivations(Habit):
    """Keeps a layer's output, as those do that look at features afterwards."""

    def __init__(self):
        super().__init__()
        self.features = None

    def forward(self, x):
        self.features = self.conv(x)
        return 2 * self.features


class Keeps(Habit):
    """Keeps a tensor of the last pass."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        x = self.conv(x)
        before, self.last = self.last, x.detach().mean()
        return x if before is None else x - before


class PlainTensor(Habit):
    """Counts in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.count = torch.zeros(())

    def forward(self, x):
        self.count += 1
        return self.conv(x) / self.count.item()


class AssignsBuffer(Habit):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        x = self.conv(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.mean[:, None, None]


class AssignsData(AssignsBuffer):
    def forward(self, x):
        x = self.conv(x)
        self.mean.data = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.mean[:, None, None]


class AssignsItems(AssignsBuffer):
    def forward(self, x):
        x = self.conv(x)
        self.mean[:] = x.detach().mean((0, 2, 3))
        return x - self.mean[:, None, None]


class CopiesIntoBuffer(AssignsBuffer):
    """A habit that a trace is true to."""

    def forward(self, x):
        x = self.conv(x)
        self.mean.copy_(0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3)))
        return x - self.mean[:, None, None]


class ByValue(Habit):
    def forward(self, x):
        x = self.conv(x)
        return x if x.sum() > 0 else -2 * x


class ByItem(Habit):
    def forward(self, x):
        x = self.conv(x)
        for _ in range(int(x.max().item() * 3) % 3):
            x = x * 1.5
        return x


class ByBatchSize(Habit):
    def forward(self, x):
        return self.conv(x) if x.shape[0] > 2 else -self.conv(x)


class ByLength(Habit):
    def forward(self, x):
        return self.conv(x) / len(x)


class ByRow(Habit):
    def forward(self, x):
        return torch.stack([self.conv(row[None])[0] for row in x])


class Doubled(torch.autograd.Function):
    """Whose gradient is not the one that autograd would find."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 + 0 * x


class OwnFunction(Habit):
    def forward(self, x):
        return Doubled.apply(self.conv(x))


class NoGradient(Habit):
    def forward(self, x):
        with torch.no_grad():
            scale = self.conv(x).sigmoid()
        return self.conv(x) * scale


class HalfPrecision(Habit):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.conv(x)
        return x.float()


class Checkpointed(Habit):
    """Computes its convolution again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Sequential(self.conv, nn.Dropout(0.3))

    def forward(self, x):
        return checkpoint(self.drop, x, use_reentrant=False)


class CheckpointedFunction(Checkpointed):
    def forward(self, x):
        return checkpoint(lambda x: self.drop(x), x, use_reentrant=False)


class AsksForTensor(Habit):
    """A habit that a trace is true to, as those below."""

    def forward(self, x):
        x = self.conv(x)
        return x * 2 if isinstance(x, torch.Tensor) else x


class MakesTensors(Habit):
    def forward(self, x):
        state = torch.zeros(x.shape[0], 8, 1, 1, device=x.device)
        ramp = torch.arange(x.size(3), device=x.device, dtype=x.dtype)
        return self.conv(x) + state + ramp


class DrawsTensors(Habit):
    def forward(self, x):
        x = self.conv(x) + torch.randn(8, 8)
        if self.training:
            keep = torch.rand(x.shape[0], 1, 1, 1) < 0.5
            x = x * keep + torch.rand_like(x)
        return F.dropout(x, 0.2, self.training)


class Asserts(Habit):
    def forward(self, x):
        assert x.ndim == 4 and x.shape[1] == 8, "wrong number of channels"  # noqa: PT018
        return self.conv(x)


class MakesLayer(Habit):
    def forward(self, x):
        return nn.Softmax(dim=1)(self.conv(x))


# Which habit makes a layer one operation, and what the reason names.
WHOLE = {
    PythonRandom: "Python's random numbers",
    NumpyRandom: "NumPy's random numbers",
    OwnGenerator: "the attribute `generator`",
    OwnRandom: "the attribute `generator`",
    TorchGenerator: "torch.Generator",
    Steps: "the attribute `steps`",
    Remembers: "the attribute `seen`",
    Iterates: "the attribute `count`",
    ClassAttribute: "the class attribute `ClassAttribute.calls`",
    GlobalVariable: "the global variable `CALLS`",
    CallsFunction: "the global variable `CALLS` that counted uses",
    CallsFunctionWithState: "the attribute `calls` of the function `drawn`",
    Seeds: "torch's random numbers",
    SeedsInPassing: "torch's random numbers",
    SeedsNumpy: "NumPy's random numbers",
    Freezes: "the attribute `training`",
    KeepsActivations: "the attribute `features`",
    Keeps: "the attribute `last`",
    PlainTensor: "the attribute `count`",
    AssignsBuffer: "the buffer `mean`",
    AssignsData: "assigns the attribute `data`",
    AssignsItems: "item assignment",
    ByValue: "control flow depends on values",
    ByItem: "TypeError",
    ByBatchSize: "control flow depends on values",
    ByLength: "'len'",
    ByRow: "control flow depends on values",
    OwnFunction: "autograd.Function",
    NoGradient: "switches gradients",
    HalfPrecision: "autocast",
    CheckpointedFunction: "checkpoint",
}
TRACED = [
    CopiesIntoBuffer,
    Checkpointed,
    AsksForTensor,
    MakesTensors,
    DrawsTensors,
    Asserts,
    MakesLayer,
]
