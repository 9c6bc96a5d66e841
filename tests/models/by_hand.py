"""Training by plain loops: the unsplit network, and the two segments of it."""

import copy
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from split_lightning.models.split import merge, split

NUM_STEPS = 3


class Trained(NamedTuple):
    """A network, and what training makes of a copy of it, the reference."""

    network: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    reference: nn.Module
    state: dict[str, Tensor]
    logits: Tensor


def train_unsplit(network, batches):
    network.train()
    optimizer = SGD(network.parameters(), lr=1e-3, momentum=0.9)
    torch.manual_seed(0)  # dropout, stochastic depth
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(logits_of(network(inputs)), targets).backward()
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
        gradients = {}
        smashed = [as_leaf(v, gradients, i) for i, v in enumerate(activations)]
        F.cross_entropy(server(*smashed), targets).backward()
        torch.autograd.backward(
            [activations[i] for i in gradients], [*gradients.values()]
        )
        for optimizer in optimizers:
            optimizer.step()


def predict_split(client, server, inputs):
    with torch.no_grad():
        return server.eval()(*values_of(client.eval()(inputs)))


def values_of(activations):
    return activations if isinstance(activations, tuple) else (activations,)


def as_leaf(value, gradients, place):
    """Returns what the server is sent, of a tensor the values alone.

    Its gradient is put at a place, as autograd computes it (`.grad` is a copy in the
    memory layout of the value).
    """
    if not isinstance(value, Tensor):
        assert type(value) is int  # a size
        return value
    leaf = value.detach().requires_grad_(value.requires_grad)
    if leaf.requires_grad:
        leaf.register_hook(lambda gradient: gradients.update({place: gradient}))
    return leaf


def logits_of(returned):
    """Returns the logits: Hugging Face's networks return more."""
    return getattr(returned, "logits", returned)


def trained(make_network, image_size=None, shape=None):
    """Trains on images of a size, or on inputs of a shape (of one dimension: words)."""
    torch.manual_seed(1)
    network = make_network()
    shape = (NUM_STEPS, 4, *(shape or (3, image_size, image_size)))
    inputs = torch.randn(shape) if len(shape) > 3 else torch.randint(100, shape)
    targets = torch.randint(10, shape[:2])
    batches = list(zip(inputs, targets, strict=True))
    reference = copy.deepcopy(network)
    train_unsplit(reference, batches)
    state = copy.deepcopy(reference.state_dict())
    with torch.no_grad():
        logits = logits_of(reference.eval()(inputs[0]))
    return Trained(network, batches, reference, state, logits)


@lru_cache(maxsize=1)  # tests of one network follow each other
def trained_own(make_network):
    return trained(make_network, image_size=8)


def check_gradients(client, server, reference):
    """Compares what the last backward left: equal weights may hide what differs."""
    expected = dict(reference.named_parameters())
    for name, parameter in (*client.named_parameters(), *server.named_parameters()):
        if parameter.grad is None:
            assert expected[name].grad is None, name
        else:
            assert torch.equal(parameter.grad, expected[name].grad), name


def check_split_equals_unsplit(unsplit, cut_layer):
    network, batches, reference, state, logits = unsplit
    client, server = split(network, cut_layer)
    train_split(client, server, batches)
    merged = merge(client, server)
    assert merged.keys() == state.keys()
    unequal = [key for key in state if not torch.equal(merged[key], state[key])]
    assert not unequal, f"cut after {cut_layer}, these differ: {unequal}"
    check_gradients(client, server, reference)
    reference.load_state_dict(merged, strict=True)
    assert logits.isfinite().all()
    assert torch.equal(predict_split(client, server, batches[0][0]), logits)
