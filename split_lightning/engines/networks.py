"""`Networks`: the network of each client, to be evaluated, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from split_lightning.engines.local import LocalEngine
from split_lightning.message import Values
from split_lightning.store import StateStore


class Networks:
    """Puts the segments on a client's route together. Live states stay as they are.

    Args:
        engine: Knows which party has which state.
    """

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine

    def predict(self, client_id: int, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of a client's network."""
        flow: Values = (inputs,)
        for place in range(self.engine.num_places):
            sent: Values = ()
            for number, name in self._states(client_id):
                store = self.engine.stores[number]
                if store.place == place:
                    outputs = _evaluate(store, name, flow)
                    sent += outputs if isinstance(outputs, tuple) else (outputs,)
            flow = sent
        return self.engine.task.logits(flow)

    def segments(self, client_id: int) -> Iterator[tuple[int, str, nn.Module]]:
        """Yields the segments of a client's network: number, party and module.

        A segment whose state is at rest is a copy.
        """
        for number, name in self._states(client_id):
            store = self.engine.stores[number]
            module = store.live(name)
            if module is None:
                module = copy.deepcopy(store.seats[0].module)
                module.load_state_dict(store.weights_of(name), strict=False)
            party = self.engine.placement.of(client_id)[number]
            assert party is not None
            yield number, party, module

    def representatives(self) -> list[int]:
        """Returns one client for each network that differs; none if there is one."""
        every = range(self.engine.placement.num_clients)
        found: dict[Any, int] = {}
        for client in sorted(self.engine.seen) or every:
            found.setdefault(tuple(self._origins(client)), client)
        return sorted(found.values()) if len(found) > 1 else []

    def apart(self, clients: Sequence[int]) -> set[int]:
        """Returns the numbers of the segments in which clients' networks differ."""
        origins: dict[int, set[str | None]] = {}
        for client in clients:
            for number, origin in self._origins(client):
                origins.setdefault(number, set()).add(origin)
        return {number for number, own in origins.items() if len(own) > 1}

    def put(self, number: int, client_id: int, state: Mapping[str, Tensor]) -> None:
        """Gives a client weights of one segment from elsewhere."""
        name = self.engine.placement.of(client_id)[number]
        if name is not None:
            self.engine.stores[number].put(self.engine.state_name(name), state)
            self.engine.seen.add(client_id)

    def keep_only(self, client_id: int) -> None:
        """Puts one client's network in place for all, for good."""
        states = {n: module.state_dict() for n, _, module in self.segments(client_id)}
        for number, state in states.items():
            for seat in self.engine.stores[number].seats:
                seat.module.load_state_dict(state)
        self.engine.forget()
        self.engine.last_client = client_id

    def _states(self, client_id: int) -> Iterator[tuple[int, str]]:
        """Yields the segments on a client's route, with the party whose state it is."""
        group = self.engine.placement.group_of(client_id)
        for number, name in enumerate(self.engine.placement.of(client_id)):
            if name is not None:
                last = self.engine.stores[number].last.get(group)
                yield number, last or self.engine.state_name(name)

    def _origins(self, client_id: int) -> Iterator[tuple[int, str | None]]:
        for number, name in self._states(client_id):
            yield number, self.engine.stores[number].origin(name)


def _evaluate(store: StateStore, name: str, inputs: Values) -> Any:
    """Returns what a segment returns with the weights of a party."""
    module = store.live(name)
    if module is not None:
        return module(*inputs)
    module = store.seats[0].module
    device = next(module.parameters()).device
    weights = {k: v.to(device) for k, v in store.weights_of(name).items()}
    return functional_call(module, weights, inputs)
