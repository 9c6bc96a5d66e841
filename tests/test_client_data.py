"""Clients with data sets of their own: the server learns sizes, and no more."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import test_vertical as vertical
import torch
from conftest import RandomImages
from protocols import assert_close, batches_of, make_split, network, state_of
from pytorch_lightning import Trainer
from test_sites import SitesHere
from torch import nn
from torch.nn.functional import cross_entropy

from split_lightning import Engine, RoundRobinWeightPassing, SplitDataModule
from split_lightning.data.sources import Images
from split_lightning.engines.hello import ClientData, Hello, require_alike

SGD = partial(torch.optim.SGD, lr=0.05)
COUNTS = [14, 30, 21]  # samples of each client, of which it validates on some


class Own(RandomImages):
    """The data set of one client."""

    def __init__(self, client_id, **changed):
        super().__init__()
        self.client_id = client_id
        vars(self).update(changed)

    def load(self, train):
        drawn = torch.Generator().manual_seed(10 * self.client_id + train)
        count = COUNTS[self.client_id] if train else 5 + self.client_id
        inputs = torch.rand(count, *self.shape, generator=drawn)
        targets = torch.randint(0, 3, (count,), generator=drawn)
        return Images(inputs, targets)


def data_of(client_id, source=None):
    source = source or Own(client_id)
    data = SplitDataModule(source, 3, batch_size=6, val_share=0.2, seed=3)
    data.sole_client = client_id
    return data


def run(tmp_path, sources=None, rounds=2):
    """Trains with each client's data at its own site, and none at the server."""

    def make_site(number):
        protocol = RoundRobinWeightPassing()
        module = make_split(net=network(norm=False), optimizer=SGD)
        data = data_of(number, sources and sources[number])
        data.prepare_data()
        data.setup("fit")
        return module.as_site(data, protocol, 1), partial(module.hello, data)

    engine = Engine(sites=SitesHere(make_site, 3))
    module = make_split(net=network(norm=False), optimizer=SGD, engine=engine)
    data = SplitDataModule(None, 3, batch_size=6, val_share=0.2, seed=3)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[RoundRobinWeightPassing()],
    )
    trainer.fit(module, datamodule=data)
    return trainer, module, data


def test_weights_are_those_of_a_plain_loop(tmp_path):
    trainer, module, data = run(tmp_path)
    net = network(norm=False)
    optimizer = SGD(net.parameters())
    for round_index in range(2):
        for client_id in range(3):
            for step in batches_of(data_of(client_id), round_index):
                for owner, inputs, targets in step:
                    assert owner == client_id  # the others have nothing
                    optimizer.zero_grad()
                    cross_entropy(net(inputs), targets).backward()
                    optimizer.step()
    assert_close(state_of(module), dict(net.state_dict()))
    right = count = 0
    for client_id in range(3):
        own = data_of(client_id)
        own.setup("test")
        for inputs, targets in own.test_dataloader():
            right += int((net(inputs).argmax(1) == targets).sum())
            count += len(targets)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    assert count == 5 + 6 + 7
    assert metrics["test/accuracy"] == pytest.approx(right / count)


def test_data_that_differ_are_refused(tmp_path):
    sources = [Own(0), Own(1, classes=("a", "b", "d")), Own(2)]
    with pytest.raises(ValueError, match=r"the same `classes`.*client 0.*client 1"):
        run(tmp_path, sources)


SAID = ClientData(1, 3, 1, 2, True, (1, 6, 6), True, ("a", "b"), 0)


def test_holders_of_a_client_have_the_same_samples():
    with pytest.raises(ValueError, match=r"holders of a client to train on the same"):
        require_alike([SAID, SAID._replace(client_id=2), SAID._replace(train=4)])
    common = SAID._replace(is_own=False)
    with pytest.raises(ValueError, match=r"`data/partitioner`, .*client 1 has 0"):
        require_alike([common, common._replace(partition=1)])


@pytest.mark.parametrize(
    "changed",
    [
        {"train": -1},
        {"train": 1.5},
        {"train": True},
        {"train": 10**13},  # more than the server has memory for
        {"shape": [1, 6]},
        {"shape": ("1",)},
        {"classes": (1,)},
        {"is_own": 1},
        {"partition": None},
        {"more": 1},
    ],
)
def test_a_hello_that_is_none_is_refused(changed):
    plain = Hello({}, [SAID]).plain()
    assert Hello.of(plain, {}).data == [SAID]
    plain["data"][0].update(changed)
    with pytest.raises(ValueError, match=next(iter(changed)).replace("more", "words")):
        Hello.of(plain, {})


# What must agree


class Flip(nn.Module):
    """An augmentation with an option."""

    def __init__(self, p):
        super().__init__()
        self.p = p


def dropping(p):
    return nn.Sequential(*network(norm=False)[:2], nn.Dropout(p), *network()[2:])


ADAM = partial(torch.optim.Adam, lr=0.05)
FALLING = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
DIFFERENT = [
    ("client_optimizer", {"optimizer": ADAM}, {}),
    ("client_optimizer", {"optimizer": partial(SGD, momentum=0.9)}, {}),
    ("client_scheduler", {"client_scheduler": FALLING}, {}),
    ("gradient_clip_val", {"gradient_clip_val": 0.001}, {}),
    ("gradient_clip_algorithm", {"gradient_clip_algorithm": "value"}, {}),
    ("accumulate_grad_batches", {"accumulate_grad_batches": 2}, {}),
    ("non_finite", {"non_finite": "skip"}, {}),
    ("criterion", {"criterion": WEIGHTED}, {}),
    ("network", {"net": dropping(0.3)}, {}),
    ("mean", {}, {"mean": (0.4,)}),
    ("std", {}, {"std": (0.4,)}),
    ("augmentation", {}, {"augmentation": Flip(0.4)}),
    ("batch_size", {}, {"batch_size": 7}),
]


def agreed(options=None, of_data=None):
    torch.manual_seed(0)
    module = make_split(**{"net": dropping(0.2), "optimizer": SGD} | (options or {}))
    data = {"batch_size": 6, "augmentation": Flip(0.5)} | (of_data or {})
    return module.agreed(SplitDataModule(None, 3, **data))


@pytest.mark.parametrize(("key", "options", "of_data"), DIFFERENT)
def test_what_changes_the_weights_must_agree(key, options, of_data):
    """A client that computes in another way is refused, and the key is named."""
    plain = Hello(agreed(options, of_data), [SAID]).plain()
    with pytest.raises(ValueError, match=f"its `{key}` differs from the server's"):
        Hello.of(plain, agreed())


@pytest.mark.parametrize("make", [make_split, vertical.made])
def test_holders_agree_on_the_rows_that_they_validate_on(make):
    """A client that is one party chooses by itself."""
    found = [
        make().agreed(SplitDataModule(None, 3, val_share=share)) for share in (0.1, 0.2)
    ]
    assert (found[0] == found[1]) == (make is make_split)


PROBE = "from test_client_data import agreed; print(agreed())"


def test_what_must_agree_is_the_same_in_another_process():
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(agreed())
