"""Clients that cut after different layers, against plain loops over whole networks."""

import json
from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import Recorder
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
    state_of,
    step,
)
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from test_protocols import SKEWED, plain_fedavg
from test_resume import check
from test_train import command
from torch import nn
from torch.nn.functional import cross_entropy

from split_lightning import (
    Channel,
    Engine,
    MultiServer,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    SplitFedV3,
)
from split_lightning.callbacks import DriftMonitor, ResumeCheckpoint, VirtualClock
from split_lightning.cli.rebuilding import evaluate
from split_lightning.coders import AverageGradients
from split_lightning.export import main as export_run
from split_lightning.models import DigitsCNN
from split_lightning.runs.run_files import read_config
from split_lightning.system import System, work_of

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


def layer_of(name):
    return int(name.split(".")[0])


def holder_of(cuts, client, layer, server=0):
    """Who holds a layer when a client has its turn."""
    return ("client", client) if layer in cuts[2][client] else ("server", server)


@pytest.mark.parametrize(("momentum", "local_steps"), [(0.0, None), (0.9, 1)])
def test_a_round_robin_is_the_unsplit_network_bit_for_bit(
    tmp_path, cuts, momentum, local_steps
):
    """Momentum goes with the layers."""
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=momentum)
    policy = "travel" if momentum else "keep"
    protocol = RoundRobinWeightPassing(local_steps=local_steps, optimizer_state=policy)
    module = made(cuts, optimizer=optimizer)
    data = make_data(3, protocol, **SKEWED)
    fit(tmp_path, module, data)
    net = network()
    own = optimizer(net.parameters())
    for round_index in range(ROUNDS):
        for ((_, inputs, targets),) in batches_of(data, round_index):
            step([own], loss_of(net, inputs, targets))
    for client in (None, 0, 1, 2):
        assert_equal(state_of(module, client), net.state_dict())


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
    options = {"optimizer_state": policy, "server_optimizer_state": policy}
    protocol = MultiServer(num_servers, None, None, **options)
    module = made(cuts)
    data = make_data(3, protocol, **SKEWED)
    fit(tmp_path, module, data)
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
        assert_close(state_of(module, client), expected)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_splitfed_v1_is_federated_averaging(tmp_path, cuts, policy):
    """Whoever has a layer: with its own momentum, or the mean of all."""
    module = made(cuts)
    protocol = SplitFedV1(optimizer_state=policy, server_optimizer_state=policy)
    fit(tmp_path, module, make_data(3, protocol, **SKEWED))
    expected = plain_fedavg(make_data(**SKEWED), policy=policy)[0]
    assert_close(state_of(module), expected)
    assert module.networks.representatives() == []


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
        """All holders of a layer go on from the mean over those who trained it.

        Args:
            layers: Which layers.
            party: Which holders; `None`: all, clients and servers.
        """
        holders = [(name, k) for name in ("client", "server") for k in range(3)]
        holders = [holder for holder in holders if party in (None, holder[0])]
        for name in network().state_dict():
            layer = layer_of(name)
            weights = {h: self.samples[layer, h] for h in holders}
            trained = {h: n for h, n in weights.items() if n and layer in layers}
            if trained:
                states = [{name: self.layers[holder][name]} for holder in trained]
                mean = mean_state(states, trained.values())
                for holder in holders:
                    self.layers[holder] |= mean
        self.samples.clear()


def held_by_clients(cuts):
    return {layer for own in cuts[2] for layer in own}


@pytest.mark.parametrize("local_steps", [None, 1])
def test_splitfed_v2_equals_a_plain_loop(tmp_path, cuts, local_steps):
    """The server's copy of a layer that some clients hold is in the mean, too."""
    module = made(cuts)
    protocol = SplitFedV2(shuffle=False, local_steps=local_steps)
    data = make_data(3, protocol, **SKEWED)
    fit(tmp_path, module, data)
    copies = Copies(cuts)
    for round_index in range(ROUNDS):
        for ((client, inputs, targets),) in batches_of(data, round_index):
            copies.train(client, inputs, targets)
        copies.average(held_by_clients(cuts))
    for client in range(3):
        expected = copies.network_of(client).state_dict()
        assert_close(state_of(module, client), expected)


def test_splitfed_v3_equals_a_plain_loop(tmp_path, cuts):
    """No layer of a client is ever averaged, with another client's or a server's."""
    module = made(cuts)
    data = make_data(3, SplitFedV3(), **SKEWED)
    fit(tmp_path, module, data)
    copies = Copies(cuts, server_of=lambda client: client)
    for round_index in range(ROUNDS):
        for ((client, inputs, targets),) in batches_of(data, round_index):
            copies.train(client, inputs, targets)
        copies.average(set(range(8)), party="server")
    for client in range(3):
        expected = copies.network_of(client).state_dict()
        assert_close(state_of(module, client), expected)
    assert module.networks.representatives() == [0, 1, 2]


def test_several_servers_equal_a_plain_loop(tmp_path, cuts):
    """A round robin in each group, then the mean over all groups."""
    module = made(cuts, optimizer=PLAIN)
    data = make_data(3, MultiServer(2), **SKEWED)
    fit(tmp_path, module, data)
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
    assert_close(state_of(module), whole.state_dict())


WIDTHS = [4 * 36, 4 * 36, 4 * 36, 4 * 9, 36, 8, 8]  # what each layer hands on


def size_of(layers):
    state = network().state_dict()
    return sum(t.nbytes for name, t in state.items() if layer_of(name) in layers)


def test_bytes_are_counted_where_they_belong(tmp_path, cuts):
    """Held against closed formulas: what crosses, and what is handed over."""
    module, seen = made(cuts), Counter()

    def count(message):
        seen[message.kind, message.cut] += message.num_bytes

    module.channel.observers.append(count)
    data = make_data(**SKEWED)
    fit(tmp_path, module, data)
    listed, labels, held = cuts
    own = [len(part) * ROUNDS for part in data.parts]
    first = [listed[0][k * len(listed[0]) // 3] for k in range(3)]
    depths = sorted(set(first))
    crossing = [
        sum(4 * n * WIDTHS[at] for n, at in zip(own, first, strict=True) if at == cut)
        for cut in depths
    ]
    crossing += [4 * sum(own) * WIDTHS[cut] for cut in listed[1:]]
    for place, expected in enumerate(crossing):
        assert seen["smashed", place] == seen["gradient", place] == expected
    turns = [k for _ in range(ROUNDS) for k in range(3)]
    to_clients, to_or_from_server = 0, 0
    for before, after in pairwise(turns):
        both = set(held[before]) & set(held[after])
        to_clients += size_of(both)
        to_or_from_server += size_of(set(held[before]) ^ set(held[after]))
    totals = module.totals()
    assert totals["handoffs"] == len(turns) - 1
    assert totals["handoff_bytes"] == to_clients
    assert totals["layer_bytes"] == to_or_from_server > 0
    labels_sent = 8 * sum(own) if labels == "server" else 0
    first_cut = sum(crossing[: len(depths)])
    head = crossing[-1] if labels == "client" else 0
    assert totals["uplink_bytes"] == first_cut + head + labels_sent
    assert totals["hop_bytes"] == 2 * (sum(crossing) - first_cut - head)


def test_bytes_to_a_mean_are_those_of_whoever_had_a_layer_last(tmp_path, cuts):
    """Of each group; a server's copies of clients' layers, too, where they travel."""
    module = made(cuts, optimizer=PLAIN)
    fit(tmp_path, module, make_data(3, MultiServer(2), **SKEWED))
    last = [set(cuts[2][client]) for client in (1, 2)]
    totals = module.totals()
    at_clients = sum(size_of(held) for held in last)
    at_servers = sum(size_of(set(range(8)) - held) for held in last)
    assert totals["averaging_bytes"] == 2 * ROUNDS * at_clients
    assert totals["server_averaging_bytes"] == 2 * ROUNDS * at_servers


def test_a_client_remembers_only_layers_that_it_has(tmp_path, cuts):
    """Those that wait: weights of their own, and a momentum of each."""
    module = made(cuts)
    fit(tmp_path, module, make_data(3, RoundRobinWeightPassing(enabled=False)))
    remembered = defaultdict(set)
    for store in module.engine.stores:
        for states in store.own.values():
            for name, state in states.items():
                remembered[name] |= {layer_of(key) for key in state}
    with_weights = {layer_of(name) for name in network().state_dict()}
    for client in range(3):
        assert remembered[f"client/{client}"] <= set(cuts[2][client])
    assert remembered["client/0"] == set(cuts[2][0]) & with_weights


STOPPED = {
    "hand-off": partial(
        RoundRobinWeightPassing, local_steps=1, optimizer_state="travel"
    ),
    "mean": SplitFedV1,
    "own layers": SplitFedV3,
}


@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize(("cut", "spills"), [("one each", True), ("U", False)])
def test_a_run_that_was_stopped_goes_on(tmp_path, cut, name, spills):
    """In mid-round, with what the server has between clients."""

    def make():
        engine = Engine(spill_to=tmp_path / "waiting" if spills else None)
        return made(CUTS[cut], engine=engine), make_data()

    check(tmp_path, make, (3,), [STOPPED[name]])


def test_a_run_goes_on_with_the_cuts_it_began_with(tmp_path):
    checkpoint = ResumeCheckpoint(tmp_path)
    flow = [RoundRobinWeightPassing(), checkpoint]
    fit(tmp_path, make_split([[0, 2]]), make_data(2), flow, rounds=1)
    with pytest.raises(
        ValueError, match=r"same entries of.*\[0, 1\].*now are \[1, 0\]"
    ):
        fit(
            tmp_path,
            make_split([[2, 0]]),
            make_data(2),
            flow,
            ckpt_path=tmp_path / "last.ckpt",
        )


BAD = {
    "more cuts than clients": (
        {"cut_layer": [[0, 2, 5, 0]]},
        RoundRobinWeightPassing(),
        r"at most one entry of `cut_layer` for each client \(`num_clients`: 3\).*got 4",
    ),
    "a second cut that differs": (
        {"cut_layer": [0, [2, 5]]},
        RoundRobinWeightPassing(),
        "only the first cut may differ",
    ),
    "no such layer": (
        {"cut_layer": [[0, "nowhere"]]},
        RoundRobinWeightPassing(),
        "`cut_layer` to be the path of a layer of Sequential, but got 'nowhere'",
    ),
    "one state for all": (
        {"cut_layer": [[0, 2]]},
        ParallelSplitLearning("step"),
        "clients train one state together",
    ),
    "gradients that are averaged": (
        {"cut_layer": [[0, 2]], "channel": Channel(downlink=AverageGradients(2))},
        ParallelSplitLearning(),
        "`downlink` to be None where clients cut.*AverageGradients",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_together_is_refused(tmp_path, name):
    options, protocol, message = BAD[name]
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(tmp_path, make_split(**options), make_data(3, protocol))


def test_momentum_does_not_travel_to_another_kind_of_optimizer(tmp_path):
    module = make_split([[0, 2]], server_optimizer=torch.optim.Adam)
    protocol = RoundRobinWeightPassing(optimizer_state="travel")
    with pytest.raises(ValueError, match=r"different classes.*client's is SGD.*Adam"):
        fit(tmp_path, module, make_data(3, protocol))


QUICK = ["rounds=1", "num_clients=4", "batch_size=400"]


@pytest.mark.parametrize(
    ("topology", "protocol"),
    [
        ("vanilla", "round_robin"),
        ("u_shaped", "splitfed_v3"),
        ("multi_hop", "splitfed_v2"),
    ],
)
def test_the_command_line(monkeypatch, tmp_path, topology, protocol):
    """A run is trained, tested, tested again and exported from its folder."""
    words = [f"topology={topology}", f"protocol={protocol}", *QUICK]
    words += ["model.cut_layer=[relu1,maxpool]", "system=wan"]
    (folder,) = command(monkeypatch, tmp_path, *words)
    results = json.loads((folder / "results.json").read_text())
    assert (results["layer_bytes"] > 0) == (protocol == "round_robin")
    again = evaluate(read_config(folder), folder)[0]
    assert again["test_accuracy"] == results["test_accuracy"]
    last = evaluate(read_config(folder), folder, checkpoint="last")[0]
    assert last["test_accuracy"] == results["test_accuracy"]
    own = 3 if protocol == "splitfed_v3" else None
    apart = protocol == "splitfed_v3"
    assert (folder / "networks/3/between.safetensors").is_file() == apart
    export_run([f"run={folder}", *([f"client={own}"] if own else []), "format=torch"])
    if not apart:
        export_run([f"run={folder}", "format=safetensors"])
        state = load_file(folder / "export/network.safetensors")
        assert state.keys() == DigitsCNN().state_dict().keys()


@pytest.mark.parametrize("every", [None, 1])
def test_parallel_equals_a_plain_loop(tmp_path, cuts, every):
    """Clients of different depth join the server's batch where they cut."""
    data = make_data(3, ParallelSplitLearning(every), **SKEWED)
    module, held = made(cuts), cuts[2]
    fit(tmp_path, module, data)
    nets, server = [network() for _ in range(3)], network()
    own = [SGD(layers_of(net, held[k])) for k, net in enumerate(nets)]
    at_server = SGD(server.parameters())
    for round_index in range(ROUNDS):
        samples = Counter()
        for parts in batches_of(data, round_index):
            for optimizer in (*own, at_server):
                optimizer.zero_grad()
            joint_loss(parts, nets, server, held).backward()
            for k, _, targets in parts:
                own[k].step()
                for layer in range(8):
                    holder = k if layer in held[k] else "server"
                    samples[layer, holder] += len(targets)
            at_server.step()
        if every:
            average_layers(nets, server, held, samples)
    for k, net in enumerate(nets):
        state = server.state_dict() | {
            name: t for name, t in net.state_dict().items() if layer_of(name) in held[k]
        }
        assert_close(state_of(module, k), state)


def layers_of(net, layers):
    return [p for name, p in net.named_parameters() if layer_of(name) in layers]


def joint_loss(parts, nets, server, held):
    """The mean loss of a step, layer by layer: each client's, or the server's batch."""
    values = {k: inputs for k, inputs, _ in parts}
    sizes = {k: len(targets) for k, _, targets in parts}
    for layer in range(8):
        served = [k for k in values if layer not in held[k]]
        values |= {k: nets[k][layer](values[k]) for k in values if k not in served}
        if served:
            joint = server[layer](torch.cat([values[k] for k in served]))
            counts = [sizes[k] for k in served]
            values |= zip(served, torch.split(joint, counts), strict=True)
    logits, targets = torch.cat(list(values.values())), [t for *_, t in parts]
    return cross_entropy(logits, torch.cat(targets))


def average_layers(nets, server, held, samples):
    """Layers that clients hold: the mean over all who trained them."""
    copies = dict(enumerate(nets)) | {"server": server}
    for layer in {layer for own in held for layer in own}:
        trained = {h: n for (at, h), n in samples.items() if at == layer}
        states = [copies[holder][layer].state_dict() for holder in trained]
        mean = mean_state(states, trained.values())
        for net in copies.values():
            net[layer].load_state_dict(mean)


STRETCHES = [[0], [1, 2], [3, 4, 5], [6, 7]]  # of "one each"
SYSTEM = System([1e5, 1e6], 1e6, [1e4, 1e5], [1e5, 1e6], latency=0.01, seed=5)


class Clock:
    """The times of "one each", added up stretch by stretch."""

    def __init__(self, held):
        self.held = held
        self.clients, self.server = dict.fromkeys(range(3), 0.0), 0.0
        layers = {str(i): layer for i, layer in enumerate(network())}
        self.work = work_of(layers, torch.rand(1, 1, 6, 6))

    def step(self, sizes):
        for backward in (False, True):
            order = STRETCHES[::-1] if backward else STRETCHES
            for layers in order:
                flops = sum(self.work[layer][backward] for layer in layers)
                there = [k for k in sizes if layers[0] not in self.held[k]]
                for k in sizes.keys() - there:
                    cuts = layers[-1] == max(self.held[k])
                    count, device = 4 * WIDTHS[layers[-1]] * sizes[k], SYSTEM.client(k)
                    if cuts and backward:
                        self.clients[k] += device.receives(count)
                    self.clients[k] += sizes[k] * flops / device.flops
                    if cuts and not backward:
                        self.clients[k] += device.sends(count + 8 * sizes[k])
                if there:
                    begin = max([self.server, *(self.clients[k] for k in there)])
                    took = flops * sum(sizes[k] for k in there) / SYSTEM.server_flops
                    self.server = begin + took
                    self.clients |= dict.fromkeys(there, self.server)

    def hand_over(self, before, after):
        one, other = (set(self.held[k]) for k in (before, after))
        sender, receiver = SYSTEM.client(before), SYSTEM.client(after)
        done, served = self.clients[before], self.server
        size = size_of(one & other)
        ready = [
            self.clients[after],
            done + sender.sends(size) + receiver.receives(size),
        ]
        if other - one:
            ready.append(served + receiver.receives(size_of(other - one)))
        if one - other:
            self.server = max(served, done + sender.sends(size_of(one - other)))
        self.clients[after] = max(ready)


@pytest.mark.parametrize("together", [False, True])
def test_deeper_clients_compute_more_in_virtual_time(tmp_path, together):
    cuts = CUTS["one each"]
    protocol = ParallelSplitLearning() if together else RoundRobinWeightPassing()
    clock = VirtualClock(SYSTEM)
    data = make_data(3, protocol)
    fit(tmp_path, made(cuts), data, [clock])
    expected, before = Clock(cuts[2]), None
    for round_index in range(ROUNDS):
        for parts in batches_of(data, round_index):
            first = parts[0][0]
            if not together and before not in (None, first):
                expected.hand_over(before, first)
            before = first
            expected.step({k: len(targets) for k, _, targets in parts})
    total = max([expected.server, *expected.clients.values()])
    assert clock.seconds == pytest.approx(total)


def test_each_party_clips_by_itself(tmp_path, cuts):
    """A client all layers that it holds; each server what clients leave to it."""
    limit = 0.05
    module = made(cuts, optimizer=PLAIN, gradient_clip_val=limit)
    data = make_data(**SKEWED)
    fit(tmp_path, module, data)
    net = network()
    optimizer = PLAIN(net.parameters())
    hop = cuts[0][1] if len(cuts[0]) > 1 else 7
    for round_index in range(ROUNDS):
        for ((client, inputs, targets),) in batches_of(data, round_index):
            optimizer.zero_grad()
            loss_of(net, inputs, targets).backward()
            held = cuts[2][client]
            left = [layer for layer in range(8) if layer not in held]
            first, second = ([i for i in left if (i > hop) == far] for far in (0, 1))
            for layers in filter(None, (held, first, second)):
                nn.utils.clip_grad_norm_(layers_of(net, layers), limit)
            optimizer.step()
    assert_close(state_of(module), net.state_dict())


def test_several_processes_train_clients_that_are_alike():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(MisconfigurationException, match="differ in the layers that"):
        make_split([[0, 2]]).verify(trainer, make_data(2), RoundRobinWeightPassing())


def test_drift_is_of_layers_that_both_clients_hold(tmp_path):
    records = Recorder()
    data = make_data(2, batch_size=100)
    module = make_split([[0, 2]], optimizer=PLAIN)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=ROUNDS,
        logger=records,
        log_every_n_steps=1,
        callbacks=[RoundRobinWeightPassing(), DriftMonitor()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    logged = [value for _, name, value in records.records if name == "drift/client"]
    net, gradients = network(), []
    optimizer = PLAIN(net.parameters())
    for round_index in range(ROUNDS):
        for ((_, inputs, targets),) in batches_of(data, round_index):
            step([optimizer], loss_of(net, inputs, targets))
            gradients.append(torch.cat([p.grad.flatten() for p in net[0].parameters()]))
    expected = [
        float(torch.cosine_similarity(one, other, dim=0))
        for one, other in pairwise(gradients)
    ]
    assert logged == pytest.approx(expected, rel=1e-3)


def test_each_party_may_keep_its_own_statistics(tmp_path):
    """Of a layer between the cuts, too: as federated averaging that keeps them."""
    cuts = CUTS["one each"]
    module = made(cuts)
    fit(tmp_path, module, make_data(3, SplitFedV1(buffers="keep"), **SKEWED))
    expected = plain_fedavg(make_data(**SKEWED), buffers="keep")
    for client in range(3):
        assert_close(state_of(module, client), expected[client])
