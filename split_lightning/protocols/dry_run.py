"""`DryRun`: applies a protocol's plans, message by message, without numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from split_lightning.engines.dry_run import measure_segments
from split_lightning.engines.meta import MetaParty
from split_lightning.message import Computed, Message, role_of
from split_lightning.protocols.actions import Train
from split_lightning.protocols.plan import Step
from split_lightning.protocols.protocol import Protocol
from split_lightning.protocols.round import Planned, Round
from split_lightning.store import State, tensors_in

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule

Event: TypeAlias = Message | Computed


class Samples(NamedTuple):
    """The batch of a client in a step, without numbers."""

    client_id: int
    inputs: Tensor
    targets: Tensor
    ref: None = None


class DryRun:
    """Applies the plans of a protocol without numbers.

    All messages have the sizes that they have in training: weights, optimizer states
    and what crosses a cut are tensors on torch's meta device. The module is of no
    further use.

    Args:
        module: Follows the protocol already.
        protocol: Makes the plans.
        example: One sample `(1, ...)`, as the network gets it.
    """

    def __init__(
        self, module: SplitLightningModule, protocol: Protocol, example: Tensor
    ) -> None:
        self.module, self.engine = module.train(), module.engine
        self.protocol = protocol
        self._events: list[Event] = []
        module.channel.observers.append(self._events.append)
        module.channel.computations.append(self._events.append)
        measured = measure_segments(self.engine, example)
        seats = [seat for store in self.engine.stores for seat in store.seats]
        outputs = {
            id(seat.module): own.outputs
            for store, own in zip(self.engine.stores, measured, strict=True)
            for seat in store.seats
        }
        self.engine.party_type = partial(MetaParty, lambda layers: outputs[id(layers)])
        # A server's passes over what arrived send nothing.
        self.engine.serve = lambda party, engine: party
        self._take_over_optimizers()
        for optimizer in self.engine.raw.values():
            _step_once(optimizer)
        self._states: dict[int, dict[str, State]] = {}  # of each live copy's optimizer
        for seat in seats:
            state = self.engine.raw[seat.role].state
            named = seat.module.named_parameters()
            own = {name: _on_meta(state[p]) for name, p in named if p in state}
            self._states[id(seat.module)] = own
            seat.module.to("meta")
        self._take_over_optimizers()
        self.engine.changed()

    def _take_over_optimizers(self) -> None:
        optimizers, _ = self.module.configure_optimizers()
        raw = dict(zip(self.module.optimizer_names, optimizers, strict=True))
        self.engine.use(raw, raw)

    def carry_out(self, round: Round) -> Iterator[tuple[Any, list[Event]]]:
        """Yields the actions of a round once they are applied, and their messages."""
        for step in self.protocol.steps(round):
            for action in step.before:
                self.protocol.carry_out([action], self.module)
                yield action, self._take()
            self._train(step)
            yield Train(step.parts), self._take()
            for action in step.after:
                self.protocol.carry_out([action], self.module)
                yield action, self._take()

    def _take(self) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        return events

    def _train(self, step: Step) -> None:
        """Does what the module's training step does."""
        self.engine.compute([_samples(batch) for batch in step.parts])
        full = self.engine.accumulated == self.module.accumulate_grad_batches
        if full or step.ends_turn or step.is_last:
            self.engine.accumulated = 0
            for party in self.engine.parties():
                self._step(party)
        self.engine.trained([batch.num_samples for batch in step.parts])

    def _step(self, party: MetaParty) -> None:
        """Gives a party the optimizer state that it has from its first step on."""
        state = self.engine.raw[role_of(party.name)].state
        for seat in party.segments.values():
            states = self._states[id(seat.module)]
            for name, parameter in seat.module.named_parameters():
                if name in states and parameter not in state:
                    state[parameter] = dict(states[name])


def _samples(batch: Planned) -> Samples:
    count = batch.num_samples
    inputs = torch.empty(count, device="meta")
    return Samples(
        batch.client_id, inputs, torch.empty(count, dtype=torch.int64, device="meta")
    )


def _step_once(optimizer: Optimizer) -> None:
    """Lets an optimizer make its states, by a step without a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _on_meta(state: State) -> State:
    tensors = {id(tensor) for tensor in tensors_in(state)}
    return {k: v.to("meta") if id(v) in tensors else v for k, v in state.items()}
