"""Partitions: complete, disjoint, seeded, and as skewed as they say."""

from functools import partial

import flwr_datasets.partitioner as flwr
import pytest
import torch

from split_lightning.data import label_counts, partition
from split_lightning.data.shards import EvenShardPartitioner

LABELS = torch.randint(0, 10, (1003,), generator=torch.Generator().manual_seed(0))
PARTITIONERS = {
    "iid": flwr.IidPartitioner,
    "dirichlet": partial(
        flwr.DirichletPartitioner, partition_by="label", alpha=0.5, min_partition_size=1
    ),
    "shards": EvenShardPartitioner,
    "pathological": partial(
        flwr.PathologicalPartitioner,
        partition_by="label",
        num_classes_per_partition=2,
        class_assignment_mode="first-deterministic",
    ),
    "linear": flwr.LinearPartitioner,
    "square": flwr.SquarePartitioner,
    "exponential": flwr.ExponentialPartitioner,
}


TOO_SKEWED = {("exponential", 10), ("exponential", 17), ("square", 17)}


@pytest.mark.parametrize("num_clients", [1, 4, 10, 17])
@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_sample_belongs_to_exactly_one_client(name, num_clients):
    make = PARTITIONERS[name]
    if (name, num_clients) in {("pathological", 1), ("pathological", 4)}:
        with pytest.raises(ValueError, match=r"loses \d+ \(of classes"):
            partition(LABELS, make(num_partitions=num_clients))
        return
    if (name, num_clients) in TOO_SKEWED:
        with pytest.raises(ValueError, match="Partitioner cannot deal 1003 samples"):
            partition(LABELS, make(num_partitions=num_clients))
        return
    parts = partition(LABELS, make(num_partitions=num_clients))
    again = partition(LABELS, make(num_partitions=num_clients))
    assert len(parts) == num_clients
    assert torch.equal(torch.cat(parts).sort()[0], torch.arange(len(LABELS)))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_sizes_and_skew_are_as_said():
    counts = {
        name: label_counts(LABELS, partition(LABELS, make(num_partitions=10)), 10)
        for name, make in PARTITIONERS.items()
        if name != "exponential"
    }
    sizes = {name: count.sum(dim=1) for name, count in counts.items()}
    assert sizes["iid"].max() - sizes["iid"].min() <= 1
    assert (sizes["iid"] >= 100).all()
    expected = 1003 * torch.arange(1, 11) / 55
    assert (sizes["linear"] - expected).abs().max() <= 10
    squares = torch.arange(1, 11) ** 2
    assert (sizes["square"] - 1003 * squares / squares.sum()).abs().max() <= 10
    assert ((counts["pathological"] > 0).sum(dim=1) == 2).all()
    # 20 shards of 51 or fewer, two for each; a shard touches at most two classes.
    assert (sizes["shards"] <= 102).all()
    assert (counts["shards"] > 0).sum(dim=1).max() <= 4
    assert all(count.sum() == 1003 for count in counts.values())


def test_smaller_alpha_is_more_skewed():
    def largest_share(alpha):
        make = PARTITIONERS["dirichlet"]
        counts = label_counts(
            LABELS, partition(LABELS, make(num_partitions=4, alpha=alpha)), 10
        )
        return (counts.max(dim=1)[0] / counts.sum(dim=1)).mean()

    assert largest_share(100.0) < 0.2 < largest_share(0.1)


def test_another_seed_gives_another_partition():
    make = PARTITIONERS["dirichlet"]
    one, other = (partition(LABELS, make(num_partitions=4, seed=s)) for s in (1, 2))
    assert [len(part) for part in one] != [len(part) for part in other]


def test_a_lossy_partitioner_is_refused():
    lossy = flwr.PathologicalPartitioner(12, "label", 1, "random", seed=0)
    with pytest.raises(ValueError, match=r"loses \d+ \(of classes \["):
        partition(LABELS, lossy)
