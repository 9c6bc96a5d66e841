"""What crosses the cut, and its bytes, against closed formulas."""

from functools import partial

import pytest
import torch
from conftest import RandomImages
from pytorch_lightning import Trainer
from torchvision.models import resnet18

from split_lightning import (
    Channel,
    Message,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
)
from split_lightning.observers.traffic import NAMES, Traffic

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
    module = SplitLightningModule(resnet18(num_classes=10), cut_layer, sgd, sgd, 10)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[RoundRobinWeightPassing(optimizer_state=policy)],
    )
    trainer.fit(module, datamodule=SplitDataModule(source, num_clients, val_share=0))

    values, parameters, buffers = RESNET18[cut_layer]
    images = rounds * num_samples
    handoffs = rounds * num_clients - 1
    segment = 4 * (parameters + buffers) + 8 * NUM_BATCHNORMS[cut_layer]
    travelling = 4 * parameters if policy == "travel" else 0
    assert module.totals() == dict.fromkeys(NAMES, 0) | {
        "uplink_bytes": images * (values * 4 + 8),
        "downlink_bytes": images * values * 4,
        "handoff_bytes": handoffs * (segment + travelling),
        "handoffs": handoffs,
    }


CROSSED = (torch.zeros(3), 7, torch.arange(2), None)  # 12, 8 and 16 bytes, and none
COUNTED = {
    ("smashed", "client/0", "server/0"): "uplink_bytes",
    ("labels", "client/0.1", "server/0"): "uplink_bytes",
    ("gradient", "server/0", "client/0"): "downlink_bytes",
    ("smashed", "server/0", "server/1"): "hop_bytes",
    ("weights", "server/0", "client/1"): "layer_bytes",
    ("weights", "client/0", "aggregator/0"): "averaging_bytes",
    ("statistics", "aggregator/0", "client/0"): "averaging_bytes",
    ("weights", "server/1", "aggregator/0"): "server_averaging_bytes",
}


@pytest.mark.parametrize("message", COUNTED, ids=" ".join)
def test_a_message_is_delivered_and_counted_where_it_belongs(message):
    channel, traffic, seen = Channel(), Traffic(), []
    channel.observers += [traffic, seen.append]
    assert channel.send(*message, CROSSED, 4, 1) is CROSSED
    assert seen == channel.recent == [Message(*message, CROSSED, step=4, cut=1)]
    assert traffic.counts == dict.fromkeys(NAMES, 0) | {COUNTED[message]: 36}


def test_a_hand_off_of_several_holders_is_one():
    traffic = Traffic()
    for holder in range(3):
        ends = f"client/0.{holder}", f"client/1.{holder}"
        traffic(Message("weights", *ends, CROSSED))
    assert traffic.counts["handoffs"] == 1
    assert traffic.counts["handoff_bytes"] == 3 * 36
