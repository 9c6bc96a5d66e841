"""Partitions: complete, disjoint, seeded, and as skewed as they say."""

import inspect
from functools import partial

import flwr_datasets.partitioner as flwr
import numpy as np
import pytest
import torch
from datasets import Dataset

from split_lightning.data import Images, SplitDataModule, label_counts, partition
from split_lightning.data.shards import EvenShardPartitioner
from split_lightning.seeding import generator

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


OWNERS = [f"hospital {number}" for number in (LABELS * 7 % 5).tolist()]
AGES = torch.rand(1003, generator=torch.Generator().manual_seed(1)).tolist()


class Hospitals:
    """A data set whose samples have owners and ages."""

    classes = tuple(map(str, range(10)))

    def load(self, train):
        inputs = torch.arange(1003.0)[:, None]
        return Images(inputs, LABELS, {"hospital": OWNERS, "age": AGES})


ALL = {
    "ContinuousPartitioner": {"partition_by": "age", "strictness": 0.5},
    "DirichletPartitioner": {"partition_by": "label", "alpha": 0.5},
    "DistributionPartitioner": {
        "distribution_array": [[1.0, 2.0]] * 10,
        "num_unique_labels_per_partition": 2,
        "partition_by": "label",
        "preassigned_num_samples_per_label": 2,
    },
    "ExponentialPartitioner": {},
    "GroupedNaturalIdPartitioner": {"partition_by": "hospital", "group_size": 2},
    "IdToSizeFncPartitioner": {"partition_id_to_size_fn": np.sqrt},
    "IidPartitioner": {},
    "InnerDirichletPartitioner": {
        "partition_sizes": [503, 300, 200],
        "partition_by": "label",
        "alpha": 0.5,
    },
    "LinearPartitioner": {},
    "NaturalIdPartitioner": {"partition_by": "hospital"},
    "PathologicalPartitioner": {
        "partition_by": "label",
        "num_classes_per_partition": 8,
        "class_assignment_mode": "deterministic",
    },
    "ShardPartitioner": {"partition_by": "label", "num_shards_per_partition": 4},
    "SizePartitioner": {"partition_sizes": [600, 300, 103]},
    "SquarePartitioner": {},
}
NUM_CLIENTS = {"DistributionPartitioner": 10, "NaturalIdPartitioner": 5}


def setup(partitioner, num_clients):
    data = SplitDataModule(Hospitals(), num_clients, partitioner, val_share=0.0)
    data.setup("fit")
    return data


@pytest.mark.filterwarnings("ignore:.*leaves")
@pytest.mark.parametrize("name", ALL)
def test_each_partitioner_gives_its_own_partition(name):
    """As a partial and as an instance: what the library gives by itself."""
    make, options = getattr(flwr, name), ALL[name]
    num_clients = NUM_CLIENTS.get(name, 3)
    takes_number = "num_partitions" in inspect.signature(make).parameters
    number = {"num_partitions": num_clients} if takes_number else {}
    arrays = {k: np.array(v) for k, v in options.items() if k == "distribution_array"}

    # The library alone, on the samples in the order in which they are dealt out.
    drawn = torch.randperm(1003, generator=generator(0, "deal out")).tolist()
    columns = {"label": LABELS.tolist(), "hospital": OWNERS, "age": AGES}
    given = {k: [v[i] for i in drawn] for k, v in columns.items()}
    alone = make(**number, **options | arrays)
    alone.dataset = Dataset.from_dict({**given, "index": drawn})
    expected = [
        sorted(alone.load_partition(k)["index"]) for k in range(alone.num_partitions)
    ]

    instance = make(**number, **options | arrays)
    for form in (partial(make, **options), instance, instance):
        data = setup(form, len(expected))
        assert [sorted(part.tolist()) for part in data.parts] == expected
        assert not instance.is_dataset_assigned()


class OwnPartitioner(flwr.Partitioner):
    """Deals out as a function of the data set and the client says."""

    def __init__(self, deal, num_partitions=3):
        super().__init__()
        self.deal, self._num_partitions = deal, num_partitions

    @property
    def num_partitions(self):
        return self._num_partitions

    def load_partition(self, partition_id):
        return self.deal(self.dataset, partition_id)


def deal_by_another(samples, k):
    another = flwr.IidPartitioner(3)
    another.dataset = samples.sort("label")
    return another.load_partition(k)


@pytest.mark.filterwarnings("ignore:Specifying null_placement")
@pytest.mark.parametrize(
    "deal",
    [
        lambda samples, k: samples.filter(lambda row: row["label"] % 3 == k),
        lambda samples, k: samples.select(range(k, 1003, 3)),
        lambda samples, k: samples.select(i for i in range(1003) if i % 3 == k),
        lambda samples, k: samples.select(np.arange(1003)[::-1]).shard(3, k),
        lambda samples, k: samples.sort("label").shard(3, k),
        lambda samples, k: samples.shuffle(seed=0).shard(3, k, contiguous=False),
        lambda samples, k: samples.sort("label").shuffle(seed=0).shard(3, k),
        lambda samples, k: (
            samples.select(range(1003)).remove_columns("label").shard(3, k)
        ),
        lambda samples, k: samples.select(range(1003)).sort("label").shard(3, k),
        lambda samples, k: samples.shard(3, k).map(lambda row: {"more": row["label"]}),
        deal_by_another,
    ],
)
def test_partitioners_of_ones_own_select_as_the_library_does(deal):
    plain = Dataset.from_dict({"label": LABELS.tolist(), "index": list(range(1003))})
    expected = [sorted(deal(plain, k)["index"]) for k in range(3)]
    parts = partition(LABELS, OwnPartitioner(deal))
    assert [part.tolist() for part in parts] == expected


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "linear"])
def test_a_partition_does_not_copy_each_clients_rows(name, monkeypatch):
    """So that many clients take little time: only a sort may copy all rows, once."""
    copied, select = [], Dataset.select
    monkeypatch.setattr(
        Dataset,
        "select",
        lambda own, *given, **more: copied.append(own) or select(own, *given, **more),
    )
    partition(LABELS, PARTITIONERS[name](num_partitions=30))
    assert len(copied) <= 1


def test_natural_ids_are_who_owns_the_samples():
    data = setup(flwr.NaturalIdPartitioner("hospital"), 5)
    owners = [{OWNERS[place] for place in part.tolist()} for part in data.parts]
    assert owners == [{f"hospital {number}"} for number in range(5)]


@pytest.mark.parametrize(
    "name", ["iid", "IidPartitioner", "linear", flwr.LinearPartitioner]
)
def test_a_partitioner_may_be_a_name_or_a_class(name):
    sizes = [len(part) for part in setup(name, 3).parts]
    assert sizes == ([335, 334, 334] if "iid" in str(name).lower() else [167, 334, 502])


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (partial(flwr.SizePartitioner, partition_sizes=[500, 300, 100]), 103),
        (partial(flwr.ShardPartitioner, partition_by="label", shard_size=100), 3),
    ],
)
def test_samples_that_are_left_out_on_purpose_are_counted(make, left):
    with pytest.warns(UserWarning, match=f"leaves {left} of 1,003 .*samples out"):
        data = setup(make, 3)
    assert sum(map(len, data.parts)) == 1003 - left


@pytest.mark.parametrize(
    ("partitioner", "message"),
    [
        (
            partial(flwr.NaturalIdPartitioner, partition_by="hospital"),
            "`num_clients` to be 5, the number of partitions that NaturalId.*got 3",
        ),
        (
            flwr.NaturalIdPartitioner("hospitl"),
            "`partition_by` of NaturalId.*label, hospital, age.*'hospitl'",
        ),
        (flwr.NaturalIdPartitioner, "partitioner` to have valid.*partition_by"),
        (flwr.SizePartitioner([1000, 500]), "SizePartitioner cannot deal 1003.*1500"),
        (flwr.GroupedNaturalIdPartitioner("hospital", 0), "GroupedNaturalId.*cannot"),
        (flwr.VerticalEvenPartitioner(3), "features. Use topology=vertical"),
        ("vertical_even", "features. Use topology=vertical"),
        ("dirichlett", "`data.partitioner`.*dirichlet, .*'dirichlett'"),
        (3, "`data.partitioner`.*of type int"),
    ],
)
def test_a_partitioner_that_cannot_deal_out_is_refused(partitioner, message):
    with pytest.raises(ValueError, match=message):
        setup(partitioner, 3)


def test_a_partitioner_that_has_a_data_set_is_refused():
    used = flwr.IidPartitioner(3)
    used.dataset = Dataset.from_dict({"label": [0, 1, 2]})
    with pytest.raises(ValueError, match=r"`data.partitioner`.*no data set yet.*Iid"):
        setup(used, 3)
