"""Work: the floating-point operations of a sample, from cut to cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from split_lightning.channel import num_bytes, values_of
from split_lightning.models.flops import flop_counter
from split_lightning.random_state import unchanged_random_state


class Work(NamedTuple):
    """What a stage computes of one sample in training.

    Attributes:
        forward: Floating-point operations of the forward.
        backward: Those of the backward, from the gradient behind the stage to the one
            before it (but for images, which need none).
    """

    forward: float
    backward: float


@unchanged_random_state()
def work_of(stages: Mapping[str, nn.Module], example: Tensor) -> list[Work]:
    """Counts the work of each stage, in the order in which they run.

    Counted is what torch counts: matrix products and convolutions, where nearly all of
    the work is; a multiplication and an addition are two operations.

    Args:
        stages: What computes one after the other, by name.
        example: One sample `(1, C, H, W)`, normalised.

    Returns:
        The work of each stage, in floating-point operations for one sample.
    """
    values: tuple[Any, ...] = (torch.cat([example, example]),)
    found = []
    for stage in stages.values():
        # A copy, in eval mode: neither statistics nor gradients are touched.
        own = copy.deepcopy(stage).eval()
        for parameter in own.parameters():
            parameter.grad = None
        with torch.enable_grad(), flop_counter() as counter:
            outputs = values_of(own(*values))
            forward = counter.get_total_flops()
            tensors = [v for v in outputs if isinstance(v, Tensor) and v.requires_grad]
            if tensors:
                gradients = [torch.ones_like(tensor) for tensor in tensors]
                torch.autograd.backward(tensors, gradients)
            total = counter.get_total_flops()
        found.append(Work(forward / 2, (total - forward) / 2))
        values = tuple(
            v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
            for v in outputs
        )
    return found


@unchanged_random_state()
def crossing_of(
    stages: Mapping[str, nn.Module], example: Tensor
) -> list[tuple[float, float]]:
    """Returns the bytes of a sample that cross each cut, forth and back.

    Without labels; a gradient takes what its value takes.

    Args:
        stages: What computes one after the other, by name.
        example: One sample `(1, C, H, W)`, normalised.
    """
    values: tuple[Any, ...] = (torch.cat([example, example]),)
    found = []
    for stage in list(stages.values())[:-1]:
        own = copy.deepcopy(stage).eval()
        with torch.enable_grad():
            values = values_of(own(*values))
        trains = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
        found.append((num_bytes(values) / 2, num_bytes(trains) / 2))
    return found
