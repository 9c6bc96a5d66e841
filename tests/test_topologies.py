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
    step,
)
from test_protocols import EACH, SKEWED, plain_fedavg
from test_resume import check
from test_train import command
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision import models

from split_lightning import (
    CycleSplitLightningModule,
    RoundRobinWeightPassing,
    merge,
    split,
)
from split_lightning.callbacks import ClientAveraging, ServerAveraging
from split_lightning.channel import values_of
from split_lightning.data import ParallelSchedule, PooledSchedule, RoundRobinSchedule

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


def merged(module):
    return merge(module.client, module.server)


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


@pytest.mark.parametrize("in_u_shape", [True, False], ids=["U", "hops"])
@pytest.mark.parametrize("name", ZOO)
def test_networks_in_several_segments_are_the_unsplit_one_bit_for_bit(name, in_u_shape):
    """Also where several tensors cross, and dropout draws."""
    make, cuts = ZOO[name]
    torch.manual_seed(0)
    whole = make(num_classes=10)
    count = len(cuts) + 1
    owners = [0, *[1] * (count - 2), 0] if in_u_shape else list(range(count))
    segments = split(whole, cuts, owners)
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
        values, crossed, passed = (inputs,), [], Counter()
        for owner in owners:
            outputs = values_of(segments[owner](*values, stretch=passed[owner]))
            passed[owner] += 1
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
    fit(tmp_path, central, make_data(1, schedule=PooledSchedule()), [])
    for callback in (RoundRobinWeightPassing(), ClientAveraging()):
        module = made(route)
        fit(tmp_path, module, make_data(1), [callback])
        assert_equal(merged(module), central.network.state_dict())


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_a_round_robin_equals_a_plain_loop(tmp_path, route, policy):
    """The client's optimizer has its lower layers and its head."""
    module = made(route, optimizer_state=policy)
    fit(tmp_path, module, make_data(**SKEWED), [RoundRobinWeightPassing()])
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
    assert_equal(merged(module), net.state_dict())


def test_splitfed_v1_equals_federated_averaging(tmp_path, route):
    module = made(route, server_map=EACH)
    data = make_data(**SKEWED, servers=EACH)
    fit(tmp_path, module, data, [ClientAveraging(), ServerAveraging(remote=False)])
    assert_close(merged(module), plain_fedavg(make_data(**SKEWED))[0])


def test_splitfed_v2_equals_a_plain_loop(tmp_path, route):
    """Clients have copies of their layers, the one server's are put into each."""
    schedule = RoundRobinSchedule(local_steps=1)
    module = made(route)
    data = make_data(**SKEWED, schedule=schedule)
    fit(tmp_path, module, data, [ClientAveraging()])
    nets = {k: network() for k in range(3)}
    own = {k: SGD(parts_of(net, route)[0]) for k, net in nets.items()}
    shared = {
        n: t for n, t in network().state_dict().items() if not is_clients(route, n)
    }
    server_state = None
    for round_index in range(ROUNDS):
        samples = Counter()
        data = make_data(**SKEWED, schedule=schedule)
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
    assert_close(merged(module), nets[0].state_dict())


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


@pytest.mark.parametrize("cut_gradient", ["joint", "own"])
@pytest.mark.parametrize("draw", ["equal", "proportional"])
def test_parallel_equals_a_plain_loop(tmp_path, route, draw, cut_gradient):
    """End to end: a client's gradient of its own mean loss is B / b times as large."""
    options = SKEWED | {"schedule": ParallelSchedule(draw=draw), "batch_size": 12}
    norm = draw == "equal"  # of one sample there are no statistics
    module = made(route, net=network(norm), cut_gradient=cut_gradient)
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every=None)])
    nets = {k: network(norm) for k in range(3)}
    own = {k: SGD(parts_of(net, route)[0]) for k, net in nets.items()}
    server = SGD(parts_of(nets[0], route)[1])
    for net in nets.values():  # one server for all
        for index in set(range(8)) - set(route[2]):
            net[index] = nets[0][index]
    for round_index in range(ROUNDS):
        for parts in batches_of(make_data(**options), round_index):
            for optimizer in (*own.values(), server):
                optimizer.zero_grad()
            together(parts, nets, route).backward()
            server.step()
            total = sum(len(targets) for *_, targets in parts)
            for k, _, targets in parts:
                for parameter in parts_of(nets[k], route)[0]:
                    if cut_gradient == "own":
                        parameter.grad *= total / len(targets)
                own[k].step()
    for k, net in nets.items():
        module.parties.show(k)
        assert_close(merged(module), net.state_dict())


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "GroupNorm"])
def test_clients_averaged_at_each_step_are_the_unsplit_network(tmp_path, route, norm):
    options = SKEWED | {
        "schedule": ParallelSchedule(draw="proportional"),
        "batch_size": 12,
    }
    module = made(
        route,
        net=network(norm),
        cut_gradient="own",
        batch_norm="joint" if norm else "own",
    )
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every="step")])
    net = network(norm)
    optimizer = SGD(net.parameters())
    for round_index in range(ROUNDS):
        for parts in batches_of(make_data(**options), round_index):
            inputs, targets = map(torch.cat, list(zip(*parts, strict=True))[1:])
            step([optimizer], loss_of(net, inputs, targets))
    assert_close(merged(module), net.state_dict())


def test_each_party_clips_by_itself(tmp_path, route):
    """Each server on the route, and the client's layers as one."""
    limit = 0.05
    module = made(route, gradient_clip_val=limit)
    fit(tmp_path, module, make_data(1), [RoundRobinWeightPassing()])
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
    assert_close(merged(module), net.state_dict())


def spied(tmp_path, route, data, callbacks, **options):
    module, seen = made(route, **options), []
    module.channel.observers.append(lambda *crossed: seen.append(crossed))
    fit(tmp_path, module, data, callbacks)
    return module, seen


def test_no_label_and_no_sample_leaves_a_client_in_a_u_shape(tmp_path):
    data = make_data(**SKEWED)
    passing = [RoundRobinWeightPassing()]
    _, seen = spied(tmp_path, ROUTES["U"], data, passing)
    assert {crossing.content for crossing, _ in seen} == {"smashed data", "gradient"}
    assert all(v.is_floating_point() for _, values in seen for v in values)
    targets = spied(tmp_path, ROUTES["one cut"], make_data(**SKEWED), passing)[1]
    assert {c.content for c, _ in targets} == {"smashed data", "gradient", "targets"}


def test_no_sample_crosses_any_cut(tmp_path, route):
    data = make_data(**SKEWED)
    _, seen = spied(tmp_path, route, data, [RoundRobinWeightPassing()])
    shape = (1, 6, 6)
    raw = {own.numpy().tobytes() for ((_, own, _),) in batches_of(data, 0)}
    assert len(raw) > 3
    for crossing, values in seen:
        for value in values:
            assert value.shape[1:] != shape, crossing
            assert value.numpy(force=True).tobytes() not in raw


WIDTHS = [4 * 36, 4 * 36, 4 * 36, 4 * 9, 36, 8, 8]  # what each layer hands on


def test_the_channel_counts_what_crosses_each_cut(tmp_path, route):
    """Held against closed formulas; each way of the route is in one of three counts."""
    data = make_data(**SKEWED)
    module, _ = spied(tmp_path, route, data, [RoundRobinWeightPassing()])
    samples = ROUNDS * sum(map(len, data.parts))
    cuts, labels, _ = route
    crossing = [4 * samples * WIDTHS[cut] for cut in cuts]
    assert module.channel.by_cut == [[count, count] for count in crossing]
    first, *between = crossing
    last = between.pop() if labels == "client" else 0
    own_labels = 0 if labels == "client" else 8 * samples
    assert module.totals() | {"handoff_bytes": 0, "handoffs": 0} == {
        "uplink_bytes": first + last + own_labels,
        "downlink_bytes": first + last,
        "hop_bytes": 2 * sum(between),
        "handoff_bytes": 0,
        "handoffs": 0,
        "averaging_bytes": 0,
        "server_averaging_bytes": 0,
        "layer_bytes": 0,
    }


def test_the_head_is_handed_over_too(tmp_path):
    module = made(ROUTES["U"])
    data = make_data(3)
    fit(tmp_path, module, data, [RoundRobinWeightPassing()])
    state = {k: v for k, v in network().state_dict().items() if k[0] in "0167"}
    assert module.client.state_dict().keys() == state.keys()
    size = sum(tensor.nbytes for tensor in state.values())
    assert module.totals()["handoffs"] == 3 * ROUNDS - 1
    assert module.totals()["handoff_bytes"] == (3 * ROUNDS - 1) * size


def test_joint_statistics_of_the_head_are_counted_once(tmp_path):
    """A mean and a variance of each channel, up and down, in each of two passes."""
    module = made(ROUTES["U"], cut_gradient="own", batch_norm="joint")
    options = {"schedule": ParallelSchedule(draw="proportional"), "batch_size": 12}
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every="step")])
    rounds = [batches_of(make_data(**options), index) for index in range(ROUNDS)]
    taking_part = sum(len(parts) for steps in rounds for parts in steps)
    parameters = sum(p.nbytes for p in parts_of(network(), ROUTES["U"])[0])
    channels = 4 + 8  # of layer 1, and of layer 6, which is the head's
    expected = taking_part * (2 * parameters + 4 * 2 * 4 * channels)
    assert module.totals()["averaging_bytes"] == expected


@pytest.mark.parametrize("name", ["two hops", "U over two hops"])
@pytest.mark.parametrize("flow", [[RoundRobinWeightPassing], [ClientAveraging]])
def test_a_run_that_was_stopped_goes_on(tmp_path, name, flow):
    """What crossed each cut is counted on, too."""
    modules = []

    def make():
        modules.append(made(ROUTES[name]))
        return modules[-1], make_data(schedule=RoundRobinSchedule(local_steps=1))

    check(tmp_path, make, (2, 7), flow)
    whole, _, resumed, *_ = modules
    assert resumed.channel.by_cut == whole.channel.by_cut


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


def test_a_server_that_trains_first_has_one_cut():
    with pytest.raises(ValueError, match="one layer where the server trains first"):
        CycleSplitLightningModule(network(), [2, 5], SGD, SGD, 3)


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
    assert "`topology=u_shaped` would change nothing" in capsys.readouterr().err
