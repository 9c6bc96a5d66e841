"""Split training against plain PyTorch, and what `split` leaves alone."""

import copy
from functools import lru_cache, partial

import own_networks as own
import pytest
import torch
from by_hand import check_split_equals_unsplit, train_split, trained, trained_own
from torch import nn
from torchvision import models

from split_lightning.models.networks import DigitsCNN, cifar_resnet18
from split_lightning.models.split import cut_layers, split

# The zoo: image size, and cuts: early, inside a block where several tensors cross, at a
# block's end, late.
ZOO = {
    "resnet18": (
        models.resnet18,
        32,
        ["conv1", "layer2.0.bn2", "layer3.0.downsample", "layer3", "avgpool"],
    ),
    "cifar_resnet18": (
        cifar_resnet18,
        16,
        ["maxpool", "layer2.0.conv2", "layer4"],
    ),
    "vgg11": (
        models.vgg11,
        32,
        ["features.0", "features.9", "avgpool", "classifier.5"],
    ),
    "vgg11_bn": (
        models.vgg11_bn,
        32,
        ["features.1", "features.13", "features", "classifier.2"],
    ),
    "densenet121": (
        models.densenet121,
        64,
        [
            "features.conv0",
            "features.denseblock2.denselayer5.norm2",
            "features.transition2",
            "features",
        ],
    ),
    "mobilenet_v2": (
        models.mobilenet_v2,
        64,
        ["features.0.0", "features.5.conv.1", "features.7", "features.18.2"],
    ),
    "mobilenet_v3_small": (
        models.mobilenet_v3_small,
        64,
        ["features.0", "features.5.block.2.fc1", "features.6", "classifier.2"],
    ),
    "efficientnet_b0": (
        models.efficientnet_b0,
        64,
        ["features.0", "features.3.1.block.2.fc2", "features.4", "classifier.0"],
    ),
    "convnext_tiny": (
        # With the default 1e-6, hardly anything of a block shows in the results.
        partial(models.convnext_tiny, layer_scale=0.1),
        32,
        ["features.0", "features.3.1.block.3", "features.5", "classifier.1"],
    ),
    "regnet_y_400mf": (
        models.regnet_y_400mf,
        64,
        ["stem", "trunk_output.block3.block3-2.f.se.fc1", "trunk_output", "avgpool"],
    ),
    "shufflenet_v2_x0_5": (
        models.shufflenet_v2_x0_5,
        64,
        ["conv1.0", "stage2.0.branch1", "stage3.2.branch2.3", "stage3", "conv5"],
    ),
    "squeezenet1_1": (
        models.squeezenet1_1,
        64,
        ["features.0", "features.6.expand1x1", "features.7", "classifier.0"],
    ),
    "swin_t": (
        models.swin_t,
        64,
        ["features.0", "features.3.1.mlp.1", "features.4", "flatten"],
    ),
    "vit": (
        partial(
            models.VisionTransformer,
            image_size=64,
            patch_size=16,
            num_layers=3,
            num_heads=4,
            hidden_dim=32,
            mlp_dim=64,
            dropout=0.1,
            attention_dropout=0.1,
        ),
        64,
        [
            "conv_proj",
            "encoder.layers.encoder_layer_1.self_attention",
            "encoder.layers.encoder_layer_1",
            "encoder",
        ],
    ),
    "googlenet": (
        partial(models.googlenet, aux_logits=False, init_weights=False),
        64,
        ["conv1", "inception4b.branch3.0", "inception4b", "dropout"],
    ),
    "mnasnet0_5": (
        models.mnasnet0_5,
        64,
        ["layers.0", "layers.9.1.layers.3", "layers.10", "classifier.0"],
    ),
    "maxvit": (
        partial(
            models.MaxVit,
            input_size=(64, 64),
            stem_channels=16,
            partition_size=2,
            block_channels=[16, 32],
            block_layers=[1, 1],
            head_dim=16,
            stochastic_depth_prob=0.2,
        ),
        64,
        [
            "stem",
            "blocks.0.layers.0.layers.MBconv.layers.squeeze_excitation.fc1",
            "blocks.1.layers.0.layers.window_attention.attn_layer.0",
            "blocks.0",
            "classifier.4",
        ],
    ),
}


@lru_cache(maxsize=1)
def trained_zoo(name):
    make, image_size, _ = ZOO[name]
    return trained(partial(with_ten_classes, make), image_size)


def with_ten_classes(make):
    """Returns a network, a VGG with 64 instead of 4096 hidden units (memory).

    A vision transformer's last layer starts at zero, and hides what the others do.
    """
    network = make(num_classes=10)
    if isinstance(network, models.VGG):
        for index, sizes in {0: (512 * 7 * 7, 64), 3: (64, 64), 6: (64, 10)}.items():
            network.classifier[index] = nn.Linear(*sizes)
    if isinstance(network, models.VisionTransformer):
        nn.init.normal_(network.heads.head.weight)
    return network


@pytest.mark.parametrize(
    ("name", "cut_layer"),
    [
        pytest.param(name, cut_layer, id=f"{name}-{cut_layer}")
        for name, (_, _, cuts) in ZOO.items()
        for cut_layer in cuts
    ],
)
def test_torchvision_network_trains_as_if_unsplit(name, cut_layer):
    check_split_equals_unsplit(trained_zoo(name), cut_layer)


@pytest.mark.parametrize(
    ("make", "cut_layer"),
    [
        pytest.param(make, cut_layer, id=f"{make.__name__}-{cut_layer}")
        for make, cuts in own.OWN.items()
        for cut_layer in cuts
    ],
)
def test_own_network_trains_as_if_unsplit(make, cut_layer):
    check_split_equals_unsplit(trained_own(make), cut_layer)


@pytest.mark.parametrize("make", own.OWN, ids=lambda make: make.__name__)
def test_cut_layers_are_those_that_work(make):
    unsplit = trained_own(make)
    valid = cut_layers(unsplit.network)
    for path, _ in unsplit.network.named_modules():
        if path in valid:
            check_split_equals_unsplit(unsplit, path)
        else:
            with pytest.raises(ValueError, match="Expected argument `cut_layer`"):
                split(unsplit.network, path)


@pytest.mark.parametrize(
    "name", ["vgg11", "efficientnet_b0", "convnext_tiny", "swin_t", "vit", "maxvit"]
)
def test_training_draws_random_numbers(name):
    make, image_size, _ = ZOO[name]
    network = with_ten_classes(make).train()
    inputs = torch.randn(4, 3, image_size, image_size)
    assert not torch.equal(network(inputs), network(inputs))


@pytest.mark.parametrize("index", range(9))
def test_index_names_a_child(index):
    network = DigitsCNN().eval()
    path = [name for name, _ in network.named_children()][index]
    inputs = torch.randn(2, 1, 8, 8)
    by_index, by_path = split(network, index), split(network, path)
    for one, other in zip(by_index, by_path, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(by_index[0](inputs), by_path[0](inputs))


def test_index_3_of_resnet18_is_its_maxpool():
    client, _ = split(models.resnet18(num_classes=10), 3)
    stem = {"conv1", "bn1", "relu", "maxpool"}
    assert {name for name, _ in client.named_children()} == stem
    assert client(torch.randn(2, 3, 64, 64)).shape == (2, 64, 16, 16)


def test_index_counts_a_child_that_stands_twice():
    relu = nn.ReLU()
    network = nn.Sequential(
        nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2)
    )
    client, _ = split(network, 3)
    assert {key.split(".")[0] for key in client.state_dict()} == {"0", "2"}


@pytest.mark.parametrize("make", own.OWN, ids=lambda make: make.__name__)
def test_split_leaves_the_network_as_it_is(make):
    network, batches, *_ = trained_own(make)
    network.train()
    network.bn.eval()
    before = copy.deepcopy(network)
    client, server = split(network, "conv1")
    assert vars(network).keys() == vars(before).keys()
    assert [m.training for m in network.modules()] == [
        m.training for m in before.modules()
    ]
    train_split(client, server, batches)
    assert all(parameter.grad is None for parameter in network.parameters())
    state = network.state_dict()
    for key, tensor in before.state_dict().items():
        assert torch.equal(state[key], tensor)
