"""A run that was stopped and goes on equals one that was not, bit for bit."""

from functools import partial

import pytest
import torch
from conftest import RandomImages, Recorder, tiny_network
from flwr_datasets import partitioner as partitioners
from killing import Kill, Killed
from kornia.augmentation import RandomHorizontalFlip
from pytorch_lightning import Trainer
from torch import nn

from split_lightning import (
    Centralized,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitFedV2,
    SplitLightningModule,
)
from split_lightning.callbacks import CommunicationMonitor, ResumeCheckpoint
from split_lightning.data.shards import EvenShardPartitioner
from split_lightning.system import Availability

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)
STEP = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
ROUNDS = 3


def make_module(optimizer=SGD, cut_layer=1, **options):
    torch.manual_seed(5)
    network = tiny_network()
    client = None if cut_layer is None else optimizer
    return SplitLightningModule(network, cut_layer, client, optimizer, 3, **options)


def make_data(num_clients=3, **options):
    options = {"batch_size": 7, "val_share": 0.2, "seed": 3} | options
    return SplitDataModule(RandomImages(), num_clients, **options)


PASSING = (RoundRobinWeightPassing,)


def start(
    folder, records, module, data, flow=PASSING, kill=None, ckpt=None, rounds=ROUNDS,
    **options,
):  # fmt: skip
    """Trains; returns all that a checkpoint holds at the end."""
    checkpoint = ResumeCheckpoint(folder, every_n_batches=1)
    callbacks = [CommunicationMonitor(), *(make() for make in flow)]
    if kill is not None:
        callbacks.append(Kill(kill))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=records,
        log_every_n_steps=1,
        callbacks=[*callbacks, checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )
    torch.manual_seed(11)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_same(one, other, path=""):
    """Two trees of containers and tensors are equal, bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, (path, one, other)


def check(tmp_path, make, kills, flow=PASSING, **options):
    """Stops a run at each of several batches; each time it goes on to the same end.

    Args:
        tmp_path: Where to write.
        make: Makes the module and the data.
        kills: The numbers of batches.
        flow: Make the callbacks that weights go by.
        options: Those of the Trainer.
    """
    whole = Recorder()
    end = start(tmp_path / "whole", whole, *make(), flow, **options)
    for kill in kills:
        folder, parts = tmp_path / f"killed after {kill}", Recorder()
        with pytest.raises(Killed):
            start(folder, parts, *make(), flow, kill, **options)
        last = folder / "last.ckpt"
        loops = torch.load(last, weights_only=True)["loops"]["fit_loop"]
        assert loops["epoch_loop.batch_progress"]["total"]["processed"] == kill
        resumed = start(folder, parts, *make(), flow, ckpt=last, **options)
        assert_same(end, resumed)
        assert sorted(parts.records) == sorted(whole.records)  # nothing lost or twice


def check_at_each_step(tmp_path, make, flow, rounds=2):
    """Stops a run after its first step, then again after each further one.

    Args:
        tmp_path: Where to write.
        make: Makes the module and the data.
        flow: Make the callbacks, the protocol first.
        rounds: Number of rounds.
    """
    whole, parts, folder, last = Recorder(), Recorder(), tmp_path / "parts", None
    end = start(tmp_path / "whole", whole, *make(), flow, rounds=rounds)
    total = sum(lengths_of(make()[1], flow[0](), rounds))
    assert total > rounds
    for _ in range(total - 1):
        with pytest.raises(Killed):
            start(folder, parts, *make(), flow, kill=1, ckpt=last, rounds=rounds)
        last = folder / "last.ckpt"
    resumed = start(folder, parts, *make(), flow, ckpt=last, rounds=rounds)
    assert_same(end, resumed)
    assert sorted(parts.records) == sorted(whole.records)  # nothing lost or twice


def lengths_of(data, protocol, rounds=ROUNDS):
    """The numbers of steps of each round."""
    data.protocol = protocol
    data.setup("fit")
    loader, lengths = data.train_dataloader(), []
    for round_index in range(rounds):
        loader.set_epoch(round_index)
        lengths.append(sum(1 for _ in loader.planned()))
    return lengths


@pytest.mark.parametrize(
    "options",
    [{}, *({"optimizer_state": p} for p in ("travel", "reset")), {"enabled": False}],
)
def test_at_any_batch_for_each_policy(tmp_path, options):
    def make():
        return make_module(ADAM), make_data()

    check(tmp_path, make, (1, 9, 15), [partial(RoundRobinWeightPassing, **options)])


SKEWED = {
    "iid": partitioners.IidPartitioner,
    "linear": partitioners.LinearPartitioner,
    "square": partitioners.SquarePartitioner,
    "exponential": partitioners.ExponentialPartitioner,
    "dirichlet": partial(
        partitioners.DirichletPartitioner,
        partition_by="label",
        alpha=0.5,
        min_partition_size=2,
    ),
    "pathological": partial(
        partitioners.PathologicalPartitioner,
        partition_by="label",
        num_classes_per_partition=2,
    ),
    "shards": partial(EvenShardPartitioner, num_shards_per_partition=2),
}


@pytest.mark.parametrize("name", SKEWED)
def test_for_each_partitioner_with_shuffled_turns(tmp_path, name):
    def make():
        return make_module(), make_data(partitioner=SKEWED[name], local_epochs=2)

    check(tmp_path, make, (16,), [partial(RoundRobinWeightPassing, shuffle=True)])


def test_where_rounds_differ_in_length(tmp_path):
    def make():
        partitioner = partitioners.LinearPartitioner
        return make_module(), make_data(partitioner=partitioner)

    some = partial(RoundRobinWeightPassing, shuffle=True, clients_per_round=2)
    check(tmp_path, make, (2, 5, 11, 12), [some])


@pytest.mark.parametrize("protocol", [SplitFedV2, RoundRobinWeightPassing])
def test_where_clients_are_absent_or_drop_out(tmp_path, protocol):
    """Rounds of 9 batches, less those of who is away: from any of them."""
    flow = partial(protocol, shuffle=True, local_steps=2)

    def make():
        availability = Availability(absent=0.3, dropout=0.4)
        return make_module(), make_data(availability=availability)

    lengths = lengths_of(make()[1], flow())
    assert len(set(lengths)) > 1
    ends = [lengths[0] - 1, lengths[0], sum(lengths[:2])]
    check(tmp_path, make, {1, *ends, sum(lengths) - 1} - {0}, [flow])


def test_with_augmentation_accumulation_clipping_and_schedulers(tmp_path):
    def make():
        module = make_module(
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            client_scheduler=STEP,
            server_scheduler=STEP,
            scheduler_interval="batch",
        )
        flip = nn.Sequential(RandomHorizontalFlip(p=0.5))
        return module, make_data(augmentation=flip, batch_size=4)

    check(tmp_path, make, (1, 2, 13))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_unsplit_network(tmp_path, accumulate):
    def make():
        options = {"server_scheduler": STEP, "accumulate_grad_batches": accumulate}
        return make_module(cut_layer=None, **options), make_data(1)

    check(tmp_path, make, (2, 8), [Centralized])


def test_other_data_are_refused(tmp_path):
    start(tmp_path, Recorder(), make_module(), make_data())
    path = tmp_path / "last.ckpt"
    for options, words in (
        ({"seed": 4}, "seed=3.*seed=4"),
        ({"batch_size": 6}, "batch_size=7.*batch_size=6"),
        ({"num_clients": 4}, "num_clients=3.*num_clients=4"),
        ({"partitioner": partitioners.LinearPartitioner}, "partition=.*checksum"),
        (
            {"availability": Availability(0.1)},
            r"absent=0\.0,.*absent=0\.1, dropout=0\.0",
        ),
        (
            {"availability": Availability(dropout=[0, 0, 0.5])},
            r"dropout=0\.0\).*dropout=\(0\.0, 0\.0, 0\.5\)",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            start(
                tmp_path,
                Recorder(),
                make_module(),
                make_data(**options),
                ckpt=path,
            )


def test_another_protocol_or_other_options_of_it_are_refused(tmp_path):
    start(tmp_path, Recorder(), make_module(), make_data())
    for protocol, words in (
        (SplitFedV2, r"protocol=RoundRobinWeightPassing\(.*got protocol=SplitFedV2"),
        (partial(RoundRobinWeightPassing, local_steps=1), "local_steps=None.*steps=1"),
    ):
        with pytest.raises(ValueError, match=words):
            start(tmp_path, Recorder(), make_module(), make_data(), [protocol],
                  ckpt=tmp_path / "last.ckpt")  # fmt: skip


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    end = start(tmp_path, Recorder(), make_module(), make_data())
    del end["format"]
    path = tmp_path / "older.ckpt"
    torch.save(end, path)
    with pytest.raises(ValueError, match=r"of format 2, which .* but got 1"):
        start(tmp_path, Recorder(), make_module(), make_data(), ckpt=path)
