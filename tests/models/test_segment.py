"""What the segments hold, what crosses between them, and what they share: nothing."""

import own_networks as own
import pytest
import torch
from by_hand import values_of
from torch import Tensor
from torchvision import models

from split_lightning.models.networks import DigitsCNN
from split_lightning.models.split import split


@pytest.mark.parametrize(
    ("make", "cut_layer"),
    [(make, cuts[-1]) for make, cuts in own.OWN.items()],
    ids=[make.__name__ for make in own.OWN],
)
def test_segments_and_network_share_nothing(make, cut_layer):
    network = make()
    client, server = split(network, cut_layer)
    for one, other in ((client, server), (client, network), (server, network)):
        assert memory(one).isdisjoint(memory(other))
        assert {*map(id, one.modules())}.isdisjoint(map(id, other.modules()))


def memory(network):
    """Returns the addresses of all of a network's tensors."""
    tensors = (*network.parameters(), *network.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize(
    ("make", "cut_layer"),
    [
        (make, cuts[-1])
        for make, cuts in [*own.OWN.items(), (models.resnet18, ["layer2.0.conv2"])]
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
    assert "offset" in client.state_dict()
    assert "offset" in server.state_dict()


def test_segments_follow_what_is_loaded_into_them():
    network = own.Normalising().eval()
    client, server = split(network, "conv1")
    state = {key: tensor + 0.5 for key, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    for segment in (client, server):
        segment.load_state_dict({key: state[key] for key in segment.state_dict()})
    inputs = torch.randn(4, 3, 8, 8)
    assert torch.equal(server(*values_of(client(inputs))), network(inputs))


def test_layers_that_never_run_go_to_the_server():
    network = own.NeverRun()
    client, server = split(network, "bn")
    unused = {"token", "table", *(f"unused.{k}" for k in network.unused.state_dict())}
    assert unused <= server.state_dict().keys()
    assert unused.isdisjoint(client.state_dict())


def test_two_names_stay_one_tensor():
    client, server = split(own.TwoNames(), "stem")
    assert client.stem.weight is client.conv1.weight
    block, last_block = map(server.get_submodule, ("block.0", "last_block.0"))
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
        (own.Sizes, "conv2", [int, int, Tensor]),
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
