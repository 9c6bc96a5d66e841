"""What crosses the cut, and its bytes, against closed formulas."""

from functools import partial

import pytest
import torch
from conftest import RandomImages
from pytorch_lightning import Trainer
from torchvision.models import resnet18

from split_lightning import (
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
)
from split_lightning.channel import CutLayerChannel, Traffic

# torchvision's ResNet-18 on 32x32 images: values a sample at each cut; the client's
# parameters, and its BatchNorm buffers (running mean and variance).
RESNET18 = {
    "maxpool": (64 * 8 * 8, 9_408 + 128, 128),
    "layer1": (64 * 8 * 8, 9_536 + 4 * (36_864 + 128), 128 * 5),
    "layer2": (128 * 4 * 4, 157_504 + 525_568, 640 + 256 * 5),
    "layer3": (256 * 2 * 2, 683_072 + 2_099_712, 1_920 + 512 * 5),
    "layer4": (512 * 1 * 1, 2_782_784 + 8_393_728, 4_480 + 1_024 * 5),
}
NUM_BATCHNORMS = {"maxpool": 1, "layer1": 5, "layer2": 10, "layer3": 15, "layer4": 20}


@pytest.mark.parametrize(
    ("cut_layer", "policy"),
    [
        *((layer, "keep") for layer in RESNET18),
        ("layer1", "travel"),
        ("layer1", "reset"),
    ],
)
def test_bytes_of_resnet18_equal_the_closed_formula(tmp_path, cut_layer, policy):
    num_samples, num_clients, rounds = 12, 3, 2
    source = RandomImages(num_samples, 4, 10, (3, 32, 32))
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    module = SplitLightningModule(
        resnet18(num_classes=10), cut_layer, sgd, sgd, 10, optimizer_state=policy
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[RoundRobinWeightPassing()],
    )
    trainer.fit(module, datamodule=SplitDataModule(source, num_clients, val_share=0))

    values, parameters, buffers = RESNET18[cut_layer]
    images = rounds * num_samples
    handoffs = rounds * num_clients - 1
    segment = 4 * (parameters + buffers) + 8 * NUM_BATCHNORMS[cut_layer]
    travelling = 4 * parameters if policy == "travel" else 0
    assert module.traffic == Traffic(
        uplink_bytes=images * (values * 4 + 8),
        downlink_bytes=images * values * 4,
        handoff_bytes=handoffs * (segment + travelling),
        handoffs=handoffs,
    )


def test_only_detached_values_cross():
    traffic = Traffic()
    channel = CutLayerChannel(traffic)
    weight = torch.ones(3, requires_grad=True)
    activations = (weight * 2, 7, torch.arange(2))
    first, number, labels = channel.send(activations)
    assert first.is_leaf
    assert first.requires_grad
    assert first.grad_fn is None
    assert number == 7
    assert not labels.requires_grad
    (first * 5).sum().backward()
    assert weight.grad is None
    gradient, *rest = channel.send_back((first, number, labels))
    assert torch.equal(gradient, torch.full((3,), 5.0))
    assert rest == [None, None]
    assert traffic.uplink_bytes == 3 * 4 + 8 + 2 * 8
    assert traffic.downlink_bytes == 3 * 4


def test_targets_are_counted():
    traffic = Traffic()
    targets = torch.tensor([1, 2, 3])
    assert CutLayerChannel(traffic).send_targets(targets) is targets
    assert traffic == Traffic(uplink_bytes=24)
