"""Clients that cut after different layers, against plain loops over whole networks."""

from functools import partial

import pytest
import torch
from protocols import (
    ROUNDS,
    assert_equal,
    batches_of,
    fit,
    loss_of,
    make_data,
    make_split,
    network,
    step,
)
from test_protocols import SKEWED

from split_lightning import RoundRobinWeightPassing
from split_lightning.data import RoundRobinSchedule
from split_lightning.models import merge

PLAIN = partial(torch.optim.SGD, lr=0.05)

# The cuts of `network()` (Conv, BatchNorm, ReLU, MaxPool, Flatten, Linear, BatchNorm,
# Linear), who has the labels; of each of three clients the layers that it holds.
CUTS = {
    "one each": ([[0, 5, 2]], "server", [[0], [0, 1, 2, 3, 4, 5], [0, 1, 2]]),
    "groups": ([[2, 0]], "server", [[0, 1, 2], [0, 1, 2], [0]]),
    "U": ([[0, 2, 0], 5], "client", [[0, 6, 7], [0, 1, 2, 6, 7], [0, 6, 7]]),
    "hops": ([[2, 0, 2], 5], "server", [[0, 1, 2], [0], [0, 1, 2]]),
}


@pytest.fixture(params=CUTS)
def cuts(request):
    return CUTS[request.param]


def made(cuts, **options):
    return make_split(cuts[0], labels=cuts[1], **options)


def whole_of(module, client=0):
    """The state of a client's whole network."""
    module.parties.show(client)
    state = merge(*module.segments().values())
    state = {name: tensor.clone() for name, tensor in state.items()}
    module.parties.show_live()
    return state


def layer_of(name):
    return int(name.split(".")[0])


def holder_of(cuts, client, layer, server=0):
    """Who holds a layer when a client has its turn."""
    return ("client", client) if layer in cuts[2][client] else ("server", server)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("local_steps", [None, 1])
def test_a_round_robin_is_the_unsplit_network_bit_for_bit(
    tmp_path, cuts, momentum, local_steps
):
    """Momentum goes with the layers."""
    schedule = RoundRobinSchedule(local_steps=local_steps)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=momentum)
    policy = "travel" if momentum else "keep"
    module = made(cuts, optimizer=optimizer, optimizer_state=policy)
    data = make_data(**SKEWED, schedule=schedule)
    fit(tmp_path, module, data, [RoundRobinWeightPassing()])
    net = network()
    own = optimizer(net.parameters())
    for round_index in range(ROUNDS):
        for ((_, inputs, targets),) in batches_of(data, round_index):
            step([own], loss_of(net, inputs, targets))
    assert_equal(whole_of(module), net.state_dict())
    state = {k: v.clone() for k, v in whole_of(module).items()}
    assert_equal(state, merge(*module.segments().values()))
