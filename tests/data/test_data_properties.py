"""What holds of partitions, schedules and loaders whatever the sizes."""

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import RandomImages
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import assume, event, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from split_lightning.data import (
    ClientBatchSampler,
    ClientLoader,
    RoundRobinSchedule,
    SplitDataModule,
    partition,
)

CONF = Path(__file__).parents[2] / "conf" / "data" / "partitioner"
# Those that deal all samples out by the number of clients alone; others are tested in
# `test_partition.py`.
PARTITIONERS = [
    "dirichlet",
    "dirichlet_01",
    "exponential",
    "iid",
    "linear",
    "pathological",
    "shards",
    "square",
]
# How these share N samples out: client k's part of them, before rounding down.
SHARES = {
    "linear": lambda k: k + 1,
    "square": lambda k: (k + 1) ** 2,
    "exponential": lambda k: torch.e**k,
}
REFUSED = "Partitioner (cannot deal|leaves client|gives)|out of range|but .* loses"
SEEDS = st.integers(0, 2**32 - 1)


@cache
def composed(name):
    """What a file of the configuration says, with those that it builds on."""
    with initialize_config_dir(str(CONF.parents[1]), version_base="1.3"):
        cfg = compose("train", [f"data/partitioner={name}"])
    return OmegaConf.to_container(cfg.data.partitioner, resolve=False)


def partitioner_of(name, seed):
    """Makes what a file of the configuration names."""
    return instantiate(OmegaConf.create({"seed": seed, "it": composed(name)}).it)


def must_be_dealt_out(name, num_samples, num_clients):
    """Tells whether a partitioner has no reason to refuse these sizes."""
    if name == "iid":
        return num_clients <= num_samples
    if name == "shards":  # two each, of a size that is rounded up
        size = -(-num_samples // (2 * num_clients))
        return size * (2 * num_clients - 1) < num_samples
    if name in SHARES:
        shares = [SHARES[name](k) for k in range(num_clients)]
        return min(int(num_samples * s / sum(shares)) for s in shares) > 0
    return False  # random, or it needs certain labels


@st.composite
def label_sets(draw):
    """Labels of up to 200 samples, some classes frequent, some rare or absent."""
    weights = draw(st.lists(st.integers(0, 9), min_size=1, max_size=10))
    assume(sum(weights))
    size, seed = draw(st.integers(1, 200)), draw(SEEDS)
    drawn = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(weights).float(), size, True, generator=drawn)


@pytest.mark.parametrize("name", PARTITIONERS)
@given(labels=label_sets(), num_clients=st.integers(1, 20), seed=SEEDS)
def test_every_sample_belongs_to_exactly_one_client(name, labels, num_clients, seed):
    def deal_out():
        return partition(labels, partitioner_of(name, seed)(num_clients))

    try:
        parts = deal_out()
    except ValueError:
        event("refused")
        assert not must_be_dealt_out(name, len(labels), num_clients)
        with pytest.raises(ValueError, match=REFUSED):
            deal_out()
        return
    assert len(parts) == num_clients
    assert all(map(len, parts))
    dealt = Counter(torch.cat(parts).tolist())
    assert dealt == Counter(range(len(labels)))
    again = deal_out()
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@given(
    num_train=st.integers(1, 80),
    num_clients=st.integers(1, 12),
    val_share=st.floats(0, 1, exclude_max=True),
    seed=SEEDS,
    data=st.data(),
)
def test_validation_shares_are_disjoint(num_train, num_clients, val_share, seed, data):
    assume(num_clients <= num_train)
    name = data.draw(st.sampled_from(["iid", "dirichlet"]))

    def deal_out():
        made = SplitDataModule(
            RandomImages(num_train),
            num_clients,
            partitioner_of(name, 0),
            val_share=val_share,
            seed=seed,
        )
        made.setup("fit")
        return made

    try:
        dealt = deal_out()
    except ValueError:
        with pytest.raises(ValueError, match=f"val_share|{REFUSED}"):
            deal_out()
        return
    owned = zip(dealt.parts, dealt.val_parts, strict=True)
    for kept, held_out in owned:
        assert len(kept) >= 1
        total = len(kept) + len(held_out)
        assert len(held_out) == min(round(total * val_share), total - 1)
    everything = torch.cat([*dealt.parts, *dealt.val_parts])
    assert Counter(everything.tolist()) == Counter(range(num_train))
    again = deal_out()
    for ours, theirs in (
        (dealt.parts, again.parts),
        (dealt.val_parts, again.val_parts),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@given(
    num_clients=st.integers(1, 50),
    share=st.none() | st.integers(1, 50),
    shuffle=st.booleans(),
    seed=SEEDS,
    rounds=st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
)
def test_turns_are_a_function_of_seed_and_round(
    num_clients, share, shuffle, seed, rounds
):
    schedule = RoundRobinSchedule(shuffle, share)
    if share is not None and share > num_clients:
        with pytest.raises(ValueError, match="clients_per_round"):
            schedule.turns(num_clients, rounds[0], seed)
        return
    turns = {r: schedule.turns(num_clients, r, seed) for r in rounds}
    for round_index, clients in turns.items():
        assert len(clients) == (share or num_clients)
        assert len(set(clients)) == len(clients)
        assert set(clients) <= set(range(num_clients))
        if not shuffle:
            assert clients == sorted(clients)
        torch.manual_seed(round_index)  # the global state does not matter
        new = RoundRobinSchedule(shuffle, share)  # nor what was asked before
        assert new.turns(num_clients, round_index, seed) == clients


@given(seed=SEEDS)
def test_shuffled_turns_differ(seed):
    """Fifty clients in the same order twice: once in 10^64 draws."""
    schedule = RoundRobinSchedule(shuffle=True)
    orders = [schedule.turns(50, r, s) for r in range(3) for s in (seed, seed + 1)]
    assert len(set(map(tuple, orders))) == 6


@st.composite
def samplers(draw):
    """Samplers of any partition, schedule and batch size, as a way to make them."""
    sizes = draw(st.lists(st.integers(1, 15), min_size=1, max_size=5))
    indices = torch.randperm(
        sum(sizes), generator=torch.Generator().manual_seed(draw(SEEDS))
    )
    schedule = RoundRobinSchedule(
        draw(st.booleans()), draw(st.none() | st.integers(1, len(sizes)))
    )
    batch_size, local_epochs = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    seed, repeat_round = draw(SEEDS), draw(st.booleans())
    parts = list(torch.split(indices, sizes))
    return lambda: ClientBatchSampler(
        parts, schedule, batch_size, local_epochs, seed, repeat_round
    )


@given(make=samplers(), round_index=st.integers(0, 1000))
def test_a_round_is_each_clients_passes_in_turn(make, round_index):
    sampler = make()
    sampler.set_epoch(round_index)
    plans = list(sampler)
    assert len(plans) == len(sampler)
    expected = []
    for client_id in sampler.turns():
        size, full = len(sampler.partition[client_id]), sampler.batch_size
        one_pass = [full] * (size // full) + [size % full] * (size % full > 0)
        turn = [(client_id, n, False) for n in one_pass * sampler.local_epochs]
        expected += [*turn[:-1], (*turn[-1][:2], True)]
    assert [(p.client_id, len(p.indices), p.ends_turn) for p in plans] == expected
    for client_id in sampler.turns():
        own = torch.cat([p.indices for p in plans if p.client_id == client_id])
        part = sampler.partition[client_id].sort()[0]
        for one_pass in own.split(len(part)):  # each pass: each sample once
            assert torch.equal(one_pass.sort()[0], part)
    assert len({p.seed for p in plans}) == len(plans)


@given(make=samplers(), rounds=st.lists(st.integers(0, 50), min_size=3, max_size=3))
def test_a_length_that_is_told_is_that_of_every_round(make, rounds):
    loader = ClientLoader(RandomImages(75).load(True), make(), torch.Tensor.float)
    lengths = []
    for round_index in rounds:
        loader.sampler.set_epoch(round_index)
        lengths.append(sum(1 for _ in loader))
    try:
        told = len(loader)
    except TypeError:
        event("no length")
        assert loader.sampler.schedule.clients_per_round is not None
        return
    assert lengths == [told] * 3


@given(make=samplers(), round_index=st.integers(0, 100), data=st.data())
def test_from_any_position_the_rest_of_the_round_follows(make, round_index, data):
    images = RandomImages(75).load(True)

    def loader():  # dropout stands for any augmentation at random
        made = ClientLoader(images, make(), torch.Tensor.float, nn.Dropout(0.5))
        made.sampler.set_epoch(round_index)
        return made

    interrupted = loader()
    whole, next_round = list(interrupted), round_index + 1
    interrupted.sampler.set_epoch(next_round)
    following = list(interrupted)
    position = data.draw(st.integers(0, len(whole)), label="position")
    ahead = data.draw(st.integers(0, min(2, len(whole) - position)), label="prefetched")
    interrupted.sampler.set_epoch(round_index)
    batches = iter(interrupted)
    for _ in range(position + ahead):
        next(batches)
    if ahead:
        interrupted.mark_trained(position)

    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    torch.manual_seed(data.draw(SEEDS))  # the global state does not matter
    assert_same(list(resumed), whole[position:])
    resumed.sampler.set_epoch(next_round)
    assert_same(list(resumed), following)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert (one.client_id, one.ends_turn) == (other.client_id, other.ends_turn)
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
