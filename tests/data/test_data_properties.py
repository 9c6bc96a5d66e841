"""What holds of partitions and loaders whatever the sizes."""

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

from split_lightning import GPSL, RoundRobinWeightPassing, SplitFedV1
from split_lightning.cli import config as config  # has the schema of `train.yaml`
from split_lightning.data import SplitDataModule, TrainLoader, partition
from split_lightning.protocols import Round
from split_lightning.system import Availability

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
    """Returns whether a partitioner has no reason to refuse these sizes."""
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


@st.composite
def loaders(draw):
    """Loaders of any partition, protocol and batch size, as a way to make them."""
    sizes = draw(st.lists(st.integers(1, 15), min_size=1, max_size=5))
    indices = torch.randperm(
        sum(sizes), generator=torch.Generator().manual_seed(draw(SEEDS))
    )
    parts = list(torch.split(indices, sizes))
    kind = draw(st.sampled_from([RoundRobinWeightPassing, SplitFedV1, GPSL]))
    protocol = kind(clients_per_round=draw(st.none() | st.integers(1, len(sizes))))
    batch_size, local_epochs = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    seed, repeats = draw(SEEDS), draw(st.booleans())
    availability = draw(st.sampled_from([None, Availability(0.2, 0.4)]))

    def new_round(number):
        return Round(
            number,
            sizes,
            batch_size,
            local_epochs,
            seed,
            availability,
            drawn_as=0 if repeats else None,
        )

    def make(augmentation=None):
        images = RandomImages(75).load(True)
        return TrainLoader(
            images, parts, protocol, new_round, torch.Tensor.float, seed, augmentation
        )

    return make


@given(make=loaders(), number=st.integers(0, 1000))
def test_a_round_has_each_clients_samples_so_often(make, number):
    """As often as it passes over them, but where it drops out; each batch its own."""
    loader = make()
    loader.set_epoch(number)
    round, images = loader.round(), loader.images
    steps = list(loader)
    planned = list(loader.protocol.steps(round))
    assert [step.client_ids for step in steps] == [s.client_ids for s in planned]
    for client, part in enumerate(loader.partition):
        own = [p for step in steps for p in step.parts if p.client_id == client]
        if client in round.dropped or not own:
            continue
        inputs = torch.cat([batch.inputs for batch in own]).split(len(part))
        assert len(inputs) == round.local_epochs
        expected = images.inputs[part].flatten(1).float().sum(1).sort()[0]
        for one_pass in inputs:  # each pass: each sample once
            assert torch.equal(one_pass.flatten(1).sum(1).sort()[0], expected)


@given(make=loaders(), rounds=st.lists(st.integers(0, 50), min_size=3, max_size=3))
def test_a_length_that_is_told_is_that_of_every_round(make, rounds):
    loader, lengths = make(), []
    for number in rounds:
        loader.set_epoch(number)
        lengths.append(sum(1 for _ in loader))
    try:
        told = len(loader)
    except TypeError:
        event("no length")
        may_differ = loader.protocol.clients_per_round is not None
        assert may_differ or not loader.round().availability.is_trivial
        return
    assert lengths == [told] * 3


@given(make=loaders(), number=st.integers(0, 100), data=st.data())
def test_from_any_position_the_rest_of_the_round_follows(make, number, data):
    def loader():  # dropout stands for any augmentation at random
        made = make(nn.Dropout(0.5))
        made.set_epoch(number)
        return made

    interrupted = loader()
    whole = list(interrupted)
    interrupted.set_epoch(number + 1)
    following = list(interrupted)
    position = data.draw(st.integers(0, len(whole)), label="position")
    ahead = data.draw(st.integers(0, min(2, len(whole) - position)), label="prefetched")
    interrupted.set_epoch(number)
    batches = iter(interrupted)
    for _ in range(position + ahead):
        next(batches)
    if ahead:
        interrupted.mark_trained(position)

    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    torch.manual_seed(data.draw(SEEDS))  # the global state does not matter
    assert_same(list(resumed), whole[position:])
    resumed.set_epoch(number + 1)
    assert_same(list(resumed), following)


def assert_same(steps, others):
    assert len(steps) == len(others)
    for step, another in zip(steps, others, strict=True):
        assert (step.before, step.after) == (another.before, another.after)
        for one, other in zip(step.parts, another.parts, strict=True):
            assert (one.client_id, one.ends_turn) == (other.client_id, other.ends_turn)
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.targets, other.targets)
