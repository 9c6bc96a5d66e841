"""Batches that are too small for BatchNorm: shared out, or refused at setup."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from protocols import fit, make_data, make_split, make_unsplit, network
from pytorch_lightning import Callback

from split_lightning import (
    GPSL,
    AsynchronousWeightPassing,
    Centralized,
    CycleSL,
    MultiServer,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
)
from split_lightning.protocols import Round
from split_lightning.protocols.least_batch import LeastBatch
from split_lightning.system import Availability

SHALLOW, DEEP = 2, 6  # the layer with one value per channel: server's, clients'


class Seen(Callback):
    """Notes the sizes of each step's parts, by client."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.steps.append({p.client_id: len(p.targets) for p in batch.parts})

    def of_client(self, client_id):
        return [step[client_id] for step in self.steps if client_id in step]


def trained(folder, module, data, rounds=1):
    seen = Seen()
    fit(folder, module, data, [seen], rounds=rounds)
    return seen


def uneven(protocol=None, num_clients=3, **options):
    """Three clients of 20 samples in batches of 19: 19 and 1."""
    options = {"batch_size": 19, "val_share": 0.0} | options
    return make_data(num_clients, protocol, **options)


PROTOCOLS = {
    "round robin": RoundRobinWeightPassing(),
    "short turns": RoundRobinWeightPassing(local_steps=1, shuffle=True),
    "asynchronous": AsynchronousWeightPassing(in_flight=2),
    "together": ParallelSplitLearning(every=1),
    "on one state": ParallelSplitLearning(every="step"),
}


@pytest.mark.parametrize("cut_layer", [SHALLOW, DEEP])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_last_two_batches_are_shared_out_evenly(tmp_path, name, cut_layer):
    protocol = PROTOCOLS[name]
    seen = trained(tmp_path, make_split(cut_layer), uneven(protocol), rounds=2)
    shares = [10, 10]
    if protocol.together and cut_layer == SHALLOW:
        shares = [19, 1]  # the server sees the samples of all three
    assert [seen.of_client(k) for k in range(3)] == [shares * 2] * 3


def test_an_unsplit_network_shares_out_too(tmp_path):
    data = uneven(Centralized(), batch_size=59)
    assert trained(tmp_path, make_unsplit(), data).steps == [{0: 30}, {0: 30}]


def test_batches_of_two_end_with_one_of_three(tmp_path):
    data = uneven(num_clients=4, batch_size=2)  # 15 each
    seen = trained(tmp_path, make_split(), data, rounds=2)
    assert seen.of_client(3) == [2, 2, 2, 2, 2, 2, 3] * 2


def test_a_server_that_trains_first_shares_out_too(tmp_path):
    """60 samples of a step, in batches of 59; then all at once."""
    sizes, module = [], make_split(SHALLOW)
    layer = module.server.get_submodule("6")
    layer.register_forward_hook(lambda layer, inputs, _: sizes.append(len(inputs[0])))
    fit(
        tmp_path, module, uneven(CycleSL(server_batch_size=59), batch_size=20), rounds=1
    )
    assert sizes[-3:] == [30, 30, 60]  # before, the layer was tried out


@pytest.mark.parametrize("joint_norm", [True, False])
def test_batches_that_are_drawn_from_all_lose_no_sample(tmp_path, joint_norm):
    """Batches of 7 drawn from three: a client often brings one sample."""
    data = uneven(GPSL(joint_norm), batch_size=7)
    seen = trained(tmp_path, make_split(DEEP), data)
    assert sum((Counter(step) for step in seen.steps), Counter()) == dict.fromkeys(
        range(3), 20
    )
    least = min(size for step in seen.steps for size in step.values())
    assert least == (1 if joint_norm else 2)


@pytest.mark.parametrize("norm", [True, False])
def test_batches_stay_as_they_are_without_need(tmp_path, norm):
    """BatchNorm on maps of 6 x 6 can train on one sample, and so can GroupNorm."""
    net = network(norm)
    net[6] = torch.nn.Tanh()
    seen = trained(tmp_path, make_split(net=net), uneven())
    assert seen.of_client(0) == [19, 1]


def test_frozen_batch_norm_needs_no_second_sample(tmp_path):
    net = network()
    net[6].eval()
    data = uneven(Centralized(), num_clients=1, batch_size=59)
    seen = trained(tmp_path, make_unsplit(net), data)
    assert seen.of_client(0) == [59, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 60}, r"at least 2 samples.*`6`.*client 0 has 1 \(60 of 60"),
        ({"batch_size": 1}, r"`batch_size` to be at least 2.*`6`.*got 1"),
    ],
)
@pytest.mark.parametrize("name", ["round robin", "together"])
def test_what_no_sharing_out_can_mend_is_refused(tmp_path, options, message, name):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make_split(DEEP), uneven(PROTOCOLS[name], **options))


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=5),
    st.integers(2, 9),
    st.integers(1, 2),
    st.sampled_from(
        [
            RoundRobinWeightPassing(local_steps=2, shuffle=True),
            ParallelSplitLearning(),
            GPSL(),
        ]
    ),
    st.sampled_from([1, 2]),
)
def test_no_batch_is_too_small_and_no_sample_is_lost(
    sizes, batch_size, passes, protocol, own
):
    def sizes_of(least):
        round = Round(0, sizes, batch_size, passes, least=least)
        return [step.parts for step in protocol.steps(round)]

    own = own if protocol.together else 2
    found = sizes_of(LeastBatch(total=2, own=own))
    counts = [[part.num_samples for part in step] for step in found]
    assert all(sum(step) >= 2 and min(step) >= own for step in counts)
    taken = Counter(
        (part.client_id, part.pass_number, part.start + place)
        for step in found
        for part in step
        for place in range(part.num_samples)
    )
    places = [
        (k, p, i) for k, n in enumerate(sizes) for p in range(passes) for i in range(n)
    ]
    assert taken == Counter(places)
    plain = [[part.num_samples for part in step] for step in sizes_of(None)]
    if all(count >= 2 for step in plain for count in step):
        assert counts == plain


def test_rounds_of_clients_that_are_away_and_of_servers_share_out_too(tmp_path):
    away = Availability(absent=0.3, dropout=0.3)
    data = uneven(MultiServer(num_servers=3), availability=away)
    seen = trained(tmp_path, make_split(), data, rounds=4)
    assert {size for step in seen.steps for size in step.values()} == {10}
