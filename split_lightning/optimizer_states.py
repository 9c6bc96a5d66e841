"""Optimizer states: those of one segment among all that an optimizer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerStates: TypeAlias = dict[str, dict[str, Any]]  # by parameter


def states_of(segment: nn.Module, optimizer: Optimizer) -> OptimizerStates:
    """Returns the state of a segment's parameters in an optimizer."""
    return {
        name: optimizer.state[parameter]
        for name, parameter in segment.named_parameters()
        if parameter in optimizer.state
    }


def take_out(segment: nn.Module, optimizer: Optimizer) -> OptimizerStates:
    """Takes the state of a segment's parameters out of an optimizer.

    The live parameters stay the same objects, so that nothing is copied, and the
    optimizer can never step the parameters of another party.
    """
    states = states_of(segment, optimizer)
    for parameter in segment.parameters():
        optimizer.state.pop(parameter, None)
    return states


def put_in(
    segment: nn.Module, optimizer: Optimizer, states: Mapping[str, dict[str, Any]]
) -> None:
    """Gives an optimizer the state of a segment's parameters."""
    for name, parameter in segment.named_parameters():
        state = states.get(name)
        if state is None:
            optimizer.state.pop(parameter, None)
            continue
        for key, value in state.items():
            # From a checkpoint they come on the CPU; elsewhere nothing moves.
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = value.to(parameter.device)
        optimizer.state[parameter] = state


def flat(states: OptimizerStates) -> dict[str, Tensor]:
    """Returns the tensors of optimizer states, by parameter and name in one.

    >>> import torch
    >>> flat({"0.weight": {"step": torch.tensor(3.0), "momentum_buffer": None}})
    {'0.weight/step': tensor(3.)}
    """
    return {
        f"{parameter}/{name}": value
        for parameter, state in states.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def nested(tensors: Mapping[str, Tensor]) -> OptimizerStates:
    """Returns what `flat` made flat."""
    states: OptimizerStates = {}
    for key, value in tensors.items():
        parameter, _, name = key.rpartition("/")
        states.setdefault(parameter, {})[name] = value
    return states


def copied(states: OptimizerStates) -> OptimizerStates:
    """Returns optimizer states that share no memory with these."""
    return {
        parameter: {name: value.clone() for name, value in state.items()}
        for parameter, state in states.items()
    }
