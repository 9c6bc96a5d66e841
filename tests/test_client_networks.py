"""Clients with networks of their own, against plain loops over hand-written parts."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from protocols import (
    ROUNDS,
    SGD,
    batches_of,
    clone,
    fit,
    make_data,
    mean_state,
    network,
    step,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_protocols import SKEWED
from test_resume import check
from test_train import command
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from split_lightning import (
    ClientNetwork,
    CycleSL,
    Engine,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV3,
    SplitLightningModule,
)
from split_lightning.callbacks import VirtualClock
from split_lightning.cli.rebuilding import evaluate
from split_lightning.export import main as export_run
from split_lightning.models.adapter import Adapter
from split_lightning.runs.run_files import read_config
from split_lightning.system import System

IMAGE = (1, 6, 6)
TOPOLOGIES = Path(__file__).parents[1] / "docs" / "topologies.md"


def small():
    """Sends what the server of `network()` takes, cut after layer 2: (4, 6, 6)."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4), nn.Sigmoid())


def wide():
    """Cut after layer 3 it sends (6, 3, 3)."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


class Adapted(nn.Module):
    """The lower part of `wide()`, with an adapter written out."""

    def __init__(self):
        super().__init__()
        self.body = wide()[:4]
        self.conv = nn.Conv2d(6, 4, 1)

    def forward(self, inputs):
        return interpolate(self.conv(self.body(inputs)), (6, 6), mode="bilinear")


# Entries for three clients, and what each begins with, by hand; 0 and 2 are a group.
ENTRIES = {
    "own": (
        lambda: [
            ClientNetwork(small()),
            ClientNetwork(wide(), 3, adapter=True),
            ClientNetwork(small()),
        ],
        lambda: [small(), Adapted(), small()],
    ),
    "lower part": (
        lambda: [None, ClientNetwork(wide(), "3", adapter=True), None],
        lambda: [network()[:3], Adapted(), network()[:3]],
    ),
}
GROUP = [0, 1, 0]


@pytest.fixture(params=ENTRIES)
def entries(request):
    return ENTRIES[request.param]


def made(entries, optimizer=SGD, **options):
    torch.manual_seed(7)
    return SplitLightningModule(
        network(),
        2,
        optimizer,
        optimizer,
        3,
        client_networks=entries[0](),
        image_shape=IMAGE,
        **options,
    )


def by_hand(entries, module):
    """The clients' parts and the server's, with the adapter that was drawn."""
    parts = entries[1]()
    adapter = module.segments()["client_2"].adapter
    parts[1].conv.load_state_dict(adapter.conv.state_dict())
    return [*parts, network()[3:]]


def run_through(parts, inputs, targets):
    client, server = parts
    return cross_entropy(server(client(inputs)), targets)


def assert_network(module, client, parts):
    """A client's network computes the same logits, in training's statistics too."""
    segment, server = (clone(part).eval() for part in parts)
    images = torch.rand(5, *IMAGE, generator=torch.Generator().manual_seed(9))
    module.eval()
    with torch.no_grad():
        logits = module.networks.predict(client, images)
    own = module.stages(client)["client"].state_dict()
    torch.testing.assert_close(logits, server(segment(images)), rtol=1e-4, atol=1e-5)
    mine = segment.state_dict()
    assert len(own) == len(mine)
    for tensor, expected in zip(own.values(), mine.values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_a_round_robin_equals_a_plain_loop(tmp_path, entries, policy):
    """Client 2 goes on from client 0, of its group; client 1 from itself."""
    module = made(entries)
    *clients, server = by_hand(entries, module)
    data = make_data(3, RoundRobinWeightPassing(optimizer_state=policy), **SKEWED)
    fit(tmp_path, module, data)
    nets = clients[:2]  # of each group
    own = [SGD(net.parameters()) for net in nets]
    at_server = SGD(server.parameters())
    states, last = {}, {}
    for round_index in range(ROUNDS):
        for ((k, inputs, targets),) in batches_of(data, round_index):
            group, before = GROUP[k], last.get(GROUP[k])
            if before not in (None, k) and policy != "travel":
                states[before] = clone(own[group].state_dict())
                own[group] = SGD(nets[group].parameters())
                if policy == "keep" and k in states:
                    own[group].load_state_dict(states[k])
            last[group] = k
            loss = run_through((nets[group], server), inputs, targets)
            step([own[group], at_server], loss)
    for k in range(3):
        assert_network(module, k, (nets[GROUP[k]], server))
    assert module.networks.representatives() == [0, 1]
    size = sum(t.nbytes for t in nets[0].state_dict().values())
    momentum = sum(p.nbytes for p in nets[0].parameters())
    changes = 2 * ROUNDS - 1
    assert module.totals()["handoffs"] == changes
    sent = size + (momentum if policy == "travel" else 0)
    assert module.totals()["handoff_bytes"] == changes * sent


@pytest.mark.parametrize("protocol", [SplitFedV1, SplitFedV3])
def test_splitfed_equals_a_plain_loop(tmp_path, entries, protocol):
    """v1: the mean over each group, and over all servers. v3: over servers alone."""
    module = made(entries)
    *clients, server = by_hand(entries, module)
    data = make_data(3, protocol(), **SKEWED)
    fit(tmp_path, module, data)
    servers = [clone(server) for _ in range(3)]
    own = [
        SGD([*one.parameters(), *other.parameters()])
        for one, other in zip(clients, servers, strict=True)
    ]
    for round_index in range(ROUNDS):
        samples = Counter()
        for ((k, inputs, targets),) in batches_of(data, round_index):
            step([own[k]], run_through((clients[k], servers[k]), inputs, targets))
            samples[k] += len(targets)
        into_mean(servers, samples)
        if protocol is SplitFedV1:
            members = {k: n for k, n in samples.items() if GROUP[k] == 0}
            into_mean(clients, members)
    for k in range(3):
        assert_network(module, k, (clients[k], servers[k]))


def into_mean(nets, samples):
    mean = mean_state([nets[k].state_dict() for k in samples], samples.values())
    for k in samples:
        nets[k].load_state_dict(mean)


def test_parallel_equals_a_plain_loop(tmp_path, entries):
    data = make_data(3, ParallelSplitLearning(1), **SKEWED)
    module = made(entries)
    *clients, server = by_hand(entries, module)
    fit(tmp_path, module, data)
    own = [SGD(net.parameters()) for net in clients]
    at_server = SGD(server.parameters())
    for round_index in range(ROUNDS):
        samples = Counter()
        for parts in batches_of(data, round_index):
            for optimizer in (*own, at_server):
                optimizer.zero_grad()
            smashed = torch.cat([clients[k](inputs) for k, inputs, _ in parts])
            targets = torch.cat([own_targets for *_, own_targets in parts])
            cross_entropy(server(smashed), targets).backward()
            for k, _, own_targets in parts:
                own[k].step()
                samples[k] += len(own_targets)
            at_server.step()
        into_mean(clients, {k: n for k, n in samples.items() if GROUP[k] == 0})
    for k in range(3):
        assert_network(module, k, (clients[k], server))


def test_equal_entries_are_one_group_and_others_are_not():
    deeper = small().append(nn.Identity())
    networks = [ClientNetwork(net) for net in (small(), deeper, small())]
    module = made((lambda: networks, None))
    assert module.topology.placement.entries == (0, 1, 0)
    assert set(module.segments()) == {"client", "client_2", "server"}


ADAPTED = {
    "smaller": ((6, 8, 8), (4, 4, 4), ["conv.weight", "conv.bias"]),
    "larger": ((6, 3, 3), (4, 6, 6), ["conv.weight", "conv.bias"]),
    "size alone": ((4, 3, 5), (4, 6, 5), []),
    "vectors": ((6,), (4,), ["linear.weight", "linear.bias"]),
    "maps to vectors": ((2, 3, 3), (4,), ["linear.weight", "linear.bias"]),
}


@pytest.mark.parametrize(("sent", "taken", "keys"), ADAPTED.values(), ids=ADAPTED)
def test_an_adapter_has_no_more_than_it_needs(sent, taken, keys):
    adapter = Adapter(sent, taken)
    assert adapter(torch.rand(5, *sent)).shape == (5, *taken)
    assert list(adapter.state_dict()) == keys


@pytest.mark.parametrize(
    ("protocol", "kill"),
    [
        (partial(ParallelSplitLearning, 1), 1),
        (partial(RoundRobinWeightPassing, local_steps=1), 3),
    ],
)
def test_a_run_that_was_stopped_goes_on(tmp_path, protocol, kill):
    def make():
        engine = Engine(spill_to=tmp_path / "waiting")
        return made(ENTRIES["own"], engine=engine), make_data()

    check(tmp_path, make, (kill,), [protocol])


def test_virtual_time_is_of_each_clients_network(tmp_path):
    """A client with more to compute takes longer, and nothing else differs."""
    system = System(1e5, 1e15, 1e15, 1e15, latency=0)
    seconds = {}
    for name, net in (("small", small()), ("wide", wide())):
        cut = None if name == "small" else 3
        own = ClientNetwork(net, cut, adapter=True)
        module = made((lambda own=own: [own], None))
        clock = VirtualClock(system)
        data = make_data(1)
        fit(tmp_path, module, data, [clock])
        seconds[name] = clock.seconds
    samples = ROUNDS * sum(map(len, data.parts))
    convolution = 2 * 36 * 4 * 25  # of one sample, forward; in the backward of weights
    expected = samples * 2 * convolution / 1e5
    assert seconds["small"] == pytest.approx(expected, rel=1e-6)
    convolution, adapter = 2 * 36 * 6 * 9, 2 * 9 * 6 * 4
    expected = samples * (2 * convolution + 3 * adapter) / 1e5
    assert seconds["wide"] == pytest.approx(expected, rel=1e-6)


OWN = ClientNetwork(wide(), 3)
BAD = {
    "another shape": (
        {"client_networks": [OWN]},
        r"server takes.*shape \(4, 6, 6\).*Sequential sends is of shape \(6, 3, 3\)",
    ),
    "no shape of images": (
        {"client_networks": [None], "image_shape": None},
        r"`client_networks` to have entries, with `image_shape`.*image_shape=None",
    ),
    "no entry": ({"client_networks": []}, "but got 0 entries"),
    "several cuts": (
        {"client_networks": [None], "cut_layer": [[0, 2]]},
        "and several cuts",
    ),
    "a head": (
        {"client_networks": [None], "cut_layer": [2, 5], "labels": "client"},
        "labels at the server.*labels='client'",
    ),
    "no such images": (
        {"client_networks": [None], "image_shape": (3, 6, 6)},
        r"to take images of shape \(3, 6, 6\)",
    ),
    "a vector for maps": (
        {"client_networks": [ClientNetwork(wide(), None, adapter=True)]},
        r"adapter between feature maps.*sends \(3,\).*takes \(4, 6, 6\)",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(options, message):
    options = {"cut_layer": 2, "image_shape": IMAGE} | options
    with pytest.raises(ValueError, match=message):
        SplitLightningModule(
            network(), options.pop("cut_layer"), SGD, SGD, 3, **options
        )


class Scaled(nn.Module):
    """What it does besides its layer does not show in its text."""

    def __init__(self, scale, activation):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3, padding=1)
        self.scale = scale
        self.activation = activation

    def forward(self, inputs):
        return self.activation(self.scale * self.layer(inputs))


def test_networks_that_look_alike_and_compute_otherwise_are_no_group():
    own = [(1.0, torch.relu), (2.0, torch.relu), (1.0, torch.tanh), (1.0, torch.relu)]
    entries = [ClientNetwork(Scaled(*options)) for options in own]
    module = made((lambda: entries,))
    assert module.topology.placement.entries == (0, 1, 2, 0)


def test_more_entries_than_clients_are_refused(tmp_path):
    with pytest.raises(ValueError, match="entry of `client_networks` for each client"):
        fit(tmp_path, made(ENTRIES["own"]), make_data(2))


def test_clients_that_act_on_one_state_have_the_same_layers(tmp_path):
    data = make_data(3, ParallelSplitLearning("step"))
    with pytest.raises(MisconfigurationException, match="train one state together"):
        fit(tmp_path, made(ENTRIES["own"]), data)


def test_a_server_that_trains_first_takes_what_all_send(tmp_path):
    module = made(ENTRIES["own"])
    before = module.segments()["client_2"].adapter.conv.weight.clone()
    fit(tmp_path, module, make_data(3, CycleSL()), rounds=1)
    assert not torch.equal(module.segments(1)["client_2"].adapter.conv.weight, before)


def test_the_command_line(monkeypatch, tmp_path, capsys):
    """The documentation's: trained, tested again and exported from its folder."""
    (text,) = re.findall(r"```yaml\n(.*?)```", TOPOLOGIES.read_text(), re.DOTALL)
    place, line = re.search(r"# (my_conf\S+); (.*)", text).groups()
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(text)
    words = [*line.split(), "num_clients=4", "rounds=1"]
    (folder,) = command(monkeypatch, tmp_path, *words, "batch_size=400", "system=wan")
    results = json.loads((folder / "results.json").read_text())
    assert results["networks"] == 2
    assert results["handoffs"] == 2  # within each group of two
    again = evaluate(read_config(folder), folder)[0]
    assert again["test_accuracy"] == pytest.approx(results["test_accuracy"])
    assert again["networks"] == 2
    last = evaluate(read_config(folder), folder, checkpoint="last")[0]
    assert last["test_accuracy"] == pytest.approx(results["test_accuracy"])
    for client in (0, 2):
        export_run([f"run={folder}", f"client={client}", "format=torch"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        export_run([f"run={folder}", "client=2"])
    assert "`format` to be torch or onnx" in capsys.readouterr().err
