"""Parties at other sites train to the same weights as in one process, bit for bit."""

from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from protocols import assert_equal, fit, make_data, make_split, make_unsplit

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
from split_lightning.engines.remote import RemoteSite, SampleRef, Sites
from split_lightning.message import role_of
from split_lightning.placement import client_of


def on_the_wire(value):
    """A copy, of which nothing but what it says is left."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: on_the_wire(own) for key, own in value.items()}
    if isinstance(value, SampleRef):
        return replace(value, labels=None)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_the_wire, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(on_the_wire, value))
    return value


class SitesHere(Sites):
    """Sites in this process, each with a module and data of its own."""

    def __init__(self, make, num_sites):
        self.made = [make() for _ in range(num_sites)]
        self.sites = [RemoteSite(f"site {n}", self.taker(n)) for n in range(num_sites)]

    def taker(self, number):
        def deliver(call):
            future, arguments = Future(), on_the_wire(call.arguments)
            reply = getattr(self.made[number], call.method)(*arguments)
            future.set_result(on_the_wire(reply))
            return future

        return deliver

    def of(self, party):
        if role_of(party) != "client":
            return None
        return self.sites[client_of(party) % len(self.sites)]


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
}


@pytest.mark.parametrize("num_sites", [3, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RUNS)
def test_weights_are_those_of_one_process(tmp_path, name, shape, num_sites):
    make_protocol, options = RUNS[name]

    def make(engine=None):
        protocol = make_protocol(**options)
        if protocol.unsplit_at:
            return protocol, make_unsplit(engine=engine)
        return protocol, make_split(**SHAPES[shape], engine=engine)

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
    assert remote.totals() == module.totals()
    for store, other in zip(module.engine.stores, remote.engine.stores, strict=True):
        assert set(other.names()) == set(store.names())
        for own in [*store.names(), *(f"{role}/0" for role in store.roles)]:
            if own in store.names() or any(store.common.values()):
                assert_equal(other.weights_of(own), store.weights_of(own))
    for key, value in here.callback_metrics.items():
        torch.testing.assert_close(away.callback_metrics[key], value, msg=key)
