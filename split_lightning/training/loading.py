"""The arguments of `load_from_checkpoint` besides plain options."""

from __future__ import annotations

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
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the arguments that build the module of a checkpoint.

    A checkpoint that the command line wrote says how they are built: classes and plain
    options, as in `config.yaml`. Nothing is unpickled.

    Args:
        kind: The module's class.
        path: The checkpoint's file.
        given: The arguments that were given.

    Returns:
        The arguments that it needs beside those that were given; how the command line
        built it, if it did and nothing was given.

    Raises:
        ValueError: If an argument must be given.
    """
    content: Any = read_torch(path)
    stored = content.get(CONFIGURATION)
    if stored is not None:
        nodes = {k: v for k, v in stored.items() if k not in given and k[0] != "_"}
        built: dict[str, Any] = instantiate(nodes, _convert_="all")
        return built, None if given else stored
    lacking = [name for name in content.get(OBJECTS, ("network",)) if name not in given]
    if lacking:
        raise ValueError(
            f"Expected argument `{lacking[0]}` as the module of {path} had it: a "
            "checkpoint that was not written by the command line does not hold it. "
            f"Pass load_from_checkpoint(path, {lacking[0]}=...)."
        )
    needed = ("client_optimizer", "server_optimizer")
    return {name: _NoOptimizer(name) for name in needed if name not in given}, None


class _NoOptimizer:
    """Stands for an optimizer that a module that only predicts does not need."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        raise ValueError(
            f"Expected argument `{self.name}` to train a module that was loaded, but "
            f"got none. Pass load_from_checkpoint(path, {self.name}=...)."
        )
