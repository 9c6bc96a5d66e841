"""`JointOptimizer`: the states of several parties' optimizers, as those of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override


class JointOptimizer:
    """What of several optimizers is needed where layers go from one to another.

    Attributes:
        state: The state of each parameter, in the optimizer that it is of.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.state = _JointState(optimizers)


class _JointState(MutableMapping[nn.Parameter, Any]):
    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._states = {
            parameter: optimizer.state
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @override
    def __getitem__(self, parameter: nn.Parameter) -> Any:
        if parameter not in self._states[parameter]:  # which would make an empty one
            raise KeyError(parameter)
        return self._states[parameter][parameter]

    @override
    def __setitem__(self, parameter: nn.Parameter, state: Any) -> None:
        self._states[parameter][parameter] = state

    @override
    def __delitem__(self, parameter: nn.Parameter) -> None:
        del self._states[parameter][parameter]

    @override
    def __iter__(self) -> Iterator[nn.Parameter]:
        return (p for p, state in self._states.items() if p in state)

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)
