"""Batches that are too small for BatchNorm: shared out, or refused at setup."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from protocols import SGD, fit, make_data, make_split, make_unsplit, network
from pytorch_lightning import Callback
from split_lightning.data.sampler import ClientBatchSampler

from split_lightning import (
    AsynchronousSplitLightningModule,
    ClientAveraging,
    CycleSplitLightningModule,
    RoundRobinWeightPassing,
    ServerMap,
)
from split_lightning.callbacks import AsynchronousWeightPassing
from split_lightning.data import (
    AsynchronousSchedule,
    Availability,
    ParallelSchedule,
    PooledSchedule,
    RoundRobinSchedule,
)
from split_lightning.protocols.least_batch import LeastBatch

SHALLOW, DEEP = 2, 6  # the layer with one value per channel: server's, clients'
ALL_AT_ONCE = [ClientAveraging(every="step")]


class Seen(Callback):
    """Notes the sizes of each step's parts, by client."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.steps.append({p.client_id: len(p.targets) for p in batch.parts})

    def of_client(self, client_id):
        return [step[client_id] for step in self.steps if client_id in step]


def trained(folder, module, data, callbacks, rounds=1, **options):
    seen = Seen()
    fit(folder, module, data, [*callbacks, seen], rounds=rounds, **options)
    return seen


def uneven(**options):
    """Three clients of 20 samples in batches of 19: 19 and 1."""
    return make_data(**{"batch_size": 19, "val_share": 0.0} | options)


PROTOCOLS = {
    "round robin": (RoundRobinSchedule(), RoundRobinWeightPassing()),
    "short turns": (
        RoundRobinSchedule(local_steps=1, shuffle=True),
        RoundRobinWeightPassing(),
    ),
    "together": (ParallelSchedule(), ClientAveraging(every=1)),
    "on the same weights": (ParallelSchedule(), ClientAveraging(every="step")),
}


@pytest.mark.parametrize("cut_layer", [SHALLOW, DEEP])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_last_two_batches_are_shared_out_evenly(tmp_path, name, cut_layer):
    schedule, passing = PROTOCOLS[name]
    data = uneven(schedule=schedule)
    seen = trained(tmp_path, make_split(cut_layer), data, [passing], rounds=2)
    shares = [10, 10]
    if schedule.acts_together and cut_layer == SHALLOW:
        shares = [19, 1]  # the server sees the samples of all three
    assert [seen.of_client(k) for k in range(3)] == [shares * 2] * 3


def test_asynchronous_clients_share_out_too(tmp_path):
    make = {"client_optimizer": SGD, "server_optimizer": SGD, "num_classes": 3}
    module = AsynchronousSplitLightningModule(network(), SHALLOW, **make)
    data = uneven(schedule=AsynchronousSchedule(in_flight=2))
    seen = trained(tmp_path, module, data, [AsynchronousWeightPassing()])
    assert [seen.of_client(k) for k in range(3)] == [[10, 10]] * 3


def test_an_unsplit_network_shares_out_too(tmp_path):
    data = make_data(batch_size=59, val_share=0.0, schedule=PooledSchedule())
    seen = trained(tmp_path, make_unsplit(), data, [])
    assert seen.steps == [{0: 30}, {0: 30}]


def test_batches_of_two_end_with_one_of_three(tmp_path):
    data = make_data(4, batch_size=2, val_share=0.0)  # 15 each
    seen = trained(tmp_path, make_split(), data, [RoundRobinWeightPassing()], rounds=2)
    assert seen.of_client(3) == [2, 2, 2, 2, 2, 2, 3] * 2


def test_a_server_that_trains_first_shares_out_too(tmp_path):
    """60 samples in the pool of a step, in batches of 59."""
    module = CycleSplitLightningModule(
        network(), SHALLOW, SGD, SGD, 3, server_batch_size=59
    )
    data = uneven(batch_size=20, schedule=ParallelSchedule())
    trained(tmp_path, module, data, [ClientAveraging(every=1)])
    assert [len(b) for b in module._server_batches(60)] == [30, 30]


@pytest.mark.parametrize("batch_norm", ["own", "joint"])
def test_batches_that_are_drawn_from_all_lose_no_sample(tmp_path, batch_norm):
    """Batches of 7 drawn from three: a client often brings one sample."""
    schedule = ParallelSchedule(draw="proportional")
    data = uneven(batch_size=7, schedule=schedule)
    module = make_split(DEEP, batch_norm=batch_norm)
    seen = trained(tmp_path, module, data, ALL_AT_ONCE)
    assert sum((Counter(step) for step in seen.steps), Counter()) == dict.fromkeys(
        range(3), 20
    )
    least = min(size for step in seen.steps for size in step.values())
    assert least == (2 if batch_norm == "own" else 1)


@pytest.mark.parametrize("norm", [True, False])
def test_batches_stay_as_they_are_without_need(tmp_path, norm):
    """BatchNorm on maps of 6 x 6 can train on one sample, and so can GroupNorm."""
    net = network(norm)
    net[6] = torch.nn.Tanh()
    seen = trained(tmp_path, make_split(net=net), uneven(), [RoundRobinWeightPassing()])
    assert seen.of_client(0) == [19, 1]


def test_frozen_batch_norm_needs_no_second_sample(tmp_path):
    net = network()
    net[6].eval()
    seen = trained(
        tmp_path, make_unsplit(net), uneven(num_clients=1, batch_size=59), []
    )
    assert seen.of_client(0) == [59, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 60}, r"at least 2 samples.*`6`.*client 0 has 1 \(60 of 60"),
        ({"batch_size": 1}, r"`batch_size` to be at least 2.*`6`.*got 1"),
    ],
)
@pytest.mark.parametrize("schedule", [RoundRobinSchedule(), ParallelSchedule()])
def test_what_no_sharing_out_can_mend_is_refused(tmp_path, options, message, schedule):
    data = uneven(schedule=schedule, **options)
    callbacks = [ClientAveraging(every=1)]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make_split(DEEP), data, callbacks)


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=5),
    st.integers(2, 9),
    st.integers(1, 2),
    st.sampled_from(
        [
            RoundRobinSchedule(local_steps=2, shuffle=True),
            ParallelSchedule(),
            ParallelSchedule(draw="proportional"),
        ]
    ),
    st.sampled_from([1, 2]),
)
def test_no_batch_is_too_small_and_no_sample_is_lost(
    sizes, size, passes, schedule, own
):
    if not schedule.acts_together:
        own = 2
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    parts = [torch.arange(n) + s for n, s in zip(sizes, starts, strict=True)]
    least = LeastBatch(total=2, own=own)
    sampler = ClientBatchSampler(parts, schedule, size, passes, least=least)
    found = [[len(plan.indices) for plan in step] for step in sampler.plans()]
    assert all(sum(step) >= 2 and min(step) >= own for step in found)
    assert len(found) == len(sampler)
    taken = Counter(
        i for step in sampler.plans() for p in step for i in p.indices.tolist()
    )
    assert taken == dict.fromkeys(range(sum(sizes)), passes)
    whole = ClientBatchSampler(parts, schedule, size, passes)
    if all(len(p.indices) >= 2 for step in whole.plans() for p in step):
        plain = [[len(plan.indices) for plan in step] for step in whole.plans()]
        assert found == plain


def test_rounds_of_clients_that_are_away_and_of_servers_share_out_too(tmp_path):
    away = Availability(absent=0.3, dropout=0.3)
    data = uneven(availability=away, servers=ServerMap(num_servers=3))
    module = make_split(server_map=ServerMap(num_servers=3))
    seen = trained(tmp_path, module, data, [RoundRobinWeightPassing()], rounds=4)
    assert {size for step in seen.steps for size in step.values()} == {10}
