"""Layers that a trace alone would not be true to: one operation, or refused by name."""

import copy
import pickle
import random
import re

import habits
import numpy as np
import own_networks as own
import pytest
import torch
from by_hand import train_split, train_unsplit
from torch import nn

from split_lightning.models.split import cut_layers, merge, split


class Network(own.Small):
    """Has a habit between its convolutions, in a `Sequential`, twice or as it is."""

    def __init__(self, habit, place):
        super().__init__()
        self.habit = nn.Sequential(nn.Identity(), habit) if place == "inner" else habit
        self.passes = 2 if place == "twice" else 1

    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        for _ in range(self.passes):
            x = self.habit(x)
        return self.head(self.conv2(x))


def seed():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    habits.CALLS, habits.ClassAttribute.calls = 0, 0
    habits.drawn.calls = 0
    habits.GENERATOR.seed(0)


def batches():
    generator = torch.Generator().manual_seed(3)
    sizes = (4, 3, 2, 5)
    return [
        (
            torch.randn(n, 3, 8, 8, generator=generator),
            torch.randint(10, (n,), generator=generator),
        )
        for n in sizes
    ]


def plain(layer):
    """Returns a layer's own attributes that are no tensors, as text."""
    return {k: repr(v) for k, v in vars(layer).items() if not k.startswith("_")}


@pytest.mark.parametrize("place", ["once", "twice", "inner"])
@pytest.mark.parametrize(
    "make", [*habits.WHOLE, *habits.TRACED], ids=lambda m: m.__name__
)
def test_layer_trains_as_if_unsplit(make, place):
    seed()
    network = Network(make(), place)
    reference = copy.deepcopy(network)
    seed()
    train_unsplit(reference, batches())
    calls = habits.CALLS, habits.ClassAttribute.calls
    path = "habit.1" if place == "inner" else "habit"
    for cut in ("bn", path, "conv2"):
        client, server = pickle.loads(pickle.dumps(split(network, cut)))
        seed()
        train_split(client, server, batches())
        assert (habits.CALLS, habits.ClassAttribute.calls) == calls
        merged = merge(client, server)
        assert merged.keys() == reference.state_dict().keys()
        for key, value in reference.state_dict().items():
            assert torch.equal(merged[key], value), (cut, key)
        if make in habits.WHOLE:
            holder = server if cut == "bn" else client
            own, expected = (n.get_submodule(path) for n in (holder, reference))
            if make not in (
                habits.TorchGenerator,
                habits.OwnGenerator,
                habits.OwnRandom,
            ):
                assert plain(own) == plain(expected)


@pytest.mark.parametrize("make", habits.WHOLE, ids=lambda m: m.__name__)
def test_cut_inside_names_the_layer_and_why_it_is_whole(make):
    network = Network(make(), "inner")
    assert "habit.1.conv" not in cut_layers(network)
    assert {"bn", "habit.1", "habit"} <= set(cut_layers(network))
    what = re.escape(habits.WHOLE[make])
    match = (
        f"`habit.1` \\({make.__name__}\\), which is one operation: .*{what}.*Nearest"
    )
    with pytest.raises(ValueError, match=match) as error:
        split(network, "habit.1.conv")
    assert "\n" not in str(error.value)
    assert "`habit.1`" in str(error.value).partition("Nearest")[2]
    habits.CALLS = 0


@pytest.mark.parametrize("make", habits.TRACED, ids=lambda m: m.__name__)
def test_layer_that_can_be_traced_can_be_cut(make):
    inside = "habit.drop" if make is habits.Checkpointed else "habit.conv"
    assert inside in cut_layers(Network(make(), "once"))


@pytest.mark.parametrize("make", habits.WHOLE, ids=lambda m: m.__name__)
def test_network_whose_own_forward_has_a_habit_is_refused(make):
    class Root(make):
        def __init__(self):
            super().__init__()
            self.conv2 = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv2(super().forward(self.conv2(x))).mean((2, 3))

    with pytest.raises(
        ValueError, match=f"that of Root.*{re.escape(habits.WHOLE[make])}"
    ):
        split(Root(), "conv")
