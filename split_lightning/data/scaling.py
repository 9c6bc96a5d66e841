"""Scaling: how a source's numbers become the network's inputs.

Integers of shape `(N, L)` are ids and reach the network as int64. All other integers
are divided by the largest value of their type (uint8 by 255, uint16 by 65,535). Floats
and booleans stay unchanged. Then the mean of each channel (axis 1) is subtracted
and the result divided by its standard deviation, in float32; ids stay unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Of the range of their type: integers that use less of it were not scaled to it.
_LEAST_RANGE = 0.01


def is_measured(inputs: Tensor) -> bool:
    """Returns whether inputs are measurements, rather than ids.

    >>> is_measured(torch.zeros(5, 7)), is_measured(torch.zeros(5, 7, dtype=torch.long))
    (True, False)
    """
    is_integer = not inputs.is_floating_point() and inputs.dtype != torch.bool
    return not is_integer or inputs.ndim > 2


def stored(inputs: Tensor) -> Tensor:
    """Returns inputs in the type in which they are held.

    Args:
        inputs: A source's inputs, of shape `(N, ...)`.

    Returns:
        uint8, float or bool inputs as they are; ids as int64; wider integers as
        float32, divided by the largest value of their type.

    Raises:
        ValueError: If an id is negative, or integers leave nearly all of the range of
            their type unused.
    """
    name = str(inputs.dtype).removeprefix("torch.")
    if not is_measured(inputs):
        ids = inputs.long()
        if ids.min() < 0:
            raise ValueError(
                "Expected `data.source` to return ids from 0, as integers of shape "
                f"(N, L) are, but got {int(ids.min())} ({name}). Return a table of "
                "numbers as floats."
            )
        return ids
    if inputs.is_floating_point() or inputs.dtype in (torch.bool, torch.uint8):
        return inputs
    largest = torch.iinfo(inputs.dtype).max
    values = inputs.to(torch.float32).div_(largest)
    peak = float(values.abs().max())
    if largest > 255 and peak < _LEAST_RANGE:
        raise ValueError(
            f"Expected `data.source` to return {name} inputs that use the range of "
            f"{name}, since integers are divided by its largest value ({largest:,}), "
            f"but got values up to {round(peak * largest):,}. Return them in a "
            "narrower type (`.to(torch.uint8)`), or as floats."
        )
    return values


def check_statistics(name: str, values: Sequence[float], inputs: Tensor) -> None:
    """Stops where there is neither one value for all channels, nor one for each.

    Args:
        name: The key of the values.
        values: Means or standard deviations.
        inputs: Inputs of shape `(N, C, ...)`.

    Raises:
        ValueError: Says how many channels there are.
    """
    channels = inputs.shape[1]
    if is_measured(inputs) and len(values) not in (1, channels):
        raise ValueError(
            f"Expected `data.{name}` to have one value for all channels, or one for "
            f"each of {channels} (axis 1 of inputs of shape "
            f"{('N', *inputs.shape[1:])}), but got {len(values)}.".replace("'N'", "N")
        )


def normalized(inputs: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Returns inputs `(B, C, ...)` as the network gets them: float32, or ids.

    Args:
        inputs: Inputs in the type in which they are held.
        mean: The mean of each channel, or one for all.
        std: The standard deviation of each channel, or one for all.
    """
    if not is_measured(inputs):
        return inputs.clone()
    values = inputs.to(torch.float32, copy=True)
    if inputs.dtype == torch.uint8:
        values.div_(255)
    options: Any
    by_channel = (-1,) + (1,) * (inputs.ndim - 2)
    options = {"dtype": torch.float32, "device": inputs.device}
    values.sub_(torch.tensor(mean, **options).view(by_channel))
    return values.div_(torch.tensor(std, **options).view(by_channel))
