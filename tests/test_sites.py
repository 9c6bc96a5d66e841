"""Parties at other sites train to the same weights as in one process, bit for bit."""

from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import test_vertical as vertical
import torch
from conftest import tiny_network
from protocols import assert_equal, fit, make_data, make_split, make_unsplit, network
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from split_lightning import (
    GPSL,
    AsynchronousWeightPassing,
    Centralized,
    CycleSL,
    Engine,
    FedAvg,
    Local,
    MultiServer,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    SplitFedV3,
)
from split_lightning.callbacks import PartitionPicture
from split_lightning.engines.answers import Answers
from split_lightning.engines.expected import Expected
from split_lightning.engines.hello import Hello
from split_lightning.engines.journal import Journal
from split_lightning.engines.remote import RemoteSite, SampleRef, Sites
from split_lightning.engines.wire import Frame, decoded, encoded
from split_lightning.finite import NotFinite
from split_lightning.message import role_of
from split_lightning.placement import client_of


class SitesHere(Sites):
    """Sites in this process, each with a module and data of its own.

    What passes is bytes, as on a network.
    """

    def __init__(self, make, num_sites):
        made = [make(number) for number in range(num_sites)]
        self.made = [site for site, _ in made]
        self.hellos = [hello for _, hello in made]
        self.sites = [RemoteSite(f"site {n}", self.taker(n)) for n in range(num_sites)]
        self.parties = {}

    def taker(self, number):
        def deliver(call):
            future = Future()
            expected = self.expected[number].reply_to(call)
            method, arguments = on_the_wire(tuple(call))
            try:
                reply = on_the_wire(getattr(self.made[number], method)(*arguments))
                expected.accept(reply)
                future.set_result(reply)
            except NotFinite as found:
                future.set_exception(found)
            return future

        return deliver

    def of(self, party):
        if role_of(party) != "client":
            return None
        number = self.parties.setdefault(party, len(self.parties))
        return self.sites[number % len(self.sites)]

    def meet(self, parties, agreed):
        told = {}
        for party in parties:
            client = client_of(party)
            number = self.sites.index(self.of(party))
            plain = self.hellos[number]([client]).plain()
            (told[client],) = Hello.of(on_the_wire(plain), agreed).data
        return list(told.values())

    def expect(self, shapes):
        self.expected = [Expected(shapes) for _ in self.sites]

    def begin(self, barrier):
        pass

    def keep(self):
        return {}

    def end(self):
        pass

    def close(self):
        pass


def on_the_wire(value):
    return decoded(encoded(Frame("call", 1, value))).value


RUNS = {
    "round robin": (RoundRobinWeightPassing, {}),
    "round robin, momentum travels": (
        RoundRobinWeightPassing,
        {"optimizer_state": "travel"},
    ),
    "round robin, momentum is reset": (
        RoundRobinWeightPassing,
        {"optimizer_state": "reset"},
    ),
    "several turns": (RoundRobinWeightPassing, {"local_steps": 1}),
    "no passing": (RoundRobinWeightPassing, {"enabled": False}),
    "splitfed v1": (SplitFedV1, {}),
    "splitfed v1, in short turns": (SplitFedV1, {"local_steps": 1}),
    "splitfed v1, of some": (SplitFedV1, {"clients_per_round": 2}),
    "splitfed v2": (SplitFedV2, {"optimizer_state": "travel"}),
    "splitfed v3": (SplitFedV3, {}),
    "several servers": (MultiServer, {"num_servers": 2, "servers_every": 1}),
    "parallel": (ParallelSplitLearning, {}),
    "asynchronous": (AsynchronousWeightPassing, {"local_steps": 2}),
    "server first": (CycleSL, {"server_passes": 2}),
    "fedavg": (FedAvg, {}),
    "fedavg, in short turns": (FedAvg, {"local_steps": 1}),
    "local": (Local, {}),
}
SHAPES = {
    "vanilla": {"cut_layer": 2},
    "u-shaped": {"cut_layer": [2, 5], "labels": "client"},
    "several servers in a row": {"cut_layer": [2, 5]},
    "a cut per client": {"cut_layer": [[2, 5, 6]]},
    "a cut per client, u-shaped": {"cut_layer": [[0, 1], 6], "labels": "client"},
    "dropout at the clients": {"net": tiny_network, "cut_layer": 5},
    "dropout at the server": {"net": tiny_network, "cut_layer": 3},
}
# The rest of the product shows nothing new.
CASES = [
    *((name, "vanilla") for name in RUNS),
    *((name, "u-shaped") for name in RUNS if name != "server first"),
    *product(["round robin", "splitfed v1", "parallel"], list(SHAPES)[2:]),
]


@pytest.mark.parametrize("num_sites", [3, 2])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_weights_are_those_of_one_process(tmp_path, name, shape, num_sites):
    make_protocol, options = RUNS[name]

    def make(engine=None):
        torch.manual_seed(2)
        shaped = {**SHAPES[shape], "engine": engine}
        net = shaped.pop("net", network)()
        protocol = make_protocol(**options)
        if protocol.unsplit_at:
            return protocol, make_unsplit(net, engine=engine)
        return protocol, make_split(net=net, **shaped)

    check(tmp_path, make, make_data, num_sites)


class SpoiledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class SpoilsSome(nn.Module):
    """Spoils the gradients of some batches in training."""

    def forward(self, values):
        is_spoiled = int(1000 * values.max().item()) % 3 == 0
        return SpoiledGradient.apply(values) if is_spoiled else values


@pytest.mark.parametrize("position", [1, 6])
@pytest.mark.parametrize("shape", ["vanilla", "u-shaped"])
@pytest.mark.parametrize("name", ["round robin", "splitfed v1", "parallel"])
def test_steps_with_spoiled_gradients_are_left_out(tmp_path, name, shape, position):
    """Whether they are the client's or the server's, no party steps."""
    make_protocol, options = RUNS[name]

    def make(engine=None):
        net = network()
        net[position] = nn.Sequential(net[position], SpoilsSome())
        made = make_split(net=net, non_finite="skip", engine=engine, **SHAPES[shape])
        return make_protocol(**options), made

    module = check(tmp_path, make, make_data, 3)
    assert 0 < module.skipped_batches < 20


@pytest.mark.parametrize("route", ["server", "U"])
@pytest.mark.parametrize("name", ["round robin", "splitfed v1", "parallel"])
def test_holders_at_sites_of_their_own(tmp_path, name, route):
    make_protocol, options = RUNS[name]

    def make(engine=None):
        torch.manual_seed(2)
        return make_protocol(**options), vertical.made(route=route, engine=engine)

    check(tmp_path, make, vertical.make_data, 6)


@pytest.mark.parametrize("route", ["server", "U"])
def test_holders_that_lack_samples(tmp_path, route):
    """What they send has as many rows as they have samples, or none."""

    def make(engine=None):
        torch.manual_seed(2)
        net = vertical.network("halves", "mean", "skip")
        module = vertical.made(net, route, engine=engine)
        return RoundRobinWeightPassing(), module

    make_data = partial(vertical.make_data, lack=0.5, batch_size=3)
    check(tmp_path, make, make_data, 6)


def check(tmp_path, make, make_data, num_sites):
    """Compares a run with parties at sites to one in this process."""

    def make_site(_):
        protocol, module = make()
        data = make_data(protocol=protocol)
        num_hosted = -(-data.num_clients // num_sites)
        data.prepare_data()
        data.setup("fit")
        return module.as_site(data, protocol, num_hosted), partial(module.hello, data)

    protocol, module = make()
    here = fit(tmp_path, module, make_data(protocol=protocol))
    sites = SitesHere(make_site, num_sites)
    protocol, remote = make(Engine(sites=sites))
    data = make_data(protocol=protocol)
    data.source = None  # the process with the Trainer has no data
    away = fit(tmp_path, remote, data)
    assert len(sites.parties) >= 3
    assert remote.totals() == module.totals()
    for store, other in zip(module.engine.stores, remote.engine.stores, strict=True):
        assert set(other.names()) == set(store.names())
        for own in [*store.names(), *(f"{role}/0" for role in store.roles)]:
            if own in store.names() or any(store.common.values()):
                assert_equal(other.weights_of(own), store.weights_of(own))
    for key, value in here.callback_metrics.items():
        torch.testing.assert_close(away.callback_metrics[key], value, msg=key)
    assert remote.skipped_batches == module.skipped_batches
    return module


REFUSED = {
    "a cohort": (GPSL, {}, {}, "step one state together"),
    "a mean of each step": (
        ParallelSplitLearning,
        {"every": "step"},
        {},
        "step one state together",
    ),
    "several in flight": (
        AsynchronousWeightPassing,
        {"in_flight": 2},
        {},
        "`in_flight` to be 1",
    ),
    "no client": (Centralized, {}, {}, "no client computes"),
    "a picture of labels": (
        RoundRobinWeightPassing,
        {},
        {"callbacks": [PartitionPicture()]},
        "PartitionPicture looks at what stays with the clients",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_one_process_is_refused(tmp_path, case):
    make_protocol, options, others, message = REFUSED[case]
    protocol = make_protocol(**options)
    make = make_unsplit if protocol.unsplit_at else make_split
    engine = Engine(sites=SitesHere(lambda _: (None, None), 1))
    data = make_data(protocol=protocol)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, make(engine=engine), data, **others)


def test_a_site_computes_on_its_device(tmp_path):
    """On `meta`, which has no numbers: a tensor elsewhere ends a pass."""
    protocol, module = RoundRobinWeightPassing(), make_split(cut_layer=2)
    data = make_data(protocol=protocol)
    data.prepare_data()
    data.setup("fit")
    site = module.as_site(data, protocol, 1, torch.device("meta"))
    answers = Answers(site, Journal(tmp_path))
    samples = SampleRef("train", 0, 1, 0, 0, 0, 6)
    (smashed,), _ = site.forward("client/1", (1, 0), (samples,), False)
    slope = torch.ones(smashed.shape)
    answers._carry_out("backward", ("client/1", (1, 0), (slope,)))
    (labels,) = site.labels(samples)
    gradients = [p.grad for p in site.parties["client/1"].parameters()]
    assert gradients
    assert {t.device.type for t in (smashed, labels, *gradients)} == {"meta"}
    own = site.read("client/1", 0, "parameters")
    cpu = {key: torch.zeros(value.shape) for key, value in own.items()}
    answers._carry_out("share", (0, "client", "parameters", cpu))
    answers._carry_out("adopt", ("client/2", 0, "parameters"))
    test = replace(samples, part="test")
    (outputs,) = site.evaluate(0, "client/2", (test,), False)
    assert outputs.device.type == "meta"
