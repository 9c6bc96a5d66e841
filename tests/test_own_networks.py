"""Networks of users in the Trainer: the unsplit network's numbers, or one line."""

import logging
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import RandomImages
from pytorch_lightning import Trainer
from torch import nn

from split_lightning import (
    Centralized,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
    merge,
)
from split_lightning.models import split

sys.path.append(str(Path(__file__).parent / "models"))
import habits

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class ConvStem(nn.Module):
    """Whose gradient behind `bn` comes back with its dimensions permuted."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.bn(self.conv(x)).permute(0, 2, 3, 1))
        return self.head(x.mean((1, 2)))


class WithHabit(ConvStem):
    """Has a layer that counts its passes in an attribute, and uses the number."""

    def __init__(self):
        super().__init__()
        self.habit = habits.Steps()

    def forward(self, x):
        return self.head(self.habit(self.bn(self.conv(x))).mean((2, 3)))


class Returning(ConvStem):
    """Returns its logits in something else."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


def vision_transformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=6,
        patch_size=3,
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        hidden_dropout_prob=0.1,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def make_data():
    return SplitDataModule(RandomImages(), 1, batch_size=16, val_share=0.2, seed=3)


def fit(module, tmp_path, **options):
    is_split = module.topology.is_split
    options |= {"logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[RoundRobinWeightPassing() if is_split else Centralized()],
        **options,
    )
    torch.manual_seed(11)
    trainer.fit(module, datamodule=make_data())


def trained_by_hand(network):
    data = make_data()
    data.setup("fit")
    loader, optimizer = data.train_dataloader(), SGD(network.parameters())
    torch.manual_seed(11)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for step in loader:
            (_, inputs, targets, *_) = step.parts[0]
            optimizer.zero_grad()
            logits = network(inputs)
            logits = getattr(logits, "logits", logits)
            nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
    return network.state_dict()


@pytest.mark.parametrize(
    ("make", "cut_layer"),
    [
        *((ConvStem, layer) for layer in ("conv", "bn", "norm")),
        *((WithHabit, layer) for layer in ("bn", "habit")),
        *((vision_transformer, f"vit.{k}") for k in ("embeddings", "layers.0")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_trainer_gives_the_weights_of_the_unsplit_network(tmp_path, make, cut_layer):
    torch.manual_seed(5)
    network = make()
    module = SplitLightningModule(network, cut_layer, SGD, SGD, num_classes=3)
    # Without validation: it would count as passes of `WithHabit`, too.
    fit(module, tmp_path, limit_val_batches=0)
    merged, expected = merge(module.client, module.server), trained_by_hand(network)
    assert merged.keys() == expected.keys()
    unequal = [key for key in expected if not torch.equal(merged[key], expected[key])]
    assert not unequal


@pytest.mark.parametrize("key", ["logits", "other"])
@pytest.mark.parametrize("is_split", [True, False], ids=["split", "unsplit"])
def test_mapping_has_logits_or_is_refused(tmp_path, is_split, key):
    module = module_of(Returning(lambda logits: {key: logits, "more": None}), is_split)
    if key == "logits":
        fit(module, tmp_path)
        assert module(torch.zeros(2, 1, 6, 6)).shape == (2, 3)
        return
    with pytest.raises(
        ValueError, match=r"\(N, 3\), but .* a dict with the keys other"
    ):
        fit(module, tmp_path)


@pytest.mark.parametrize("is_split", [True, False], ids=["split", "unsplit"])
@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        (lambda x: (x, x.mean()), r"a tuple of \(a tensor of shape \(\d+, 3\), a tens"),
        (lambda x: [x], r"a list of \(a tensor of shape \(\d+, 3\)\)"),
        (lambda x: x[:, 0], r"a tensor of shape \(\d+,\)"),
    ],
    ids=["tuple", "list", "vector"],
)
def test_what_is_no_logits_is_refused_in_one_line(tmp_path, is_split, wrap, match):
    module = module_of(Returning(wrap), is_split)
    for call in (
        partial(fit, module, tmp_path),
        partial(module, torch.zeros(2, 1, 6, 6)),
    ):
        with pytest.raises(ValueError, match=match) as error:
            call()
        message = str(error.value)
        assert "Expected the network to return logits of shape (N, 3)" in message
        assert "\n" not in message


def module_of(network, is_split):
    cut_layer, client = ("conv", SGD) if is_split else (None, None)
    return SplitLightningModule(network, cut_layer, client, SGD, num_classes=3)


@pytest.mark.parametrize("cut_layer", ["bn", 1])
def test_network_within_torch_compile_is_split_itself(caplog, cut_layer):
    network = ConvStem().eval()
    with caplog.at_level(logging.WARNING):
        segments = split(torch.compile(network), cut_layer)
    assert "ConvStem are not compiled" in caplog.text
    assert merge(*segments).keys() == network.state_dict().keys()
    client, server = segments
    images = torch.rand(2, 1, 6, 6)
    assert torch.equal(server(client(images)), network(images))
    module = SplitLightningModule(torch.compile(network), "bn", SGD, SGD, num_classes=3)
    assert not any("_orig_mod" in key for key in module.state_dict())
