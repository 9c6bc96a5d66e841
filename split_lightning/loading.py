"""What `load_from_checkpoint` builds a module with, beside its plain options."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.utils import instantiate
from torch import nn
from torch.optim import Optimizer

from split_lightning.models.weights import read_torch

# In a checkpoint: what builds the module, and the names of objects it was given.
CONFIGURATION, OBJECTS = "configuration", "objects"


def missing_arguments(
    kind: type, path: Any, given: Mapping[str, Any]
) -> tuple[type, dict[str, Any], dict[str, Any] | None]:
    """Returns the class of a checkpoint's module, and what builds it.

    A checkpoint that the command line wrote says how they are built: classes and plain
    options, as in `config.yaml`. Nothing is unpickled.

    Args:
        kind: The class that was asked for.
        path: The checkpoint's file.
        given: The arguments that were given.

    Returns:
        The class; the arguments that it needs beside those that were given; how the
        command line built it, if it did and nothing was given.

    Raises:
        ValueError: If the module is of another class, or an argument must be given.
    """
    content: Any = read_torch(path)
    stored = content.get(CONFIGURATION)
    if stored is not None:
        target = pkgutil.resolve_name(stored["_target_"])
        if not issubclass(target, kind):
            raise ValueError(
                f"Expected a checkpoint of a {kind.__name__}, but {path} is one of a "
                f"{target.__name__}: use {target.__name__}.load_from_checkpoint."
            )
        nodes = {k: v for k, v in stored.items() if k not in given and k[0] != "_"}
        built: dict[str, Any] = instantiate(nodes, _convert_="all")
        return target, built, None if given else stored
    lacking = [name for name in content.get(OBJECTS, ("network",)) if name not in given]
    if lacking:
        raise ValueError(
            f"Expected argument `{lacking[0]}` as the module of {path} had it: a "
            "checkpoint that was not written by the command line does not hold it. "
            f"Pass load_from_checkpoint(path, {lacking[0]}=...)."
        )
    needed = ("client_optimizer", "server_optimizer", "optimizer")
    lacks = [k for k in needed if k in _parameters(kind) and k not in given]
    return kind, {name: _NoOptimizer(name) for name in lacks}, None


def _parameters(kind: type) -> set[str]:
    """Returns the names of the arguments of a class and of those that it extends."""
    inits = (inspect.signature(own.__init__) for own in kind.__mro__)  # type: ignore[misc]
    return {name for own in inits for name in own.parameters}


class _NoOptimizer:
    """Stands for an optimizer that a module that only predicts does not need."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        raise ValueError(
            f"Expected argument `{self.name}` to train a module that was loaded, but "
            f"got none. Pass load_from_checkpoint(path, {self.name}=...)."
        )
