"""`SplitDataModule`: what is dealt out, in which order, and how it is normalised."""

from functools import partial

import pytest
import torch
from conftest import RandomImages
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    LinearPartitioner,
    PathologicalPartitioner,
)
from torch import nn

from split_lightning import RoundRobinWeightPassing
from split_lightning.data import DigitsImages, SplitDataModule
from split_lightning.data.shards import EvenShardPartitioner


def make(num_clients=4, protocol=None, **options):
    data = SplitDataModule(RandomImages(), num_clients, **{"batch_size": 5} | options)
    data.protocol = protocol or data.protocol
    data.setup("fit")
    data.setup("test")
    return data


def round_of(loader, round_index):
    loader.set_epoch(round_index)
    return [batch for step in loader for batch in step.parts]


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_each_client_validates_on_a_share_of_its_own_part(alpha):
    skewed = partial(
        DirichletPartitioner, partition_by="label", alpha=alpha, min_partition_size=1
    )
    options = {} if alpha is None else {"partitioner": skewed}
    data, whole = make(val_share=0.2, **options), make(val_share=0.0, **options)
    both = list(zip(data.parts, data.val_parts, strict=True))
    for (kept, held_out), owned in zip(both, whole.parts, strict=True):
        assert sorted([*kept.tolist(), *held_out.tolist()]) == sorted(owned.tolist())
        assert len(held_out) == round(len(owned) * 0.2)
    batches = list(data.val_dataloader())
    assert len(batches) == len(data.val_dataloader())
    for client_id, part in enumerate(data.val_parts):
        own = [batch for batch in batches if batch.client_id == client_id]
        seen = torch.cat([torch.tensor([]), *(batch.targets for batch in own)])
        assert torch.equal(seen, data._train.targets[part])
        assert [b.ends_turn for b in own] == [False] * (len(own) - 1) + [True] * (
            len(own) > 0
        )


@pytest.mark.parametrize("name", ["dirichlet", "pathological", "shards", "linear"])
def test_what_a_client_validates_on_is_like_what_it_trains_on(name):
    """Class by class a random fifth: within five deviations, which none exceeds."""
    made = {
        "dirichlet": partial(DirichletPartitioner, partition_by="label", alpha=0.3),
        "pathological": partial(
            PathologicalPartitioner,
            partition_by="label",
            num_classes_per_partition=2,
            class_assignment_mode="first-deterministic",
        ),
        "shards": partial(EvenShardPartitioner, num_shards_per_partition=2),
        "linear": LinearPartitioner,
    }
    images = RandomImages(num_train=4000, num_classes=5)
    data = SplitDataModule(images, 6, made[name], val_share=0.2)
    data.setup("fit")
    labels = data._train.targets
    for kept, held_out in zip(data.parts, data.val_parts, strict=True):
        val = torch.bincount(labels[held_out], minlength=5).double()
        owned = torch.bincount(labels[kept], minlength=5) + val
        deviation = (owned * 0.2 * 0.8).sqrt()
        assert ((val - owned * 0.2).abs() <= 5 * deviation).all()


def test_a_client_never_validates_on_all_that_it_has():
    data = make(num_clients=58, val_share=0.9)
    assert min(map(len, data.parts)) == 1


def test_no_validation_part():
    data = make(val_share=0.0)
    assert sum(map(len, data.parts)) == 60
    assert data.val_dataloader() == []


def test_a_round_passes_over_each_partition_once():
    data = make(val_share=0.0)
    loader = data.train_dataloader()
    batches = round_of(loader, 0)
    assert len(batches) == len(loader) == 12
    assert [b.client_id for b in batches] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [b.ends_turn for b in batches] == [False, False, True] * 4
    for client_id, part in enumerate(data.parts):
        seen = torch.cat([b.targets for b in batches if b.client_id == client_id])
        owned = data._train.targets[part]
        assert torch.equal(seen.sort()[0], owned.sort()[0])


def test_local_epochs_repeat_the_pass_in_a_new_order():
    batches = round_of(make(local_epochs=2, val_share=0.0).train_dataloader(), 0)
    assert [b.client_id for b in batches[:6]] == [0] * 6
    assert [b.ends_turn for b in batches[:6]] == [False] * 5 + [True]
    first, second = (torch.cat([b.inputs for b in batches[i : i + 3]]) for i in (0, 3))
    assert not torch.equal(first, second)
    assert torch.equal(first.sum(), second.sum())


def test_order_is_a_function_of_seed_round_and_client():
    first, second = (
        round_of(make().train_dataloader(), 0),
        round_of(make().train_dataloader(), 1),
    )
    again = round_of(make().train_dataloader(), 1)
    other_seed = round_of(make(seed=1).train_dataloader(), 0)
    assert not torch.equal(first[0].inputs, second[0].inputs)
    assert not torch.equal(first[0].inputs, other_seed[0].inputs)
    for one, other in zip(second, again, strict=True):
        assert torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("position", [0, 1, 5, 11])
def test_a_position_is_all_there_is_to_resume(position):
    flip = nn.Dropout(0.5)  # stands for any augmentation at random
    loader = make(augmentation=flip, val_share=0.0).train_dataloader()
    whole = round_of(loader, 3)
    loader.set_epoch(3)
    steps = iter(loader)
    for _ in range(position):
        next(steps)
    state = loader.state_dict()

    resumed = make(augmentation=flip, val_share=0.0).train_dataloader()
    resumed.load_state_dict(state)
    torch.manual_seed(99)  # the global state does not matter
    rest = round_of(resumed, 3)
    assert len(rest) == len(whole) - position
    for one, other in zip(whole[position:], rest, strict=True):
        assert torch.equal(one.inputs, other.inputs)
    assert len(round_of(resumed, 4)) == len(whole)


def test_shuffled_turns_and_clients_per_round():
    protocol = RoundRobinWeightPassing(shuffle=True, clients_per_round=3)
    loader = make(protocol=protocol).train_dataloader()
    orders = []
    for round_index in range(20):
        clients = [b.client_id for b in round_of(loader, round_index)]
        orders.append(tuple(dict.fromkeys(clients)))
    assert all(len(set(order)) == 3 for order in orders)
    assert len(set(orders)) > 5
    assert set().union(*orders) == {0, 1, 2, 3}


def test_length_is_only_told_where_it_stays():
    skewed = partial(
        DirichletPartitioner, partition_by="label", alpha=0.5, min_partition_size=1
    )
    some = RoundRobinWeightPassing(clients_per_round=2)
    assert len(make(partitioner=skewed).train_dataloader()) > 0
    loader = make(4, some, partitioner=skewed, batch_size=2).train_dataloader()
    with pytest.raises(TypeError, match="differs"):
        len(loader)


def test_normalisation_is_exact():
    data = make(mean=(0.4,), std=(0.3,))
    inputs, targets = next(iter(data.test_dataloader()))
    expected = (data._test.inputs[:5].float() / 255 - 0.4) / 0.3
    assert torch.equal(inputs, expected)
    assert torch.equal(targets, data._test.targets[:5])
    assert data._train.inputs.dtype == torch.uint8


def test_crop_and_flip_are_drawn_for_each_sample():
    from kornia.augmentation import RandomCrop, RandomHorizontalFlip

    images = RandomImages(num_train=40, num_test=40, shape=(1, 8, 8))
    picture = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    load = images.load
    images.load = lambda train: load(train)._replace(inputs=picture.repeat(40, 1, 1, 1))
    augmentation = nn.Sequential(RandomCrop((8, 8), padding=2), RandomHorizontalFlip())
    data = SplitDataModule(
        images, 1, batch_size=36, val_share=0.1, augmentation=augmentation
    )
    data.setup("fit")
    ((batch,), *_) = next(iter(data.train_dataloader()))
    assert batch.inputs.shape == (36, 1, 8, 8)
    different = {sample.numpy().tobytes() for sample in batch.inputs}
    assert len(different) > 20  # 5 x 5 crops, two ways round
    pixels = set(((torch.arange(64) / 255 - 0.5) / 0.5).tolist())
    kept = {v for v in batch.inputs.flatten().tolist() if v != 0}
    assert all(min(abs(v - p) for p in pixels) < 1e-6 for v in list(kept)[:50])


def test_label_counts_are_of_the_partition():
    data = make(val_share=0.0)
    assert data.label_counts.shape == (4, 3)
    assert torch.equal(data.label_counts.sum(0), torch.bincount(data._train.targets))
    assert data.label_counts.sum(1).tolist() == [len(part) for part in data.parts]


def test_digits_are_the_real_ones():
    train, test = DigitsImages().load(True), DigitsImages().load(False)
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert test.inputs.shape == (360, 1, 8, 8)
    assert train.inputs.dtype == torch.uint8
    assert train.inputs.max() == 255
    assert torch.bincount(test.targets).min() >= 34  # every class alike
    both = {image.numpy().tobytes() for image in test.inputs}
    assert not both & {image.numpy().tobytes() for image in train.inputs}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 0}, "num_clients.*positive.*0"),
        ({"num_clients": 61}, r"num_clients.*at most.*\(60\).*61"),
        ({"val_share": 0.01}, r"val_share.*client's 15.*0.01"),
        ({"batch_size": -1}, "batch_size.*positive.*-1"),
        ({"local_epochs": 0}, "local_epochs.*positive.*0"),
        ({"val_share": 1.0}, r"val_share.*\[0, 1\).*1.0"),
        ({"std": (0.0,)}, "std.*positive"),
        (
            {
                "partitioner": partial(
                    DirichletPartitioner, partition_by="label", alpha=0
                )
            },
            "alpha.*0.*strictly greater than zero",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_more_clients_than_there_are_are_refused():
    some = RoundRobinWeightPassing(clients_per_round=5)
    message = r"clients_per_round.*at most `num_clients` \(4\), but got 5"
    with pytest.raises(ValueError, match=message):
        len(make(protocol=some).train_dataloader())


def test_loaders_need_setup():
    with pytest.raises(RuntimeError, match=r'setup\("fit"\)'):
        SplitDataModule(RandomImages(), 2).train_dataloader()
