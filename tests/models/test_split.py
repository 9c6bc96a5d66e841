"""Networks in two segments against plain PyTorch: bit for bit the same."""

import copy
import re
from functools import lru_cache, partial
from typing import NamedTuple

import own_networks as own
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torchvision import models

from split_lightning.models.networks import DigitsCNN, cifar_resnet18
from split_lightning.models.split import cut_layers, merge, split

NUM_STEPS = 3

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

# Each network of ours, and cuts that it must allow.
OWN = {
    own.Small: ["conv1", "bn", "relu", "conv2"],
    own.Functional: ["conv1", "conv2"],
    own.Branching: ["conv1", "conv2"],
    own.Skip: ["conv1", "bn", "conv2"],
    own.InPlaceResidual: ["conv1", "conv2", "bn", "relu"],
    own.PreActivated: ["conv1", "bn", "relu", "conv2"],
    own.InPlaceOnView: ["conv1", "bn", "relu"],
    own.UsedTwice: ["conv1", "conv2", "relu", "dropout"],
    own.Scaled: ["conv1", "conv2"],
    own.Buffered: ["conv1", "conv2"],
    own.BufferedTwice: ["conv1", "conv2"],
    own.Constant: ["conv1", "conv2"],
    own.Tied: ["conv1", "conv3"],
    own.TwoNames: ["conv1", "stem", "block.0", "last_block"],
    own.NeverRun: ["conv1", "bn", "conv2"],
    own.Sizes: ["conv1", "bn", "conv2"],
    own.Counted: ["conv1", "conv2"],
    own.Pairs: ["conv1", "pair.left", "pair", "conv2"],
    own.Recurrent: ["conv1", "lstm"],
    own.LastState: ["conv1", "lstm"],
    own.EncoderDecoder: ["conv1", "decoder"],
    own.Chunks: ["conv1"],
    own.Attentive: ["conv1", "attention"],
    own.Counting: ["conv1", "conv2"],
}


class Trained(NamedTuple):
    """An unsplit network, and what plain PyTorch makes of it."""

    network: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    state: dict[str, Tensor]
    logits: Tensor


def train_unsplit(network, batches):
    network.train()
    optimizer = SGD(network.parameters(), lr=1e-3, momentum=0.9)
    torch.manual_seed(0)  # dropout, stochastic depth
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()


def train_split(client, server, batches):
    client.train()
    server.train()
    optimizers = [SGD(s.parameters(), lr=1e-3, momentum=0.9) for s in (client, server)]
    torch.manual_seed(0)
    for inputs, targets in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        activations = values_of(client(inputs))
        smashed = [as_leaf(value) for value in activations]
        F.cross_entropy(server(*smashed), targets).backward()
        crossed = zip(activations, smashed, strict=True)
        tensors = [(a, s) for a, s in crossed if isinstance(a, Tensor)]
        returned = [(a, s.grad) for a, s in tensors if s.grad is not None]
        torch.autograd.backward(*zip(*returned, strict=True))
        for optimizer in optimizers:
            optimizer.step()


def predict_split(client, server, inputs):
    with torch.no_grad():
        return server.eval()(*values_of(client.eval()(inputs)))


def values_of(activations):
    return activations if isinstance(activations, tuple) else (activations,)


def as_leaf(value):
    """Returns what the server is sent: of a tensor the values alone."""
    if not isinstance(value, Tensor):
        assert type(value) is int  # a size
        return value
    return value.detach().requires_grad_(value.requires_grad)


def trained(make_network, image_size):
    torch.manual_seed(1)
    network = make_network()
    shape = (NUM_STEPS, 4, 3, image_size, image_size)
    inputs, targets = torch.randn(shape), torch.randint(10, shape[:2])
    batches = list(zip(inputs, targets, strict=True))
    reference = copy.deepcopy(network)
    train_unsplit(reference, batches)
    with torch.no_grad():
        logits = reference.eval()(inputs[0])
    return Trained(network, batches, reference.state_dict(), logits)


@lru_cache(maxsize=1)  # tests of one network follow each other
def trained_zoo(name):
    make, image_size, _ = ZOO[name]
    return trained(partial(with_ten_classes, make), image_size)


@lru_cache(maxsize=1)
def trained_own(make):
    return trained(make, image_size=8)


def with_ten_classes(make):
    """Returns a network, a VGG with 64 instead of 4096 hidden units (memory)."""
    network = make(num_classes=10)
    if isinstance(network, models.VGG):
        for index, sizes in {0: (512 * 7 * 7, 64), 3: (64, 64), 6: (64, 10)}.items():
            network.classifier[index] = nn.Linear(*sizes)
    return network


def check_split_equals_unsplit(reference, cut_layer):
    network, batches, state, logits = reference
    client, server = split(network, cut_layer)
    train_split(client, server, batches)
    merged = merge(client, server)
    assert merged.keys() == state.keys()
    unequal = [key for key in state if not torch.equal(merged[key], state[key])]
    assert unequal == []
    assert logits.isfinite().all()
    assert torch.equal(predict_split(client, server, batches[0][0]), logits)
    copy.deepcopy(network).load_state_dict(merged, strict=True)


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
        for make, cuts in OWN.items()
        for cut_layer in cuts
    ],
)
def test_own_network_trains_as_if_unsplit(make, cut_layer):
    check_split_equals_unsplit(trained_own(make), cut_layer)


@pytest.mark.parametrize("make", OWN, ids=lambda make: make.__name__)
def test_cut_layers_are_those_that_work(make):
    reference = trained_own(make)
    valid = cut_layers(reference.network)
    for path, _ in reference.network.named_modules():
        if path in valid:
            check_split_equals_unsplit(reference, path)
        else:
            with pytest.raises(ValueError, match="Expected argument `cut_layer`"):
                split(reference.network, path)


@pytest.mark.parametrize(
    "name", ["vgg11", "efficientnet_b0", "convnext_tiny", "swin_t", "vit", "maxvit"]
)
def test_training_draws_random_numbers(name):
    network, batches, *_ = trained_zoo(name)
    network.train()
    torch.manual_seed(0)
    first, second = network(batches[0][0]), network(batches[0][0])
    assert not torch.equal(first, second)


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
    assert [name for name, _ in client.named_children()][-1] == "maxpool"
    assert client(torch.randn(2, 3, 64, 64)).shape == (2, 64, 16, 16)


def test_index_counts_a_child_that_stands_twice():
    relu = nn.ReLU()
    network = nn.Sequential(
        nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2)
    )
    client, _ = split(network, 3)
    assert {key.split(".")[0] for key in client.state_dict()} == {"0", "2"}


@pytest.mark.parametrize("make", OWN, ids=lambda make: make.__name__)
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
    assert {*map(id, network.modules())}.isdisjoint(map(id, client.modules()))
    assert {*map(id, network.modules())}.isdisjoint(map(id, server.modules()))
    assert memory(network).isdisjoint(memory(client) | memory(server))
    train_split(client, server, batches)
    assert all(parameter.grad is None for parameter in network.parameters())
    state = network.state_dict()
    for key, tensor in before.state_dict().items():
        assert torch.equal(state[key], tensor)


def memory(network):
    """Returns the addresses of all of a network's tensors."""
    tensors = (*network.parameters(), *network.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize(
    ("make", "cut_layer"),
    [(make, cuts[-1]) for make, cuts in OWN.items()],
    ids=[make.__name__ for make in OWN],
)
def test_segments_share_nothing(make, cut_layer):
    client, server = split(make(), cut_layer)
    assert memory(client).isdisjoint(memory(server))
    assert {*map(id, client.modules())}.isdisjoint(map(id, server.modules()))


@pytest.mark.parametrize(
    ("make", "cut_layer"),
    [
        (make, cuts[-1])
        for make, cuts in [*OWN.items(), (models.resnet18, ["layer2.0.conv2"])]
        if make is not own.BufferedTwice
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_key_is_in_one_segment(make, cut_layer):
    network = make()
    client, server = (s.state_dict().keys() for s in split(network, cut_layer))
    assert client.isdisjoint(server)
    assert client | server == network.state_dict().keys()


def test_segments_hold_only_their_own_layers():
    client, server = split(DigitsCNN(), "relu2")
    first = {"conv1", "bn1", "relu1", "conv2", "bn2", "relu2"}
    assert {name for name, _ in client.named_children()} == first
    second = {"maxpool", "flatten", "fc1", "relu3", "fc2"}
    assert {name for name, _ in server.named_children()} == second
    assert {key.split(".")[0] for key in client.state_dict()} == {
        "conv1",
        "bn1",
        "conv2",
        "bn2",
    }
    assert {key.split(".")[0] for key in server.state_dict()} == {"fc1", "fc2"}


def test_parameter_is_held_where_it_is_used():
    client, server = split(own.Scaled(), "conv1")
    assert "scale" not in client.state_dict()
    assert "scale" in server.state_dict()


def test_buffer_is_held_wherever_it_is_read():
    client, server = split(own.BufferedTwice(), "conv1")
    assert "mean" in client.state_dict()
    assert "mean" in server.state_dict()


def test_layers_that_never_run_go_to_the_server():
    network = own.NeverRun()
    client, server = split(network, "bn")
    unused = {"token", "table", *(f"unused.{k}" for k in network.unused.state_dict())}
    assert unused <= server.state_dict().keys()
    assert unused.isdisjoint(client.state_dict())


def test_two_names_stay_one_tensor():
    client, server = split(own.TwoNames(), "stem")
    assert client.stem.weight is client.conv1.weight
    block, last_block = server.get_submodule("block.0"), server.last_block[0]
    assert block.weight is last_block.weight
    _, server = split(own.Tied(), "conv1")
    assert server.conv2.weight is server.conv3.weight


def test_layers_that_never_run_keep_their_order():
    network = own.NeverRun()
    _, server = split(network, "bn")
    kept = server.state_dict().keys()
    assert [k for k in kept if k.startswith("unused")] == [
        k for k in network.state_dict() if k.startswith("unused")
    ]


def test_segments_keep_the_mode_of_the_network():
    network = own.Small().eval()
    for segment in split(network, "bn"):
        assert not any(m.training for m in segment.modules())


@pytest.mark.parametrize(
    ("make", "cut_layer", "types"),
    [
        (own.Small, "bn", [Tensor]),
        (own.Skip, "bn", [Tensor, Tensor]),
        (own.Pairs, "pair", [Tensor, Tensor]),
        (own.Recurrent, "lstm", [Tensor]),
        (own.LastState, "lstm", [Tensor]),
        (own.Sizes, "conv2", [int, int, int, Tensor]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_crosses(make, cut_layer, types):
    client, _ = split(make(), cut_layer)
    activations = values_of(client(torch.randn(4, 3, 8, 8)))
    assert [type(value) for value in activations] == types


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("make", "cut_layer"),
    [
        (own.Small, "bn"),
        (own.Functional, "conv1"),
        (own.InPlaceResidual, "bn"),
        (own.PreActivated, "bn"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_server_leaves_activations_alone(make, cut_layer, training):
    client, server = split(make().train(training), cut_layer)
    activations = values_of(client(torch.randn(4, 3, 8, 8)))
    before = [activation.clone() for activation in activations]
    server(*(activation.detach() for activation in activations))
    for activation, kept in zip(activations, before, strict=True):
        assert torch.equal(activation, kept)


def flat_first():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU()
    )


def normalised():
    """Returns a network whose first and last layers have buffers, no parameters."""
    return nn.Sequential(
        nn.BatchNorm2d(3, affine=False),
        nn.Conv2d(3, 8, kernel_size=3),
        nn.Conv2d(8, 10, kernel_size=6),
        nn.BatchNorm2d(10, affine=False),
        nn.Flatten(),
    )


@pytest.mark.parametrize(
    ("make", "cut_layer", "match"),
    [
        (own.Small, "conv3", "the path of a layer of Small, but got 'conv3'"),
        (own.Small, "conv1.weight", "the path of a layer of Small, but got 'conv1.w"),
        (own.Small, "", "the path of a layer of Small, but got ''"),
        (own.Small, 5, r"the index of a child \(0 to 4\) of Small, but got 5"),
        (own.Small, -1, r"the index of a child \(0 to 4\) of Small, but got -1"),
        (own.Small, True, r"the index of a child \(0 to 4\) of Small, but got True"),
        (own.Small, False, r"the index of a child \(0 to 4\) of Small, but got False"),
        (own.Small, "fc", "after `fc` leaves the server segment empty"),
        (own.Small, 4, "after `fc` leaves the server segment empty"),
        (own.NeverRun, "unused", "`unused` cuts nothing: that layer does not run"),
        (flat_first, 0, "after `0` leaves the client segment empty"),
        (flat_first, "3", "after `3` leaves the server segment empty"),
        (normalised, "0", "after `0` leaves the client segment empty"),
        (normalised, "2", "after `2` leaves the server segment empty"),
        (own.GlobalSkip, "conv1", "after `conv1` would send raw inputs"),
        (own.GlobalSkip, "conv2", "after `conv2` would send raw inputs"),
        (own.Tied, "conv2", "would put `conv2.weight` on both sides"),
        (own.TiedByHand, "bn", "would put `conv2.weight` on both sides"),
        (own.ScaledTwice, "conv2", "would put `scale` on both sides"),
        (own.Reordered, "conv2", "would put `.*` on both sides"),
        (own.Reordered, "conv3", "would put `.*` on both sides"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_invalid_cut_names_valid_ones(make, cut_layer, match):
    network = make()
    with pytest.raises(ValueError, match=match) as error:
        split(network, cut_layer)
    nearest = nearest_in(error)
    assert 1 <= len(nearest) <= 5
    for path in nearest:
        check_split_equals_unsplit(trained_own(make), path)


def nearest_in(error):
    _, named = str(error.value).split("Nearest valid cut layers: ")
    return re.findall("`([^`]+)`", named)


@pytest.mark.parametrize(
    ("cut_layer", "expected"),
    [("fc2", {"fc1", "relu3"}), ("con1", {"conv1"}), ("relu9", {"relu1", "relu2"})],
)
def test_nearest_is_near(cut_layer, expected):
    with pytest.raises(ValueError, match="Nearest valid") as error:
        split(DigitsCNN(), cut_layer)
    assert expected <= set(nearest_in(error))


def test_network_without_a_valid_cut():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert cut_layers(network) == []
    with pytest.raises(ValueError, match="Sequential has no valid cut layer"):
        split(network, 0)


@pytest.mark.parametrize(
    ("network", "match"),
    [
        pytest.param(
            own.Gated(), "tracing Gated stopped in its layer `block.1`: ", id="layer"
        ),
        pytest.param(own.Gate(), "tracing Gate stopped: ", id="root"),
    ],
)
def test_untraceable_network_names_the_layer(network, match):
    match = f"Expected argument `network` to be .* torch.fx can trace, but {match}"
    with pytest.raises(ValueError, match=match):
        split(network, 0)
    with pytest.raises(ValueError, match=match):
        cut_layers(network)


def test_noise_that_tracing_would_freeze_is_refused():
    with pytest.raises(ValueError, match="Expected argument `network`"):
        split(own.Noisy(), "conv1")
