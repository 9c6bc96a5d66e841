"""Several cuts, and labels that stay with clients, against the unsplit network.

Each rule below was broken on purpose, and a test failed: the head is the server's, and
so neither handed over nor stepped by the client's optimizer; labels are sent in a
U-shape; what a head sends up stays scaled for its client; losses of heads count alike
whatever their number of samples; slices go to the wrong heads; all is counted at the
first cut; servers on a route are clipped as one.
"""

import copy
import json
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from protocols import (
    ROUNDS,
    SGD,
    assert_close,
    assert_equal,
    batches_of,
    fit,
    loss_of,
    make_data,
    make_split,
    make_unsplit,
    mean_state,
    network,
    settle,
    state_of,
    step,
)
from test_protocols import SKEWED, plain_fedavg
from test_resume import check
from test_train import command
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision import models

from split_lightning import (
    GPSL,
    Centralized,
    CycleSL,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    merge,
    split,
)
from split_lightning.message import as_values

# The cuts of `network()` (Conv, BatchNorm, ReLU, MaxPool, Flatten, Linear, BatchNorm,
# Linear), who has the labels, and which of its layers are the client's.
ROUTES = {
    "one cut": ([2], "server", [0, 1, 2]),
    "two hops": ([2, 5], "server", [0, 1, 2]),
    "three hops": ([0, 2, 6], "server", [0]),
    "U": ([2, 5], "client", [0, 1, 2, 6, 7]),
    "U over two hops": ([0, 2, 6], "client", [0, 7]),
}


@pytest.fixture(params=ROUTES)
def route(request):
    return ROUTES[request.param]


def made(route, **options):
    cuts, labels, _ = route
    return make_split(cuts, labels=labels, **options)


def is_clients(route, name):
    return int(name.split(".")[0]) in route[2]


def parts_of(net, route):
    """The client's parameters and the server's."""
    named = list(net.named_parameters())
    mine = [p for name, p in named if is_clients(route, name)]
    return mine, [p for name, p in named if not is_clients(route, name)]


ZOO = {
    "resnet18": (models.resnet18, ["conv1", "layer2.0.bn2", "layer4"]),
    "densenet121": (models.densenet121, ["features.conv0", "features.transition2"]),
    "mobilenet_v3_small": (
        models.mobilenet_v3_small,
        ["features.0", "features.5.block.2.fc1", "classifier.2"],
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_networks_in_several_segments_are_the_unsplit_one_bit_for_bit(name):
    """Also where several tensors cross, and dropout draws."""
    make, cuts = ZOO[name]
    torch.manual_seed(0)
    whole = make(num_classes=10)
    segments = split(whole, cuts)
    keys = [key for segment in segments for key in segment.state_dict()]
    assert sorted(keys) == sorted(whole.state_dict())
    optimizer = SGD(whole.parameters())
    optimizers = [SGD(segment.parameters()) for segment in segments]
    drawn = torch.Generator().manual_seed(1)
    for number in range(2):
        inputs = torch.randn(4, 3, 64, 64, generator=drawn)
        targets = torch.randint(10, (4,), generator=drawn)
        torch.manual_seed(number)
        step([optimizer], loss_of(whole, inputs, targets))
        torch.manual_seed(number)
        values, crossed = (inputs,), []
        for segment in segments:
            outputs = as_values(segment(*values))
            values = tuple(v.detach().requires_grad_() for v in outputs)
            crossed.append((outputs, values))
        crossed.pop()
        for own in optimizers:
            own.zero_grad()
        cross_entropy(outputs[0], targets).backward()
        for before, after in reversed(crossed):
            torch.autograd.backward(before, [value.grad for value in after])
        for own in optimizers:
            own.step()
    assert_equal(merge(*segments), whole.state_dict())


def test_one_client_is_the_unsplit_network_bit_for_bit(tmp_path, route):
    central = make_unsplit()
    fit(tmp_path, central, make_data(1, Centralized()))
    for protocol in (RoundRobinWeightPassing(), SplitFedV2()):
        module = made(route)
        fit(tmp_path, module, make_data(1, protocol))
        assert_equal(state_of(module), state_of(central))


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_a_round_robin_equals_a_plain_loop(tmp_path, route, policy):
    """The client's optimizer has its lower layers and its head."""
    module = made(route)
    protocol = RoundRobinWeightPassing(optimizer_state=policy)
    fit(tmp_path, module, make_data(3, protocol, **SKEWED))
    net = network()
    mine, theirs = parts_of(net, route)
    server, own, states, before = SGD(theirs), SGD(mine), {}, None
    for round_index in range(ROUNDS):
        for ((client, inputs, targets),) in batches_of(
            make_data(**SKEWED), round_index
        ):
            if client != before and policy != "travel":
                states[before] = copy.deepcopy(own.state_dict())
                own = SGD(mine)
                if policy == "keep" and client in states:
                    own.load_state_dict(states[client])
            before = client
            step([own, server], loss_of(net, inputs, targets))
    assert_equal(state_of(module), net.state_dict())


def test_splitfed_v1_equals_federated_averaging(tmp_path, route):
    module = made(route)
    fit(tmp_path, module, make_data(3, SplitFedV1(), **SKEWED))
    assert_close(state_of(module), plain_fedavg(make_data(**SKEWED))[0])


def test_splitfed_v2_equals_a_plain_loop(tmp_path, route):
    """Clients have copies of their layers, the one server's are put into each."""
    module = made(route)
    data = make_data(3, SplitFedV2(shuffle=False, local_steps=1), **SKEWED)
    fit(tmp_path, module, data)
    nets = {k: network() for k in range(3)}
    own = {k: SGD(parts_of(net, route)[0]) for k, net in nets.items()}
    shared = {
        n: t for n, t in network().state_dict().items() if not is_clients(route, n)
    }
    server_state = None
    for round_index in range(ROUNDS):
        samples = Counter()
        for ((k, inputs, targets),) in batches_of(data, round_index):
            nets[k].load_state_dict(nets[k].state_dict() | shared)
            server = SGD(parts_of(nets[k], route)[1])
            if server_state:
                server.load_state_dict(server_state)
            step([own[k], server], loss_of(nets[k], inputs, targets))
            server_state = copy.deepcopy(server.state_dict())
            state = nets[k].state_dict()
            shared = {name: state[name].clone() for name in shared}
            samples[k] += len(targets)
        states = [nets[k].state_dict() for k in samples]
        mean = mean_state(states, samples.values()) | shared
        for net in nets.values():
            net.load_state_dict(mean)
        settle(own, samples, "keep")
    assert_close(state_of(module), nets[0].state_dict())


def together(parts, nets, route):
    """The joint mean loss of clients with layers of their own and one server."""
    sizes = [len(targets) for *_, targets in parts]
    values = {k: inputs for k, inputs, _ in parts}
    server = next(iter(nets.values()))
    for index in range(len(server)):
        if index in route[2]:
            values = {k: nets[k][index](value) for k, value in values.items()}
        else:
            joint = server[index](torch.cat(list(values.values())))
            values = dict(zip(values, torch.split(joint, sizes), strict=True))
    losses = [cross_entropy(values[k], targets) for k, _, targets in parts]
    return sum(own * n for own, n in zip(losses, sizes, strict=True)) / sum(sizes)


def test_parallel_equals_a_plain_loop(tmp_path, route):
    module = made(route)
    data = make_data(3, ParallelSplitLearning(), batch_size=12, **SKEWED)
    fit(tmp_path, module, data)
    nets = {k: network() for k in range(3)}
    own = {k: SGD(parts_of(net, route)[0]) for k, net in nets.items()}
    server = SGD(parts_of(nets[0], route)[1])
    for net in nets.values():  # one server for all
        for index in set(range(8)) - set(route[2]):
            net[index] = nets[0][index]
    for round_index in range(ROUNDS):
        for parts in batches_of(data, round_index):
            for optimizer in (*own.values(), server):
                optimizer.zero_grad()
            together(parts, nets, route).backward()
            server.step()
            for k, *_ in parts:
                own[k].step()
    for k, net in nets.items():
        assert_close(state_of(module, k), net.state_dict())


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "GroupNorm"])
def test_clients_that_act_on_one_state_are_the_unsplit_network(tmp_path, route, norm):
    data = make_data(3, GPSL(joint_norm=norm), batch_size=12, **SKEWED)
    module = made(route, net=network(norm))
    fit(tmp_path, module, data)
    net = network(norm)
    optimizer = SGD(net.parameters())
    for round_index in range(ROUNDS):
        for parts in batches_of(data, round_index):
            inputs, targets = map(torch.cat, list(zip(*parts, strict=True))[1:])
            step([optimizer], loss_of(net, inputs, targets))
    assert_close(state_of(module), net.state_dict())


def test_each_party_clips_by_itself(tmp_path, route):
    """Each server on the route, and the client's layers as one."""
    limit = 0.05
    module = made(route, gradient_clip_val=limit)
    fit(tmp_path, module, make_data(1))
    net = network()
    optimizer = SGD(net.parameters())
    cuts, _, mine = route
    bounds = [0, *(cut + 1 for cut in cuts), 8]
    stretches = [list(range(*pair)) for pair in pairwise(bounds)]
    held = [mine, *(own for own in stretches if not set(own) & set(mine))]
    for round_index in range(ROUNDS):
        for ((_, inputs, targets),) in batches_of(make_data(1), round_index):
            optimizer.zero_grad()
            loss_of(net, inputs, targets).backward()
            for layers in held:
                own = [p for index in layers for p in net[index].parameters()]
                nn.utils.clip_grad_norm_(own, limit)
            optimizer.step()
    assert_close(state_of(module), net.state_dict())


def spied(tmp_path, route, data):
    module, seen = made(route), []
    module.channel.observers.append(seen.append)
    fit(tmp_path, module, data)
    return module, seen


def test_no_label_and_no_sample_leaves_a_client_in_a_u_shape(tmp_path):
    _, seen = spied(tmp_path, ROUTES["U"], make_data(1, **SKEWED))
    assert {message.kind for message in seen} == {"smashed", "gradient"}
    assert all(v.is_floating_point() for message in seen for v in message.payload)
    _, seen = spied(tmp_path, ROUTES["one cut"], make_data(1, **SKEWED))
    assert {message.kind for message in seen} == {"smashed", "gradient", "labels"}


def test_no_sample_crosses_any_cut(tmp_path, route):
    data = make_data(**SKEWED)
    _, seen = spied(tmp_path, route, data)
    raw = {own.numpy().tobytes() for ((_, own, _),) in batches_of(data, 0)}
    assert len(raw) > 3
    for message in seen:
        for value in message.payload:
            assert value.shape[1:] != (1, 6, 6), message
            assert value.numpy(force=True).tobytes() not in raw


WIDTHS = [4 * 36, 4 * 36, 4 * 36, 4 * 9, 36, 8, 8]  # what each layer hands on


def test_bytes_of_each_cut_equal_closed_formulas(tmp_path, route):
    """Each way of the route is in one of three counts."""
    data = make_data(1, **SKEWED)
    module, seen = spied(tmp_path, route, data)
    samples = ROUNDS * sum(map(len, data.parts))
    cuts, labels, _ = route
    crossing = [4 * samples * WIDTHS[cut] for cut in cuts]
    counted = Counter()
    for message in seen:
        counted[message.kind, message.cut] += message.num_bytes
    for place, count in enumerate(crossing):
        assert counted["smashed", place] == counted["gradient", place] == count
    first, *between = crossing
    last = between.pop() if labels == "client" else 0
    own_labels = 0 if labels == "client" else 8 * samples
    expected = dict.fromkeys(module.totals(), 0) | {
        "uplink_bytes": first + last + own_labels,
        "downlink_bytes": first + last,
        "hop_bytes": 2 * sum(between),
    }
    assert module.totals() == expected


def test_the_head_is_handed_over_too(tmp_path):
    module = made(ROUTES["U"])
    fit(tmp_path, module, make_data(3))
    state = {k: v for k, v in network().state_dict().items() if k[0] in "0167"}
    assert module.client.state_dict().keys() == state.keys()
    size = sum(tensor.nbytes for tensor in state.values())
    assert module.totals()["handoffs"] == 3 * ROUNDS - 1
    assert module.totals()["handoff_bytes"] == (3 * ROUNDS - 1) * size


def test_joint_statistics_of_the_head_are_counted_once(tmp_path):
    """A mean and a variance of each channel, up and down, in each of two passes."""
    module = made(ROUTES["U"])
    data = make_data(3, GPSL(), batch_size=12)
    fit(tmp_path, module, data)
    rounds = [batches_of(data, index) for index in range(ROUNDS)]
    taking_part = sum(len(parts) for steps in rounds for parts in steps)
    parameters = sum(p.nbytes for p in parts_of(network(), ROUTES["U"])[0])
    channels = 4 + 8  # of layer 1, and of layer 6, which is the head's
    expected = taking_part * (2 * parameters + 4 * 2 * 4 * channels)
    assert module.totals()["averaging_bytes"] == expected


@pytest.mark.parametrize("name", ["two hops", "U over two hops"])
@pytest.mark.parametrize("protocol", [RoundRobinWeightPassing, SplitFedV2])
def test_a_run_that_was_stopped_goes_on(tmp_path, name, protocol):
    def make():
        return made(ROUTES[name]), make_data()

    check(tmp_path, make, (2, 7), [partial(protocol, local_steps=1)])


BAD = {
    "one cut and a head": (
        {"cut_layer": 2, "labels": "client"},
        "`cut_layer` to name at least two layers where labels stay.*but got 1",
    ),
    "the wrong way round": (
        {"cut_layer": [5, 2]},
        "in the order in which the network runs them, but `2` does not run after `5`",
    ),
    "twice the same": ({"cut_layer": [2, 2]}, "`2` does not run after `2`"),
    "none": ({"cut_layer": []}, "`cut_layer` to be a layer, or several, but got none"),
    "nothing to train between": ({"cut_layer": [2, 3]}, "after `3` leaves the client"),
    "nobody": (
        {"cut_layer": [2, 5], "labels": "nobody"},
        r"`labels` to be one of \('client', 'server'\), but got 'nobody'",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_cuts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_split(**options)


@pytest.mark.parametrize("cuts", [[2, 5], [[0, 2]]])
def test_a_server_that_trains_first_has_one_cut(tmp_path, cuts):
    with pytest.raises(ValueError, match="one layer where the server trains first"):
        fit(tmp_path, make_split(cuts), make_data(3, CycleSL()))


QUICK = ["rounds=1", "num_clients=3", "trainer.limit_train_batches=6"]


@pytest.mark.parametrize("topology", ["u_shaped", "multi_hop"])
@pytest.mark.parametrize(
    "protocol",
    ["round_robin", "parallel", "gpsl", "splitfed_v3", "multi_server"],
)
def test_the_command_line(monkeypatch, tmp_path, topology, protocol):
    words = [f"topology={topology}", f"protocol={protocol}", *QUICK]
    (folder,) = command(monkeypatch, tmp_path, *words)
    results = json.loads((folder / "results.json").read_text())
    assert (results["hop_bytes"] > 0) == (topology == "multi_hop")


@pytest.mark.parametrize("protocol", ["centralized", "fedavg", "local"])
def test_an_unsplit_network_has_no_topology(monkeypatch, tmp_path, capsys, protocol):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, f"protocol={protocol}", "topology=u_shaped")
    error = capsys.readouterr().err
    assert "one party trains the whole network" in error
    assert "leave `topology` out" in error
