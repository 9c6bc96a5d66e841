"""Work: the floating-point operations of a sample, and what it sends, by segment."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from split_lightning.message import as_values, num_bytes
from split_lightning.models.flops import flop_counter
from split_lightning.random_state import unchanged_random_state


class Work(NamedTuple):
    """The work of a segment for one sample in training.

    Attributes:
        forward: Floating-point operations of the forward pass.
        backward: Those of the backward pass, from the gradient behind the segment to
            the one before it (but for images, which need none).
    """

    forward: float
    backward: float


class Measured(NamedTuple):
    """The costs of a segment for one sample in training.

    Attributes:
        work: Its operations.
        outputs: What it sends: tensors of two samples, without numbers.
    """

    work: Work
    outputs: tuple[Any, ...]


@unchanged_random_state()
def measure(
    depths: Sequence[Sequence[nn.Module]], example: Tensor
) -> list[list[Measured]]:
    """Measures segments.

    Counts matrix products and convolutions, as torch does: nearly all of the work. A
    multiplication and an addition are two operations.

    Args:
        depths: For each depth in the network, in order, the segments there.
        example: One sample `(1, C, H, W)`, normalised.
    """
    values: tuple[Any, ...] = (torch.cat([example, example]),)
    found = []
    for segments in depths:
        measured, sent = list[Measured](), tuple[Any, ...]()
        for segment in segments:
            own, outputs = _measured(segment, values)
            measured.append(own)
            sent += outputs
        found.append(measured)
        values = sent
    return found


def _measured(
    segment: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Measured, tuple[Any, ...]]:
    # A copy, in eval mode: neither statistics nor gradients are touched.
    own = copy.deepcopy(segment).eval()
    for parameter in own.parameters():
        parameter.grad = None
    values = tuple(
        v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in inputs
    )
    with torch.enable_grad(), flop_counter() as counter:
        outputs = as_values(own(*values))
        forward = counter.get_total_flops()
        tensors = [v for v in outputs if isinstance(v, Tensor) and v.requires_grad]
        if tensors:
            torch.autograd.backward(tensors, [torch.ones_like(v) for v in tensors])
        total = counter.get_total_flops()
    sent = tuple(
        v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in outputs
    )
    without = tuple(
        torch.empty_like(v, device="meta").requires_grad_(v.requires_grad)
        if isinstance(v, Tensor)
        else v
        for v in sent
    )
    return Measured(Work(forward / 2, (total - forward) / 2), without), sent


def work_of(stages: Mapping[str, nn.Module], example: Tensor) -> list[Work]:
    """Returns the work of stages that run one after the other.

    Args:
        stages: The stages by name, in order.
        example: One sample `(1, C, H, W)`, normalised.
    """
    depths = [[stage] for stage in stages.values()]
    return [own.work for (own,) in measure(depths, example)]


def crossing_of(
    stages: Mapping[str, nn.Module], example: Tensor
) -> list[tuple[float, float]]:
    """Returns the bytes of a sample that cross each cut, forth and back.

    Without labels; a gradient takes what its value takes.

    Args:
        stages: What computes one after the other, by name.
        example: One sample `(1, C, H, W)`, normalised.
    """
    found = []
    depths = [[stage] for stage in stages.values()]
    for (own,) in measure(depths, example)[:-1]:
        trains = [v for v in own.outputs if getattr(v, "requires_grad", False)]
        found.append((num_bytes(own.outputs) / 2, num_bytes(trains) / 2))
    return found
