"""Sites that compute at the same time, and what they compute ahead of its step."""

from collections import deque
from concurrent.futures import Future
from copy import deepcopy
from functools import partial

import pytest
import torch
from killing import Kill, Killed
from protocols import assert_equal, fit, make_data, make_split, make_unsplit
from pytorch_lightning import Callback
from test_sites import SitesHere

from split_lightning import (
    Engine,
    FedAvg,
    Local,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
)
from split_lightning.callbacks import ResumeCheckpoint

COMPUTES = {"forward", "begin", "loss", "backward", "step"}


class LazySites(SitesHere):
    """Sites that compute nothing before something is waited for.

    Attributes:
        waits: For each wait the sites that have something to compute.
    """

    def __init__(self, make, num_sites):
        own = {"__init__": lambda future: Waited.__init__(future, self)}
        self.future = type("OwnFuture", (Waited,), own)
        super().__init__(make, num_sites)
        self.queues = [deque() for _ in self.made]
        self.waits = []

    def taker(self, number):
        carry_out = super().taker(number)

        def deliver(call):
            future = self.future()
            self.queues[number].append((call, carry_out, future))
            return future

        return deliver

    def wait_for(self, future):
        pending = [{call.method for call, *_ in queue} for queue in self.queues]
        self.waits.append([bool(methods & COMPUTES) for methods in pending])
        while not future.done():
            for queue in self.queues:
                if queue:
                    call, carry_out, reply = queue.popleft()
                    reply.set_result(carry_out(call).result())


class Waited(Future):
    """A future that notes that it is waited for."""

    def __init__(self, sites):
        super().__init__()
        self.sites = sites

    def result(self, timeout=None):
        if not self.done():
            self.sites.wait_for(self)
        return super().result()


class KeptSites(SitesHere):
    """Sites that return to the state that they kept."""

    kept = ()

    def taker(self, number):
        carry_out = super().taker(number)

        def deliver(call):
            if call.method != "keep":
                return carry_out(call)
            done = Future()
            done.set_result(deepcopy(self.made[number].state_dict()))
            return done

        return deliver

    def keep(self):
        self.kept = [site.call("keep", "here").result() for site in self.sites]
        return dict.fromkeys([site.name for site in self.sites], "here")

    def begin(self, barrier):
        for own, remote, state in zip(self.made, self.sites, self.kept, strict=False):
            remote.reset()
            own.load_state_dict(deepcopy(state))


def made(make_protocol, engine=None, **options):
    torch.manual_seed(2)
    protocol = make_protocol()
    module = (make_unsplit if protocol.unsplit_at else make_split)(engine=engine)
    return module, make_data(4, protocol, **options)


def with_sites(make_protocol, make_sites=SitesHere, **options):
    """Returns sites, and a module whose clients are there."""

    def make_site(_):
        module, data = made(make_protocol, **options)
        data.prepare_data()
        data.setup("fit")
        site = module.as_site(data, data.protocol, num_hosted=2)
        return site, partial(module.hello, data)

    sites = make_sites(make_site, 2)
    return sites, *made(make_protocol, Engine(sites=sites), **options)


OVERLAPS = {
    RoundRobinWeightPassing: False,  # each turn begins from the weights of the last
    ParallelSplitLearning: True,
    SplitFedV1: True,
    SplitFedV2: True,
    FedAvg: True,
    Local: True,
}


@pytest.mark.parametrize("make_protocol", OVERLAPS)
def test_which_protocols_have_sites_compute_at_once(
    tmp_path, monkeypatch, make_protocol
):
    sites, module, data = with_sites(make_protocol, LazySites)
    monkeypatch.setattr("split_lightning.pending.Future", sites.future)
    fit(tmp_path, module, data, rounds=2)
    assert any(map(all, sites.waits)) == OVERLAPS[make_protocol]


class Reader(Callback):
    """Keeps all clients' networks after each batch."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, *unused):
        networks = [
            {f"{client} {k}": v.clone() for k, v in layers.state_dict().items()}
            for client in range(4)
            for layers in pl_module.segments(client).values()
        ]
        self.found.append({k: v for own in networks for k, v in own.items()})


@pytest.mark.parametrize("make_protocol", OVERLAPS)
def test_states_are_those_of_no_later_step(tmp_path, make_protocol):
    readers = Reader(), Reader()
    module, data = made(make_protocol)
    fit(tmp_path, module, data, [readers[0]])
    _, module, data = with_sites(make_protocol)
    fit(tmp_path, module, data, [readers[1]])
    for expected, found in zip(*(own.found for own in readers), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("make_protocol", [SplitFedV1, SplitFedV2, Local])
@pytest.mark.parametrize("batches", [3, 6])
def test_a_step_that_does_not_come_is_taken_back(tmp_path, make_protocol, batches):
    """Rounds end where the next turn has begun; nothing looks at states between."""
    options = {"val_share": 0.0}  # three batches for each client
    expected, data = made(make_protocol, **options)
    fit(tmp_path, expected, data, rounds=5, limit_train_batches=batches)
    _, module, data = with_sites(make_protocol, **options)
    fit(tmp_path, module, data, rounds=5, limit_train_batches=batches)
    assert_same_networks(module, expected)


@pytest.mark.parametrize("make_protocol", [SplitFedV1, SplitFedV2, FedAvg, Local])
def test_a_run_resumes_where_a_step_has_begun(tmp_path, make_protocol):
    expected, data = made(make_protocol)
    fit(tmp_path, expected, data)
    last = tmp_path / "checkpoints" / "last.ckpt"
    resume = ResumeCheckpoint(last.parent, every_n_batches=1)
    sites, module, data = with_sites(make_protocol, KeptSites)
    with pytest.raises(Killed):
        fit(tmp_path, module, data, [resume, Kill(10)])  # a turn has two batches
    again, module, data = with_sites(make_protocol, KeptSites)
    again.kept = sites.kept
    fit(tmp_path, module, data, [resume], ckpt_path=last)
    assert_same_networks(module, expected)


@pytest.mark.parametrize("make_protocol", [FedAvg, Local])
def test_clients_with_whole_networks_train_at_once(
    tmp_path, monkeypatch, make_protocol
):
    """Where turns are short, sites have steps of several clients before one ends."""
    sites, module, data = with_sites(partial(make_protocol, local_steps=1), LazySites)
    monkeypatch.setattr("split_lightning.pending.Future", sites.future)
    longest = []
    wait_for = sites.wait_for

    def note(future):
        longest.append([sum(c.method == "step" for c, *_ in q) for q in sites.queues])
        wait_for(future)

    sites.wait_for = note
    fit(tmp_path, module, data, rounds=2)
    assert any(min(steps) >= 2 for steps in longest)  # by then, at each of two sites


def assert_same_networks(module, expected):
    for client in range(4):
        found = module.segments(client)
        for role, layers in expected.segments(client).items():
            assert_equal(found[role].state_dict(), layers.state_dict())
