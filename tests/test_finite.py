"""A NaN in training stops the run and names its place, or is left out."""

from functools import partial

import pytest
import torch
from conftest import RandomImages, tiny_network
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LambdaCallback
from torch import nn

from split_lightning import (
    Centralized,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
)
from split_lightning.callbacks import ResumeCheckpoint
from split_lightning.finite import NonFiniteError, are_finite

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class SpoiledImages(nn.Module):
    """An augmentation that spoils one batch."""

    def __init__(self, batch):
        super().__init__()
        self.left = batch

    def forward(self, images):
        self.left -= 1
        return images * float("inf") if self.left == 0 else images


class SpoiledLoss(nn.CrossEntropyLoss):
    """Spoils the loss of one training batch, or its gradient alone."""

    def __init__(self, batch, gradient_alone):
        super().__init__()
        self.left, self.gradient_alone = batch, gradient_alone

    def forward(self, logits, targets):
        loss = super().forward(logits, targets)
        self.left -= loss.requires_grad
        if self.left != 0 or not loss.requires_grad:
            return loss
        return Spoil.apply(loss) if self.gradient_alone else loss * float("nan")


SPOILED = {
    "smashed data": lambda batch: {"augmentation": SpoiledImages(batch)},
    "loss": lambda batch: {"criterion": SpoiledLoss(batch, False)},
    "gradient of the smashed data": lambda batch: {
        "criterion": SpoiledLoss(batch, True)
    },
}


def network():
    torch.manual_seed(5)
    layers = list(tiny_network())
    layers[5] = nn.Identity()  # no random numbers
    return nn.Sequential(*layers)


def make_module(centralized=False, **options):
    cut_layer, client = (None, None) if centralized else (4, SGD)
    return SplitLightningModule(network(), cut_layer, client, SGD, 3, **options)


def make_data(num_clients, augmentation=None):
    return SplitDataModule(
        RandomImages(),
        num_clients,
        batch_size=7,
        val_share=0.2,
        augmentation=augmentation,
    )


def steps_of(data):
    data.setup("fit")
    return [step.parts for step in data.train_dataloader()]


def fit(folder, spoiled, num_clients=3, rounds=2, centralized=False, **options):
    data = make_data(num_clients, spoiled.pop("augmentation", None))
    module = make_module(centralized, **spoiled, **options)
    train(module, data, folder, ResumeCheckpoint(folder), rounds=rounds)
    return module


def train(module, data, folder, *callbacks, rounds=2):
    passing = RoundRobinWeightPassing() if module.topology.is_split else Centralized()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=False,
        callbacks=[*callbacks, passing],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)


@pytest.mark.parametrize("what", SPOILED)
def test_a_run_stops_and_keeps_its_last_good_checkpoint(tmp_path, what):
    """Rounds of 9 batches, 3 of each client: the 14th is client 1's second."""
    place = "round 2, client 1, batch 5 of the round"
    with pytest.raises(NonFiniteError, match=f"{place}: the {what}"):
        fit(tmp_path, SPOILED[what](14))
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert all(torch.isfinite(t).all() for t in kept["state_dict"].values())


@pytest.mark.parametrize("party", ["client", "server"])
def test_a_gradient_of_weights_alone_stops_a_run(tmp_path, party):
    """It overflows though all that crosses the cut is finite."""
    data = make_data(3)
    module = make_module()
    weight = next(getattr(module, party).parameters())
    left = [5]

    def spoil(gradient):
        left[0] -= 1
        return gradient * float("inf") if left[0] == 0 else gradient

    weight.register_hook(spoil)
    before = {}

    def keep(trainer, module, batch, batch_idx):
        before.update({n: p.detach().clone() for n, p in module.named_parameters()})

    with pytest.raises(NonFiniteError, match=f"client 1, batch 5 .*: the {party}'s gr"):
        train(module, data, tmp_path, LambdaCallback(on_train_batch_start=keep))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name  # nobody has stepped


@pytest.mark.parametrize("what", ["loss", "gradient of the smashed data"])
def test_the_unsplit_network_stops_too(tmp_path, what):
    with pytest.raises(NonFiniteError, match=r"round 1, client 0, batch 3.*: the"):
        fit(tmp_path, SPOILED[what](3), num_clients=1, centralized=True)


@pytest.mark.parametrize("centralized", [False, True])
@pytest.mark.parametrize("what", SPOILED)
def test_a_skipped_batch_leaves_no_trace(tmp_path, what, centralized):
    """A loop without the library that leaves the batch out ends at the same weights."""
    module = fit(
        tmp_path,
        SPOILED[what](3),
        num_clients=1,
        rounds=1,
        centralized=centralized,
        non_finite="skip",
    )
    assert module.skipped_batches == 1

    plain = network()
    optimizer = SGD(plain.parameters())
    data = make_data(1)
    for number, (batch,) in enumerate(steps_of(data), start=1):
        if number != 3:
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(batch.inputs), batch.targets).backward()
            optimizer.step()
    found = {}
    for segment in module.segments().values():
        found |= segment.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_skipped_batch_takes_its_step_with_it(tmp_path):
    """Of two batches that make a step neither is used, and the next step is whole."""
    module = fit(
        tmp_path,
        SPOILED["loss"](4),
        num_clients=1,
        rounds=1,
        non_finite="skip",
        accumulate_grad_batches=2,
    )
    plain, data = network(), make_data(1)
    optimizer = SGD(plain.parameters())
    batches = [batch for (batch,) in steps_of(data)]
    assert len(batches) == 7
    for window in ((0, 1), (2,), (4, 5), (6,)):
        optimizer.zero_grad()
        for batch in (batches[i] for i in window):
            loss = nn.functional.cross_entropy(plain(batch.inputs), batch.targets)
            (loss / 2).backward()
        if window != (2,):  # seen by BatchNorm, and no more
            optimizer.step()
    found = module.client.state_dict() | module.server.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_skipped_batches_are_counted_over_a_resumption(tmp_path):
    module = fit(tmp_path, SPOILED["loss"](3), non_finite="skip")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert module.skipped_batches == kept["round"]["skipped_batches"] == 1


def test_other_policies_are_refused():
    with pytest.raises(ValueError, match=r"`non_finite`.*'stop', 'skip'.*'ignore'"):
        make_module(non_finite="ignore")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_one_number_among_many_that_is_not_finite(number):
    values = [torch.full((3, 2), 3e38), torch.zeros(5), torch.tensor([4, 5]), None]
    assert are_finite(values)  # finite, and yet too large to be squared
    values[1][3] = number
    assert not are_finite(values)
    assert not are_finite(values[1:])


@pytest.mark.parametrize(("spoiled", "found"), [(2, 5), (6, 9)])
def test_numbers_are_looked_at_now_and_then(tmp_path, spoiled, found):
    """As on a GPU, so that no step waits for it: and at the end of a round of nine."""

    def look_rarely(trainer, module):
        module.finite.every = 5

    rarely = LambdaCallback(on_train_start=look_rarely)
    data = make_data(3, SpoiledImages(spoiled))
    with pytest.raises(NonFiniteError, match=f"batch {found} of the round: the"):
        train(make_module(), data, tmp_path, rarely)
