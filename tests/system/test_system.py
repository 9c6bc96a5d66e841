"""Devices, links, and the work of a sample, against closed formulas."""

import math

import pytest
import torch
from torch import nn

from split_lightning import split
from split_lightning.system import System, work_of

FIXED = {"client_flops": 1e9, "server_flops": 1e12, "uplink": 1e6, "downlink": 4e6}


def test_a_transfer_takes_latency_and_bits_over_bandwidth():
    device = System(**FIXED, latency=0.25).client(7)
    assert device.sends(1000) == 0.25 + 8 * 1000 / 1e6
    assert device.receives(1000) == 0.25 + 8 * 1000 / 4e6
    system = System(**FIXED, server_link=1e3, server_latency=2)
    assert system.hops(500) == 2 + 8 * 500 / 1e3


def test_ranges_are_drawn_once_for_each_client_in_equal_factors():
    options = FIXED | {"client_flops": [1e8, 1e10], "uplink": [1e6, 1e8]}
    one, other = System(**options, seed=3), System(**options, seed=3)
    clients = [one.client(k) for k in range(500)]
    assert clients == [other.client(k) for k in reversed(range(500))][::-1]
    for name, low, high in (("flops", 8, 10), ("uplink", 6, 8)):
        drawn = torch.tensor([math.log10(getattr(c, name)) for c in clients])
        assert drawn.min() >= low
        assert drawn.max() <= high
        # The mean of 500 uniform draws of width 2: within 4 standard errors.
        assert abs(drawn.mean() - (low + high) / 2) < 4 * 2 / math.sqrt(12 * 500)
    assert len({c.flops for c in clients}) == 500
    assert System(**options, seed=4).client(0) != clients[0]
    assert {c.downlink for c in clients} == {4e6}


BAD = {
    "client_flops": [0, -1.0, [2, 1], [1, 2, 3], "fast", float("nan"), []],
    "server_flops": [0, [1, 2]],
    "uplink": [0],
    "downlink": [None],
    "latency": [-0.1, [0.2, 0.1]],
    "server_link": [0],
    "server_latency": [-1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in BAD for value in BAD[name]]
)
def test_bad_values_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` to be a number.*but got"):
        System(**(FIXED | {name: value}))


def test_the_work_of_a_sample():
    """Multiplications and additions; images need no gradient, what crosses does."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, padding=1),
        nn.Flatten(),
        nn.Linear(72, 5),
    )
    client, server = split(network, 1)
    first = 2 * 36 * 4 * 1 * 9
    second, last = 2 * 36 * 2 * 4 * 9, 2 * 72 * 5
    before = {k: v.clone() for k, v in client.state_dict().items()}
    found = work_of({"client": client, "server": server}, torch.rand(1, 1, 6, 6))
    assert found == [(first, first), (second + last, 2 * (second + last))]
    assert all(parameter.grad is None for parameter in client.parameters())
    assert all(torch.equal(before[k], v) for k, v in client.state_dict().items())
