"""Cuts that do not work are refused, and valid ones named."""

import re

import own_networks as own
import pytest
import torch
from by_hand import check_split_equals_unsplit, trained_own
from torch import nn

from split_lightning.models.networks import DigitsCNN
from split_lightning.models.split import cut_layers, split


def flat_first():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU()
    )


def normalised():
    """Returns a network whose first and last layers have buffers, no parameters."""
    return nn.Sequential(
        nn.BatchNorm2d(3, affine=False),
        nn.Conv2d(3, 8, kernel_size=3),
        nn.Conv2d(8, 10, kernel_size=6),
        nn.BatchNorm2d(10, affine=False),
        nn.Flatten(),
    )


REFUSED = [
    (own.Small, "conv3", "the path of a layer of Small, but got 'conv3'"),
    (own.Small, "conv1.weight", "the path of a layer of Small, but got 'conv1.w"),
    (own.Small, "", "the path of a layer of Small, but got ''"),
    (own.Small, 5, r"the index of a child \(0 to 4\) of Small, but got 5"),
    (own.Small, -1, r"the index of a child \(0 to 4\) of Small, but got -1"),
    (own.Small, True, r"the index of a child \(0 to 4\) of Small, but got True"),
    (own.Small, False, r"the index of a child \(0 to 4\) of Small, but got False"),
    (own.Small, "fc", "after `fc` leaves the server segment empty"),
    (own.Small, 4, "after `fc` leaves the server segment empty"),
    (own.NeverRun, "unused", "`unused` cuts nothing: that layer does not run"),
    (flat_first, 0, "after `0` leaves the client segment empty"),
    (flat_first, "3", "after `3` leaves the server segment empty"),
    (normalised, "0", "after `0` leaves the client segment empty"),
    (normalised, "2", "after `2` leaves the server segment empty"),
    (own.GlobalSkip, "conv1", "after `conv1` would send raw inputs"),
    (own.GlobalSkip, "conv2", "after `conv2` would send raw inputs"),
    (own.Tied, "conv2", "would put `conv2.weight` on both sides"),
    (own.TiedByHand, "bn", "would put `conv2.weight` on both sides"),
    (own.ScaledTwice, "conv2", "would put `scale` on both sides"),
    (own.Reordered, "conv2", "would put `.*` on both sides"),
    (own.Reordered, "conv3", "would put `.*` on both sides"),
]


@pytest.mark.parametrize(
    ("make", "cut_layer", "match"),
    REFUSED,
    ids=[f"{make.__name__}-{cut_layer!r}" for make, cut_layer, _ in REFUSED],
)
def test_invalid_cut_names_valid_ones(make, cut_layer, match):
    network = make()
    with pytest.raises(ValueError, match=match) as error:
        split(network, cut_layer)
    nearest = nearest_in(error)
    assert 1 <= len(nearest) <= 5
    for path in nearest:
        check_split_equals_unsplit(trained_own(make), path)


def nearest_in(error):
    _, named = str(error.value).split("Nearest valid cut layers: ")
    return re.findall("`([^`]+)`", named)


@pytest.mark.parametrize(
    ("cut_layer", "expected"),
    [("fc2", {"fc1", "relu3"}), ("con1", {"conv1"}), ("relu9", {"relu1", "relu2"})],
)
def test_nearest_is_near(cut_layer, expected):
    with pytest.raises(ValueError, match="Nearest valid") as error:
        split(DigitsCNN(), cut_layer)
    assert expected <= set(nearest_in(error))


def test_network_without_a_valid_cut():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert cut_layers(network) == []
    with pytest.raises(ValueError, match="Sequential has no valid cut layer"):
        split(network, 0)


@pytest.mark.parametrize(
    ("make", "cut_layer"),
    [(own.EncoderDecoder, "lstm"), (own.Chunks, "bn")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_tuple_that_would_cross_whole_is_refused(make, cut_layer):
    network, inputs = make(), torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match="tuple"):
        split(network, cut_layer)[0](inputs)
