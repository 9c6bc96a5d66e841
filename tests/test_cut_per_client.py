"""Clients that cut after different layers, against plain loops over whole networks."""

from collections import Counter, defaultdict
from functools import partial

import pytest
import torch
from protocols import (
    ROUNDS,
    SGD,
    assert_close,
    assert_equal,
    batches_of,
    clone,
    fit,
    loss_of,
    make_data,
    make_split,
    mean_state,
    network,
    step,
)
from test_protocols import EACH, SKEWED, plain_fedavg

from split_lightning import RoundRobinWeightPassing
from split_lightning.callbacks import ClientAveraging, ServerAveraging
from split_lightning.data import RoundRobinSchedule
from split_lightning.models import merge
from split_lightning.server_map import ServerMap

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


class Momentum:
    """SGD with momentum by hand: one buffer for each layer and whoever holds it."""

    def __init__(self, policy):
        self.policy = policy
        self.buffers = defaultdict(dict)
        self.holders = {}

    def take(self, layer, holder):
        """Lets a layer be at a holder next."""
        if self.holders.get(layer, holder) != holder and self.policy == "reset":
            self.buffers[layer].clear()
        self.holders[layer] = holder

    def step(self, net, loss):
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                layer = layer_of(name)
                key = name, self.policy == "keep" and self.holders[layer]
                own = self.buffers[layer]
                before, gradient = own.get(key), parameter.grad
                if before is None:
                    own[key] = gradient.clone()
                else:
                    before.mul_(0.9).add_(gradient)
                parameter.add_(own[key], alpha=-0.05)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize("num_servers", [1, 2])
def test_a_round_robin_by_policy_equals_a_plain_loop(
    tmp_path, cuts, policy, num_servers
):
    """With two servers: one network for each group of clients, never averaged."""
    servers = ServerMap(num_servers)
    module = made(cuts, optimizer_state=policy, server_map=servers)
    data = make_data(**SKEWED, servers=servers)
    fit(tmp_path, module, data, [RoundRobinWeightPassing()])
    nets = [network() for _ in range(num_servers)]
    momenta = [Momentum(policy) for _ in range(num_servers)]
    for round_index in range(ROUNDS):
        for ((client, inputs, targets),) in batches_of(data, round_index):
            server = client * num_servers // 3
            net, momentum = nets[server], momenta[server]
            for layer in range(len(net)):
                momentum.take(layer, holder_of(cuts, client, layer))
            momentum.step(net, loss_of(net, inputs, targets))
    for client in range(3):
        expected = nets[client * num_servers // 3].state_dict()
        assert_close(whole_of(module, client), expected)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_splitfed_v1_is_federated_averaging(tmp_path, cuts, policy):
    """Whoever holds a layer: with its own momentum, or the mean of all."""
    options = {"optimizer_state": policy, "server_optimizer_state": policy}
    for flow in (
        [ClientAveraging(), ServerAveraging(remote=False)],
        [ServerAveraging(remote=False), ClientAveraging()],
    ):
        module = made(cuts, server_map=EACH, **options)
        fit(tmp_path, module, make_data(**SKEWED, servers=EACH), flow)
        expected = plain_fedavg(make_data(**SKEWED), policy=policy)[0]
        assert_close(whole_of(module), expected)
        assert module.parties.representatives() == []


class Copies:
    """Whole networks by hand, of which each holder of a layer has a copy of its own."""

    def __init__(self, cuts, server_of=lambda client: 0):
        self.cuts, self.server_of = cuts, server_of
        start = network().state_dict()
        self.layers = defaultdict(lambda: {k: v.clone() for k, v in start.items()})
        self.optimizers = {}
        self.samples = Counter()

    def holders(self, client):
        server = self.server_of(client)
        return [holder_of(self.cuts, client, layer, server) for layer in range(8)]

    def network_of(self, client):
        holders = self.holders(client)
        state = {
            name: self.layers[holders[layer_of(name)]][name]
            for name in network().state_dict()
        }
        net = network()
        net.load_state_dict(state)
        return net

    def train(self, client, inputs, targets):
        net, holders = self.network_of(client), self.holders(client)
        owned = defaultdict(list)
        for name, parameter in net.named_parameters():
            owned[holders[layer_of(name)], layer_of(name)].append(parameter)
        own = {}
        for key, parameters in owned.items():
            own[key] = SGD(parameters)
            if key in self.optimizers:
                own[key].load_state_dict(self.optimizers[key])
        step(list(own.values()), loss_of(net, inputs, targets))
        self.optimizers |= {k: clone(o.state_dict()) for k, o in own.items()}
        for name, tensor in net.state_dict().items():
            self.layers[holders[layer_of(name)]][name] = tensor.clone()
        for layer, holder in enumerate(holders):
            self.samples[layer, holder] += len(targets)

    def average(self, layers, party=None):
        """All holders of a layer go on from the mean over those who trained it."""
        for name in network().state_dict():
            layer = layer_of(name)
            trained = {h: n for (at, h), n in self.samples.items() if at == layer}
            if party is not None:
                trained = {h: n for h, n in trained.items() if h[0] == party}
            if layer not in layers or not trained:
                continue
            states = [{name: self.layers[holder][name]} for holder in trained]
            mean = mean_state(states, trained.values())
            everybody = [("client", k) for k in range(3)]
            everybody += [("server", s) for s in range(3)]
            for holder in everybody:
                if party in (None, holder[0]):
                    self.layers[holder] |= mean
        if party is None:
            layers_done = layers
            for key in [key for key in self.samples if key[0] in layers_done]:
                del self.samples[key]


def held_by_clients(cuts):
    return {layer for own in cuts[2] for layer in own}


@pytest.mark.parametrize("local_steps", [None, 1])
def test_splitfed_v2_equals_a_plain_loop(tmp_path, cuts, local_steps):
    """The server's copy of a layer that some clients hold is in the mean, too."""
    schedule = RoundRobinSchedule(local_steps=local_steps)
    module = made(cuts)
    data = make_data(**SKEWED, schedule=schedule)
    fit(tmp_path, module, data, [ClientAveraging()])
    copies = Copies(cuts)
    for round_index in range(ROUNDS):
        for ((client, inputs, targets),) in batches_of(data, round_index):
            copies.train(client, inputs, targets)
        copies.average(held_by_clients(cuts))
    for client in range(3):
        expected = copies.network_of(client).state_dict()
        assert_close(whole_of(module, client), expected)


def test_splitfed_v3_equals_a_plain_loop(tmp_path, cuts):
    """No layer of a client is ever averaged, with another client's or a server's."""
    module = made(cuts, server_map=EACH)
    data = make_data(**SKEWED, servers=EACH)
    flow = [ClientAveraging(every=None), ServerAveraging(remote=False)]
    fit(tmp_path, module, data, flow)
    copies = Copies(cuts, server_of=lambda client: client)
    for round_index in range(ROUNDS):
        copies.samples.clear()
        for ((client, inputs, targets),) in batches_of(data, round_index):
            copies.train(client, inputs, targets)
        copies.average(set(range(8)), party="server")
    for client in range(3):
        expected = copies.network_of(client).state_dict()
        assert_close(whole_of(module, client), expected)
    assert module.parties.representatives() == [0, 1, 2]


def test_several_servers_equal_a_plain_loop(tmp_path, cuts):
    """A round robin in each group, then the mean over all groups."""
    servers = ServerMap(2)
    module = made(cuts, optimizer=PLAIN, server_map=servers)
    data = make_data(**SKEWED, servers=servers)
    flow = [RoundRobinWeightPassing(average_every=1), ServerAveraging()]
    fit(tmp_path, module, data, flow)
    whole = network()
    for round_index in range(ROUNDS):
        nets, samples = {0: clone(whole), 1: clone(whole)}, Counter()
        for ((client, inputs, targets),) in batches_of(data, round_index):
            group = client * 2 // 3
            net = nets[group]
            step([PLAIN(net.parameters())], loss_of(net, inputs, targets))
            samples[group] += len(targets)
        states = [nets[group].state_dict() for group in samples]
        whole.load_state_dict(mean_state(states, samples.values()))
    assert_close(whole_of(module), whole.state_dict())
