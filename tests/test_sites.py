"""Parties at other sites train to the same weights as in one process, bit for bit."""

from concurrent.futures import Future
from functools import partial
from itertools import product

import pytest
import test_vertical as vertical
import torch
from conftest import tiny_network
from protocols import assert_equal, fit, make_data, make_split, make_unsplit, network

from split_lightning import (
    AsynchronousWeightPassing,
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
from split_lightning.engines.expected import Expected
from split_lightning.engines.remote import RemoteSite, Sites
from split_lightning.engines.wire import Frame, decoded, encoded
from split_lightning.finite import NotFinite
from split_lightning.message import role_of


class SitesHere(Sites):
    """Sites in this process, each with a module and data of its own.

    What passes is bytes, as on a network.
    """

    def __init__(self, make, num_sites):
        self.made = [make() for _ in range(num_sites)]
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

    def expect(self, shapes):
        self.expected = [Expected(shapes) for _ in self.sites]

    def open(self, parties, agreed, barrier):
        pass

    def keep(self):
        return ""

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
    "splitfed v1, of some": (SplitFedV1, {"clients_per_round": 2}),
    "splitfed v2": (SplitFedV2, {"optimizer_state": "travel"}),
    "splitfed v3": (SplitFedV3, {}),
    "several servers": (MultiServer, {"num_servers": 2, "servers_every": 1}),
    "parallel": (ParallelSplitLearning, {}),
    "asynchronous": (AsynchronousWeightPassing, {"local_steps": 2}),
    "fedavg": (FedAvg, {}),
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
    *product(RUNS, ["vanilla", "u-shaped"]),
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

    def make_site():
        protocol, module = make()
        data = make_data(protocol=protocol)
        data.prepare_data()
        data.setup("fit")
        return module.as_site(data, protocol)

    protocol, module = make()
    here = fit(tmp_path, module, make_data(protocol=protocol))
    sites = SitesHere(make_site, num_sites)
    protocol, remote = make(Engine(sites=sites))
    away = fit(tmp_path, remote, make_data(protocol=protocol))
    assert len(sites.parties) >= 3
    assert remote.totals() == module.totals()
    for store, other in zip(module.engine.stores, remote.engine.stores, strict=True):
        assert set(other.names()) == set(store.names())
        for own in [*store.names(), *(f"{role}/0" for role in store.roles)]:
            if own in store.names() or any(store.common.values()):
                assert_equal(other.weights_of(own), store.weights_of(own))
    for key, value in here.callback_metrics.items():
        torch.testing.assert_close(away.callback_metrics[key], value, msg=key)
