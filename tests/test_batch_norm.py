"""BatchNorm of clients that act together, against each client by itself."""

import copy
from functools import partial

import pytest
import torch
from protocols import (
    ROUNDS,
    assert_close,
    clone,
    fit,
    loss_of,
    make_data,
    make_split,
    mean_state,
    network,
    state_of,
)
from torch import nn

from split_lightning import GPSL
from split_lightning.batch_norm import BatchNormByClient, is_only_mixer, statistics
from split_lightning.coders import AverageGradients
from split_lightning.message import num_bytes

SIZES = [3, 2, 6]
SHAPES = {nn.BatchNorm1d: (4,), nn.BatchNorm2d: (4, 3, 3), nn.BatchNorm3d: (4, 2, 2, 2)}
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batch_norm_by_client_equals_each_client_by_itself(kind, options):
    """Outputs, gradients and the mean of the statistics, over two steps."""
    drawn = torch.Generator().manual_seed(0)
    layer = kind(4, **options)
    for _ in range(2):
        inputs = torch.randn(sum(SIZES), *SHAPES[kind], generator=drawn)
        copies = [copy.deepcopy(layer) for _ in SIZES]
        own, joint = inputs.clone().requires_grad_(), inputs.requires_grad_()
        parts = zip(copies, torch.split(own, SIZES), strict=True)
        expected = torch.cat([single(part) for single, part in parts])
        layer.zero_grad()
        with BatchNormByClient(SIZES):
            found = layer(joint)
        assert torch.equal(found, expected)
        for outputs in (found, expected):
            outputs.square().sum().backward()
        torch.testing.assert_close(joint.grad, own.grad)
        for name, parameter in layer.named_parameters():
            grads = [single.get_parameter(name).grad for single in copies]
            torch.testing.assert_close(parameter.grad, sum(grads))
        assert_close(
            layer.state_dict(), mean_state([c.state_dict() for c in copies], SIZES)
        )


def test_batch_norm_that_is_frozen_is_left_as_it_is():
    layer = nn.BatchNorm1d(4).eval()
    layer.running_mean += 1
    before, inputs = clone(layer), torch.randn(11, 4)
    with BatchNormByClient(SIZES):
        assert torch.equal(layer(inputs), before(inputs))
    assert_close(layer.state_dict(), before.state_dict())


class OwnNorm(nn.BatchNorm1d):
    """It may normalise in a way of its own."""


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs):
        self.seen += inputs.mean().detach()
        return inputs + 0.1 * self.seen


@pytest.mark.parametrize("layer", [OwnNorm(4), Counter()], ids=["own norm", "buffer"])
def test_other_layers_with_buffers_may_mix_samples(layer):
    assert not is_only_mixer(nn.Sequential(nn.Linear(4, 4), layer))
    assert is_only_mixer(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def test_joint_statistics_are_of_batch_norm_alone(tmp_path):
    """Another layer with buffers may mix samples in a way that nobody could compute."""
    layers = network()
    layers[1] = INSTANCE(4)
    with pytest.raises(ValueError, match="`joint_norm` to be False where the client"):
        fit(tmp_path, make_split(net=layers), make_data(3, GPSL()))


def test_frozen_statistics_are_not_exchanged():
    layers = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(8))
    assert num_bytes(statistics(layers)) == 2 * 4 * (4 + 8)
    layers[0].eval()
    assert num_bytes(statistics(layers)) == 2 * 4 * 8


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def plain_loop(data, layers):
    """Each client's forward and backward by itself, on copies; then their sum."""
    client, server = clone(layers[:3]), clone(layers[3:])
    data.setup("fit")
    loader = data.train_dataloader()
    for round_index in range(ROUNDS):
        loader.set_epoch(round_index)
        for batch in loader:
            sizes = [len(part.targets) for part in batch.parts]
            copies = [clone(client) for _ in sizes]
            pairs = zip(copies, batch.parts, strict=True)
            outputs = [own(part.inputs) for own, part in pairs]
            smashed = [output.detach().requires_grad_() for output in outputs]
            parameters = [*server.parameters()]
            optimizer = plain_sgd(parameters)
            optimizer.zero_grad()
            targets = torch.cat([part.targets for part in batch.parts])
            loss_of(server, torch.cat(smashed), targets).backward()
            optimizer.step()
            for output, cut in zip(outputs, smashed, strict=True):
                output.backward(cut.grad)
            summed = [sum(own) for own in zip(*map(gradients_of, copies), strict=True)]
            client.load_state_dict(mean_state([c.state_dict() for c in copies], sizes))
            for parameter, gradient in zip(client.parameters(), summed, strict=True):
                parameter.grad = gradient
            plain_sgd(client.parameters()).step()
    return {**client.state_dict(), **server.state_dict()}


def gradients_of(layers):
    return [parameter.grad for parameter in layers.parameters()]


INSTANCE = partial(nn.InstanceNorm2d, affine=True, track_running_stats=True)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, INSTANCE], ids=["batch", "instance"])
def test_clients_with_different_numbers_of_samples(tmp_path, norm):
    """On one state; what a client has of a sample is its own."""
    layers = network()
    layers[1] = norm(4)
    data = make_data(3, GPSL(joint_norm=False), batch_size=12)
    expected = plain_loop(data, layers)
    parts = [len(p.targets) for step in data.train_dataloader() for p in step.parts]
    assert len(set(parts)) > 2
    module = make_split(net=layers, optimizer=plain_sgd)
    fit(tmp_path, module, data)
    assert_close(state_of(module), expected)


def test_the_mean_of_gradients_at_the_cut():
    """The first two clients get it, the third keeps its own; other sizes stay."""
    values = torch.randn(7, 5)
    sent = [{"server/0": (own,)} for own in values.split([2, 2, 3])]
    first, second, third = (own["server/0"][0] for own in AverageGradients(2)(sent))
    expected = (values[:2] + values[2:4]) / 2
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert torch.equal(third, values[4:])
    assert AverageGradients(3)(sent) == sent
