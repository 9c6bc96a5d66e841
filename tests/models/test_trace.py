"""Networks whose own `forward` cannot be traced are refused: name, line, remedy."""

import logging

import numpy as np
import own_networks as own
import pytest
import torch
from torch import nn

from split_lightning.models.split import cut_layers, split


class Keyword(own.Small):
    def forward(self, *, x):
        return super().forward(x)


class Unpacked(own.Small):
    def forward(self, x):
        batch, *_ = x.shape
        return super().forward(x) * batch


class Hooked(own.Small):
    def __init__(self):
        super().__init__()
        self.register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            own.Gate,
            r"depends on values \(own_networks.py:\d+: `return x if x.sum\(\) > 0",
        ),
        (
            own.FrozenMiddle,
            r"switches gradients.* \(own_networks.py:\d+: `scale = self",
        ),
        (
            own.HalfPrecision,
            r"autocast.* \(own_networks.py:\d+: `x = self.conv2\(x\)`\)",
        ),
        (Keyword, "takes no input by position"),
        (Unpacked, r"depends on values \(test_trace.py:\d+: `batch, \*_ = x.shape`\)"),
        (Hooked, "it has hooks"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refusal_names_the_line_and_the_remedy(make, reason):
    match = (
        f"Expected argument `network` .* that of {make.__name__} cannot be: .*{reason}"
    )
    for call in (lambda: split(make(), 0), lambda: cut_layers(make())):
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "a layer of its own" in str(error.value)
        assert "\n" not in str(error.value)


SEEN = {"sizes": set(), "first": True}
logger = logging.getLogger(__name__)


class Caches(own.Small):
    """Writes down something the first time, which changes none of its operations."""

    def forward(self, x):
        logger.debug("Runs.")
        SEEN["sizes"].add(3)
        return super().forward(x)


class Switches(own.Small):
    """Does something else the first time."""

    def forward(self, x):
        first, SEEN["first"] = SEEN["first"], False
        return super().forward(self.conv1(x)[:, :3] if first else x)


def test_what_changes_once_for_all_is_refused_if_operations_depend_on_it():
    assert "bn" in cut_layers(Caches())
    with pytest.raises(ValueError, match="changes the global variable `SEEN`"):
        split(Switches(), "bn")


def test_layer_with_backward_hooks_is_one_operation():
    network = nn.Sequential(own.Small(), nn.Linear(10, 10), nn.Linear(10, 10))
    gradients = []
    network[0].register_full_backward_hook(lambda *given: gradients.append(given[2]))
    assert cut_layers(network) == ["0", "1"]
    client, _ = split(network, 0)
    client(torch.rand(2, 3, 8, 8).requires_grad_()).sum().backward()
    assert len(gradients) == 1


def test_layer_with_forward_hooks_is_one_operation():
    network, outputs = nn.Sequential(own.Small(), nn.Linear(10, 10)), []
    network[0].register_forward_hook(lambda *given: outputs.append(given[2]))
    client, _ = split(network, 0)
    assert not outputs
    client(torch.rand(2, 3, 8, 8))
    assert len(outputs) == 1


@pytest.mark.parametrize("batch_size", [1, 5])
def test_dtypes_that_are_compared_must_be_the_same(batch_size):
    class Cast(own.Small):
        def forward(self, x):
            if x.dtype != self.conv1.weight.dtype:
                x = x.to(self.conv1.weight.dtype)
            return super().forward(x)

    network = Cast().eval()
    client, server = split(network, "conv1")
    images = torch.rand(batch_size, 3, 8, 8)
    assert torch.equal(server(client(images)), network(images))
    with pytest.raises(ValueError, match=r"torch\.float64 and torch\.float32"):
        client(images.double())


@pytest.mark.parametrize("writes_first", [True, False])
def test_buffer_that_changes_stays_on_one_side(writes_first):
    class Shared(own.Counting):
        def forward(self, x):
            x = self.conv1(x)
            x = x + self.passes if not writes_first else x
            if writes_first:
                self.passes.add_(1)
            x = self.conv2(x)
            if not writes_first:
                self.passes.add_(1)
            return self.head(x / (1 + self.passes))

    assert "conv2" not in cut_layers(Shared())
    with pytest.raises(ValueError, match="would put `passes` on both sides"):
        split(Shared(), "conv2")


def test_a_single_layer_is_refused():
    with pytest.raises(ValueError, match=r"to have layers.*got Linear"):
        split(nn.Linear(3, 4), "maxpool")


class FreshNoise(nn.Module):
    """Draws from a generator of NumPy that it makes in each pass."""

    def forward(self, x):
        return self.doubled(x) if _coin() else x

    def doubled(self, x):
        return 2 * x


def _coin():
    return np.random.default_rng().random() < 0.5


def test_a_layer_with_a_fresh_generator_is_one_operation():
    network = nn.Sequential(nn.Linear(3, 4), FreshNoise(), nn.Linear(4, 2))
    client, _ = split(network, 1)
    inputs = torch.ones(1, 3)
    drawn = {tuple(client(inputs).flatten().tolist()) for _ in range(40)}
    assert len(drawn) == 2
    with pytest.raises(ValueError, match="default_rng"):
        cut_layers(FreshNoise())
