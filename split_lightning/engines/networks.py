"""`Networks`: the network of each client, to be evaluated, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from split_lightning.engines.engine import Engine
from split_lightning.engines.remote import RemoteSite, SampleRef
from split_lightning.message import Values, as_values, role_of
from split_lightning.models.stage import stage_of
from split_lightning.store import StateStore
from split_lightning.task import Task
from split_lightning.topologies.topology import Topology


class Score(NamedTuple):
    """How good a network is on some samples.

    Attributes:
        loss: Their mean loss.
        right: The number of samples that are classified right.
        num_samples: The number of samples.
    """

    loss: Tensor
    right: int
    num_samples: int


def score_of(task: Task, outputs: Values, labels: Tensor) -> Score:
    """Returns how good a network's outputs are."""
    logits = task.logits(outputs)
    right = int((logits.argmax(dim=1) == labels).sum())
    return Score(task.loss(logits, labels), right, len(labels))


class Networks:
    """Puts the segments on a client's route together. Live states stay as they are.

    Args:
        engine: The engine with the states of all parties.
        topology: The segments.
    """

    def __init__(self, engine: Engine, topology: Topology) -> None:
        self.engine = engine
        self.topology = topology

    def predict(self, client_id: int, inputs: Tensor) -> Tensor:
        """Returns the logits `(B, K)` of a client's network."""
        flow: Values = (inputs,)
        for depth in range(self.engine.num_depths):
            sent: Values = ()
            for number, name in self._states(client_id):
                store = self.engine.stores[number]
                if store.depth == depth:
                    outputs = evaluated(store, name, flow)
                    sent += outputs if isinstance(outputs, tuple) else (outputs,)
            flow = sent
        return self.engine.task.logits(flow)

    def score(self, client_id: int, ref: SampleRef) -> Score:
        """Returns how good a client's network is on samples at the client's site."""
        placement, sites = self.engine.placement, self.engine.sites
        names = placement.of(client_id)
        flow: Values = (ref,)
        for depth in range(self.engine.num_depths):
            sent: Values = ()
            for number, name in self._states(client_id):
                store = self.engine.stores[number]
                if store.depth != depth:
                    continue
                site = sites.of(names[number] or "")
                if site is None:
                    sent += as_values(evaluated(store, name, flow))
                    continue
                site.lend(store, number, name, self.engine.version)
                if depth == self.engine.num_depths - 1:
                    found = site.call("score", number, name, flow, ref).result()
                    return Score(*found)
                stays = self._stays(client_id, depth, site)
                sent += site.call("evaluate", number, name, flow, stays).result()
            flow = sent
        site = sites.of(placement.label_party(client_id))
        assert site is not None
        (labels,) = site.call("labels", ref).result()
        return score_of(self.engine.task, flow, labels)

    def deliver(self, clients: Sequence[int]) -> dict[str, list[tuple[int, str]]]:
        """Sees to it that clients have their final network at their sites.

        Returns:
            For each site its segments, each with the party that has its weights.
        """
        found: dict[str, list[tuple[int, str]]] = {}
        for client_id in clients:
            names = self.engine.placement.of(client_id)
            for number, name in self._states(client_id):
                site = self.engine.sites.of(names[number] or "")
                if site is not None:
                    store = self.engine.stores[number]
                    site.lend(store, number, name, self.engine.version)
                    found.setdefault(site.name, []).append((number, name))
        return found

    def _stays(self, client_id: int, depth: int, site: RemoteSite) -> bool:
        """Returns whether what is behind a depth is computed at the same site."""
        names = self.engine.placement.of(client_id)
        following = {
            self.engine.sites.of(name)
            for store, name in zip(self.engine.stores, names, strict=True)
            if name is not None and store.depth == depth + 1
        }
        return following == {site}

    def segments(
        self, client_id: int, role: str | None = None
    ) -> Iterator[tuple[int, str, nn.Module]]:
        """Yields the segments of a client's network: number, party and module.

        A segment whose state is at rest is a copy.

        Args:
            client_id: The client.
            role: The role of the parties whose segments are wanted; `None`: of all.
        """
        for number, name in self._states(client_id):
            store = self.engine.stores[number]
            if role is not None and role_of(name) != role:
                continue
            module = store.live(name)
            if module is None:
                module = copy.deepcopy(store.seats[0].module)
                module.load_state_dict(store.weights_of(name), strict=False)
            party = self.engine.placement.of(client_id)[number]
            assert party is not None
            yield number, party, module

    def layers(
        self, client_id: int | None = None, role: str | None = None
    ) -> dict[str, nn.Module]:
        """Returns the layers of a client's network, by the name they are saved with.

        Args:
            client_id: The client; `None`: the one that trained last.
            role: The role of the parties whose layers are wanted; `None`: of all.
        """
        client = self.engine.last_client if client_id is None else client_id
        modules = [store.seats[0].module for store in self.engine.stores]
        for number, _, module in self.segments(client, role):
            modules[number] = module
        wanted = [
            name
            for name, store in zip(self.topology.names, self.engine.stores, strict=True)
            if role is None or role in store.roles
        ]
        found = self.topology.layers(modules)
        return {name: layers for name, layers in found.items() if name in wanted}

    def stages(self, client_id: int | None = None) -> dict[str, nn.Module]:
        """Returns the modules from inputs to logits in order, by role.

        Args:
            client_id: The client; `None`: the one that trained last.
        """
        client = self.engine.last_client if client_id is None else client_id
        parties, depths = list[list[str]](), list[list[list[nn.Module]]]()
        before = -1
        for number, name, module in self.segments(client):
            depth = self.topology.depths[number]
            if depth == before:  # side by side
                parties[-1].append(name)
                depths[-1][-1].append(module)
            elif parties and parties[-1] == [name]:
                depths[-1].append([module])
            else:
                parties.append([name])
                depths.append([[module]])
            before = depth
        found: dict[str, nn.Module] = {}
        for names, own in zip(parties, depths, strict=True):
            role = role_of(names[0]) if self.topology.is_split else "network"
            count = sum(key.partition("_")[0] == role for key in found) + 1
            found[role if count == 1 else f"{role}_{count}"] = stage_of(own)
        return found

    def names_of(self, client_id: int) -> set[str]:
        """Returns the names of the layers that are on a client's route."""
        return {self.topology.names[number] for number, _ in self._states(client_id)}

    def names_apart(self, clients: Sequence[int]) -> set[str]:
        """Returns the names of the layers in which clients' networks differ."""
        origins: dict[int, set[str | None]] = {}
        for client in clients:
            for number, origin in self._origins(client):
                origins.setdefault(number, set()).add(origin)
        apart = (number for number, own in origins.items() if len(own) > 1)
        return {self.topology.names[number] for number in apart}

    def put(self, states: Mapping[str, Mapping[int, Mapping[str, Tensor]]]) -> None:
        """Gives clients saved weights.

        Args:
            states: By the name of layers, for each client their state dict.
        """
        for number, layers in enumerate(self.topology.names):
            for client_id, state in states[layers].items():
                party = self.engine.placement.of(client_id)[number]
                if party is not None:
                    name = self.engine.state_name(party)
                    self.engine.stores[number].put(name, state)
                    self.engine.seen.add(client_id)

    def representatives(self) -> list[int]:
        """Returns one client for each network that differs; none if there is one."""
        every = range(self.engine.placement.num_clients)
        found: dict[Any, int] = {}
        for client in sorted(self.engine.seen) or every:
            found.setdefault(tuple(self._origins(client)), client)
        return sorted(found.values()) if len(found) > 1 else []

    def keep_only(self, client_id: int) -> None:
        """Gives all clients the network of one."""
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


def evaluated(store: StateStore, name: str, inputs: Values) -> Any:
    """Returns what a segment returns with the weights of a party."""
    module = store.live(name)
    if module is not None:
        return module(*inputs)
    module = store.seats[0].module
    device = next(module.parameters()).device
    weights = {k: v.to(device) for k, v in store.weights_of(name).items()}
    return functional_call(module, weights, inputs)
