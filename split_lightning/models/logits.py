"""Logits in what a network returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def logits_in(returned: Any) -> Any:
    """Returns what a mapping has under `logits`, and anything else unchanged.

    Hugging Face's networks return such mappings (`ModelOutput`).

    >>> logits_in({"loss": None, "logits": 3})
    3
    """
    if isinstance(returned, Mapping) and "logits" in returned:
        return returned["logits"]
    return returned


def described(returned: Any) -> str:
    """Returns in words what a network returned.

    >>> import torch
    >>> described((torch.zeros(2, 3), None))
    'a tuple of (a tensor of shape (2, 3), a NoneType)'
    """
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    if isinstance(returned, Mapping):
        return (
            f"a {type(returned).__name__} with the keys {', '.join(map(str, returned))}"
        )
    if isinstance(returned, tuple | list):
        held = ", ".join(map(described, returned))
        return f"a {type(returned).__name__} of ({held})"
    return f"a {type(returned).__name__}"
