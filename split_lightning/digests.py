"""Digests of options and parts, the same in all processes where these are the same."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None), Enum, torch.dtype, torch.device)


def digest(value: Any) -> str:
    """Returns a digest of an option, or of a part with its options, in 64 hex digits.

    A function is digested as its name, an object as its class and its plain public
    attributes, and a module as that of each of its layers, and its state dict.

    Args:
        value: A plain value, a container, a tensor, a partial, or any object.

    >>> digest(partial(torch.optim.SGD, lr=0.1)) == digest(torch.optim.SGD)
    False
    """
    return sha256(_words(value).encode()).hexdigest()


def _words(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        content = sha256(numbers.numpy().tobytes()).hexdigest()
        return f"{value.dtype} {tuple(value.shape)} {content}"
    if isinstance(value, Mapping):
        pairs = sorted((str(key), _words(own)) for key, own in value.items())
        return "{" + ", ".join(f"{key!r}: {own}" for key, own in pairs) + "}"
    if isinstance(value, list | tuple):  # a configuration has lists alone
        return f"[{', '.join(map(_words, value))}]"
    if isinstance(value, partial):
        return _words([value.func, value.args, value.keywords])
    if isinstance(value, nn.Module):
        layers = [[k, type(own), _options(own)] for k, own in value.named_modules()]
        return _words([layers, value.state_dict()])
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _words([type(value), _options(value)])


def _options(part: Any) -> dict[str, Any]:
    """Returns the plain public attributes of an object."""
    own = getattr(part, "__dict__", {})
    return {
        name: value
        for name, value in own.items()
        if name[0] != "_" and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
