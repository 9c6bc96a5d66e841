"""What clients compute together, against each client by itself."""

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
)
from split_lightning.joint_step import average_cut_gradients
from torch import nn

from split_lightning import merge
from split_lightning.batch_norm import (
    BatchNormByClient,
    is_only_mixer,
    statistics_bytes,
)
from split_lightning.callbacks import ClientAveraging
from split_lightning.data import ParallelSchedule

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
    module = make_split(net=layers, optimizer=plain_sgd, batch_norm="joint")
    data = make_data(schedule=ParallelSchedule(draw="proportional"))
    with pytest.raises(ValueError, match="`batch_norm` to be 'own' where the client"):
        fit(tmp_path, module, data, [ClientAveraging(every="step")])


def test_frozen_statistics_are_not_exchanged():
    layers = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(8))
    assert statistics_bytes(layers) == 2 * 4 * (4 + 8)
    layers[0].eval()
    assert statistics_bytes(layers) == 2 * 4 * 8


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def plain_loop(data, layers):
    """Each client's forward and backward by itself, on copies; the mean at each step.

    Of the B samples of a step each client's gradient is its slice of the joint one, and
    the mean is weighted by samples.
    """
    client, server = clone(layers[:3]), clone(layers[3:])
    data.setup("fit")
    loader = data.train_dataloader()
    for round_index in range(ROUNDS):
        loader.sampler.set_epoch(round_index)
        for batch in loader:
            sizes = [len(part.targets) for part in batch.parts]
            copies = [clone(client) for _ in sizes]
            pairs = zip(copies, batch.parts, strict=True)
            outputs = [own(part.inputs) for own, part in pairs]
            smashed = [output.detach().requires_grad_() for output in outputs]
            parameters = [*server.parameters()]
            optimizer = plain_sgd(parameters)
            optimizer.zero_grad()
            loss_of(server, torch.cat(smashed), batch.targets).backward()
            optimizer.step()
            for own, output, cut in zip(copies, outputs, smashed, strict=True):
                output.backward(cut.grad)
                plain_sgd(own.parameters()).step()
            client.load_state_dict(mean_state([c.state_dict() for c in copies], sizes))
    return {**client.state_dict(), **server.state_dict()}


INSTANCE = partial(nn.InstanceNorm2d, affine=True, track_running_stats=True)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, INSTANCE], ids=["batch", "instance"])
def test_clients_with_different_numbers_of_samples(tmp_path, norm):
    """Averaged at each step; forgetting a weight, or whose sample is whose, fails."""
    layers = network()
    layers[1] = norm(4)
    options = {"schedule": ParallelSchedule(draw="proportional"), "batch_size": 12}
    expected = plain_loop(make_data(**options), layers)
    module = make_split(net=layers, optimizer=plain_sgd)
    data = make_data(**options)
    data.setup("fit")
    parts = [len(p.targets) for b in data.train_dataloader() for p in b.parts]
    assert len(set(parts)) > 2
    fit(tmp_path, module, data, [ClientAveraging(every="step")])
    assert_close(merge(module.client, module.server), expected)


def test_the_mean_of_cut_gradients_of_one_batch_and_of_several():
    """The first two clients get it, the third keeps its own."""
    values = torch.randn(7, 5)
    expected = values.clone()
    expected[:2] = expected[2:4] = (values[:2] + values[2:4]) / 2
    for lengths in ([7], [2, 2, 3]):
        smashed = [torch.zeros(n, 5, requires_grad=True) for n in lengths]
        for own, gradient in zip(smashed, values.split(lengths), strict=True):
            own.grad = gradient.clone()
        average_cut_gradients(smashed, [2, 2, 3], 2)
        assert torch.equal(torch.cat([own.grad for own in smashed]), expected)
