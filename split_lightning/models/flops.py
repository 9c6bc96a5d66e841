"""Floating-point operations, as torch counts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def flop_counter() -> FlopCounterMode:
    """Returns a context in which matrix products and convolutions are counted.

    A multiplication and an addition are two operations.
    """
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _convolution_backward_flops(
    grad_out_shape: list[int],
    x_shape: list[int],
    weight_shape: list[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    out_shape: Any = None,
) -> int:
    """Returns the FLOPs of a convolution's backward.

    Each of its two gradients takes the products of the forward. (torch's own formula
    has those of the weight in a grouped convolution as many times as it has groups.)
    """
    forward = conv_flop_count(x_shape, weight_shape, grad_out_shape, transposed)
    return forward * sum(output_mask[:2])
