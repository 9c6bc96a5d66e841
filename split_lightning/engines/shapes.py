"""`Shapes`: what passes between a site and the process with the Trainer looks like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from split_lightning.engines.engine import Engine
from split_lightning.engines.wire import most_bytes
from split_lightning.message import Values, as_values, num_bytes
from split_lightning.models.vertical import Bottom
from split_lightning.placement import client_of
from split_lightning.random_state import unchanged_random_state
from split_lightning.store import PARTS, WEIGHTS, Part, State, StateStore

_JOINED = 3  # samples, at most, of two batches that are too small to be trained on
_OF_THE_REST = 1 << 16  # bytes: options, random numbers, an error's message


class Shapes:
    """Knows shapes and types of what segments return, and of their states.

    A segment is run once for each kind of input: on zeros, and as a copy.

    Args:
        engine: Has the segments.
        example: One sample, as the network gets it, of shape `(1, ...)`.
        batch_size: The number of samples in a batch.
        new_optimizer: Makes the optimizer of clients' parameters.

    Attributes:
        most_bytes: How large a frame may be: of a state, or of a batch's activations.
    """

    def __init__(
        self,
        engine: Engine,
        example: Tensor,
        batch_size: int,
        new_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ) -> None:
        self.engine = engine
        self.example = example.to("meta")
        self.batch_size = max(batch_size, _JOINED)
        self.new_optimizer = new_optimizer
        self._outputs: dict[Any, Values] = {}
        self._states: dict[tuple[int, Part], State] = {}
        self.most_bytes = self._most_bytes()

    def inputs(self, num_samples: int) -> Tensor:
        """Returns samples without numbers."""
        return self.example.expand(num_samples, *self.example.shape[1:])

    def segment_of(self, party: str, depth: int) -> int | None:
        """Returns the number of a party's segment at a depth; `None`: it has none."""
        stores = self.engine.segments_of(client_of(party))
        found = (own for own, name in stores if name == party and own.depth == depth)
        store = next(found, None)
        return None if store is None else self.engine.stores.index(store)

    def outputs(self, segment: int, inputs: Values, training: bool = True) -> Values:
        """Returns what a segment returns, without numbers.

        Args:
            segment: Its number.
            inputs: What it gets, with or without numbers.
            training: Whether it trains; if not, it is evaluated.
        """
        key = segment, training, tuple(map(_kind, inputs))
        if key not in self._outputs:
            self._outputs[key] = _run(self._copy(segment).train(training), inputs)
        return self._outputs[key]

    def may_lack(self, segment: int) -> bool:
        """Returns whether a segment leaves out samples that its party lacks."""
        module = self.engine.stores[segment].seats[0].module
        return any(isinstance(m, Bottom) and m.may_lack for m in module.modules())

    def state(self, segment: int, part: Part) -> State:
        """Returns a part of a state, without numbers; of an optimizer after a step."""
        key = segment, part
        if key not in self._states:
            if part in WEIGHTS:
                found = self.engine.stores[segment].live_state(part)
            else:
                found = self._optimizer_state(segment)
            self._states[key] = without_numbers(found)
        return self._states[key]

    def _most_bytes(self) -> int:
        segments = [n for n, s in enumerate(self.engine.stores) if "client" in s.roles]
        states = [most_bytes(self.state(n, part)) for n in segments for part in PARTS]
        activations = [
            most_bytes(values) + num_bytes(values) * self.batch_size // 2
            for values in self._between()
        ]
        return _OF_THE_REST + max(states + activations)

    def _between(self) -> list[Values]:
        """Returns what passes between depths, of two samples of each layout."""
        placement, found = self.engine.placement, list[Values]()
        clients = {placement.layout_number(k): k for k in range(placement.num_clients)}
        for client in clients.values():
            flow: Values = (self.inputs(2),)
            for depth in range(self.engine.num_depths):
                segments = [
                    number
                    for number, name in enumerate(placement.of(client))
                    if name is not None and self.engine.stores[number].depth == depth
                ]
                outputs = (self.outputs(n, flow, training=False) for n in segments)
                flow = tuple(value for own in outputs for value in own)
                found.append(flow)
        return found

    def _optimizer_state(self, segment: int) -> State:
        module = self._copy(segment)
        named = dict(module.named_parameters())
        if not named:
            return {}
        with unchanged_random_state():
            optimizer = self.new_optimizer(named.values())
            for parameter in named.values():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        states = optimizer.state
        return {name: dict(states[p]) for name, p in named.items() if p in states}

    def _copy(self, segment: int) -> nn.Module:
        """Returns a copy, which may change."""
        store: StateStore = self.engine.stores[segment]
        module = copy.deepcopy(store.seats[0].module)
        for parameter in module.parameters():
            parameter.grad = None
        return module


def _run(module: nn.Module, inputs: Values) -> Values:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    values = (_zeros(v, device) if isinstance(v, Tensor) else v for v in inputs)
    with unchanged_random_state(), torch.set_grad_enabled(module.training):
        outputs: Values = without_numbers(as_values(module(*values)))
    return outputs


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    """Returns zeros; a mask of the samples that are there is true."""
    number = like.dtype == torch.bool
    found = torch.full(like.shape, number, dtype=like.dtype, device=device)
    return found.requires_grad_(like.requires_grad)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    return value


def without_numbers(value: Any) -> Any:
    """Returns tensors in plain containers as tensors without numbers."""
    if isinstance(value, Tensor):
        empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return empty.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: without_numbers(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_numbers, value))
    return value
