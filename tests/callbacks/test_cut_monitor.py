"""`CutMonitor` against a plain loop with no code of the library."""

import pytest
import torch
from torch import nn
from watching import (
    SGD,
    ListLogger,
    batches_of,
    fit,
    make_data,
    make_module,
    network,
)

from split_lightning.callbacks import CutMonitor
from split_lightning.observers import norms


def test_norms_are_those_of_a_plain_loop(tmp_path):
    logger = ListLogger()
    fit(
        tmp_path,
        [CutMonitor()],
        data=make_data(1),
        logger=logger,
        log_every_n_steps=3,
    )
    net = network()
    optimizer = SGD(net.parameters())
    smashed_norms, gradient_norms = [], []
    for _, (_, inputs, targets, *_) in batches_of(make_data(1), rounds=2):
        smashed = net[:2](inputs)
        smashed.retain_grad()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net[2:](smashed), targets).backward()
        smashed_norms.append(smashed.square().sum().sqrt().item())
        gradient_norms.append(smashed.grad.square().sum().sqrt().item())
        optimizer.step()
    steps = logger.steps("cut/smashed_norm")
    assert steps == logger.steps("cut/gradient_norm") == [2, 5, 8, 11]
    assert steps == logger.steps("train/batch_loss")
    smashed, gradient = (
        logger.values(f"cut/{name}_norm") for name in ("smashed", "gradient")
    )
    assert smashed == pytest.approx([smashed_norms[step] for step in steps])
    assert gradient == pytest.approx([gradient_norms[step] for step in steps])


class Skip(nn.Module):
    """Two tensors cross a cut after `relu`: the sum needs `first` too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(2, 2, 3, padding=1)
        self.last = nn.Linear(72, 3)

    def forward(self, inputs):
        first = self.first(inputs)
        return self.last((first + self.second(self.relu(first))).flatten(1))


def test_several_tensors_have_one_norm(tmp_path):
    logger, crossed = ListLogger(), {}
    module = make_module("relu", Skip())

    def note(event):
        if getattr(event, "kind", None) in ("smashed", "gradient"):
            values = [value.flatten() for value in event.payload]
            crossed.setdefault(event.kind, []).append(
                torch.cat(values).detach().clone()
            )

    module.channel.observers.append(note)
    fit(tmp_path, [CutMonitor()], module, logger=logger, log_every_n_steps=1)
    assert len(crossed["smashed"][0]) == 2 * 7 * 2 * 36
    for name in ("smashed", "gradient"):
        norms = [values.norm().item() for values in crossed[name]]
        assert logger.values(f"cut/{name}_norm") == pytest.approx(norms)


def test_the_gradient_is_as_it_crosses(tmp_path):
    """Accumulation divides the loss; clipping comes after the cut."""
    norms = []
    frozen = SGD.func, {"lr": 0.0}
    for options in ({}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1e-3}):
        logger = ListLogger()
        module = make_module(optimizer=lambda p: frozen[0](p, **frozen[1]), **options)
        fit(tmp_path, [CutMonitor()], module, logger=logger, log_every_n_steps=1)
        norms.append(torch.tensor(logger.values("cut/gradient_norm")))
    assert len(norms[0]) == 2 * 3 * 3
    torch.testing.assert_close(norms[1], norms[0] / 2)
    torch.testing.assert_close(norms[2], norms[0])


@pytest.mark.parametrize(
    ("options", "looks"),
    [
        ({"logger": True, "log_every_n_steps": 6}, 2 * 3),
        ({"logger": False, "log_every_n_steps": 1}, 0),
        ({"barebones": True, "logger": None, "enable_checkpointing": None}, 0),
    ],
    ids=["every sixth batch", "no logger", "barebones"],
)
def test_batches_that_are_not_logged_are_not_looked_at(
    tmp_path, monkeypatch, options, looks
):
    seen = []
    true_norm = norms.joint_norm
    monkeypatch.setattr(norms, "joint_norm", lambda v: seen.append(1) or true_norm(v))
    if options["logger"]:
        options = options | {"logger": ListLogger()}
    _, module = fit(tmp_path, [CutMonitor()], **options)
    assert len(seen) == looks
    assert not [o for o in module.channel.observers if isinstance(o, norms.Norms)]
