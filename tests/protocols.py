"""Small protocols built in Python, and plain loops to hold them against."""

import copy
from functools import partial

import torch
from conftest import RandomImages
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import nn
from torch.nn.functional import cross_entropy

from split_lightning import Protocol, SplitDataModule, SplitLightningModule

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)
ROUNDS = 3
CUTS = {"conv": 1, "relu": 3, "flat": 5}


def network(norm=True):
    """A network with BatchNorm on both sides of most cuts (or none), no dropout."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.BatchNorm1d(8) if norm else nn.Tanh(),
        nn.Linear(8, 3),
    )


def make_data(num_clients=3, protocol=None, **options):
    """Data whose rounds a protocol plans; `None`: the default."""
    options = {"batch_size": 6, "val_share": 0.2, "seed": 3} | options
    data = SplitDataModule(RandomImages(), num_clients, **options)
    data.protocol = protocol or data.protocol
    return data


def make_split(cut_layer=2, net=None, optimizer=SGD, server_optimizer=None, **options):
    net = network() if net is None else net
    server_optimizer = server_optimizer or optimizer
    return SplitLightningModule(
        net, cut_layer, optimizer, server_optimizer, 3, **options
    )


def make_unsplit(net=None, optimizer=SGD, **options):
    net = network() if net is None else net
    return SplitLightningModule(net, None, None, optimizer, 3, **options)


def fit(folder, module, data, callbacks=(), rounds=ROUNDS, ckpt_path=None, **options):
    """Trains with the protocol among the callbacks, or else that of the data."""
    if not any(isinstance(callback, Protocol) for callback in callbacks):
        callbacks = [data.protocol, *callbacks]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def batches_of(data, round_index):
    """Returns the steps of a round: lists of (client, inputs, targets)."""
    data.setup("fit")
    loader = data.train_dataloader()
    loader.set_epoch(round_index)
    return [[(p.client_id, p.inputs, p.targets) for p in b.parts] for b in loader]


def state_of(module, client_id=None):
    """A client's whole network, by the names of the unsplit one."""
    segments = module.segments(client_id).values()
    return {k: v for segment in segments for k, v in segment.state_dict().items()}


def step(optimizers, loss):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def mean_state(states, weights):
    """The mean of state dicts, written out."""
    total = sum(weights)
    mean = {}
    for name, first in states[0].items():
        summed = sum(s[name].double() * w for s, w in zip(states, weights, strict=True))
        value = summed / total
        mean[name] = (value if first.is_floating_point() else value.round()).to(
            first.dtype
        )
    return mean


def settle(optimizers, weights, policy):
    """What becomes of optimizer states where weights are averaged.

    Args:
        optimizers: By party.
        weights: Of those whose weights were averaged.
        policy: `keep`, `travel` or `reset`.
    """
    states = [optimizers[k].state_dict()["state"] for k in weights]
    mean = {}
    if policy == "travel":
        mean = {
            i: mean_state([own[i] for own in states], weights.values())
            for i in states[0]
        }
    for optimizer in optimizers.values() if policy != "keep" else ():
        state = {**optimizer.state_dict(), "state": copy.deepcopy(mean)}
        optimizer.load_state_dict(state)


def without_buffers(state, net):
    """Those entries of a state that are a network's parameters."""
    names = {name for name, _ in net.named_parameters()}
    return {name: tensor for name, tensor in state.items() if name in names}


def assert_close(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def loss_of(net, inputs, targets):
    return cross_entropy(net(inputs), targets)


def clone(module):
    return copy.deepcopy(module)
