"""Actions: the steps of a round's plan, as plain data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from split_lightning.engines.local import LocalEngine
from split_lightning.message import AGGREGATOR, Values, role_of
from split_lightning.protocols.round import Planned
from split_lightning.running_mean import StateMean, mixed
from split_lightning.store import (
    PARTS,
    WEIGHTS,
    Part,
    StateStore,
    clone,
    flat,
    nested,
    tensors_in,
)

# The policy for optimizer state (momentum) where weights move: each party keeps its
# own, it travels with the weights, or it is reset.
OptimizerState: TypeAlias = Literal["keep", "travel", "reset"]
# Whether buffers (BatchNorm's statistics) are averaged, or each party keeps its own.
Buffers: TypeAlias = Literal["average", "keep"]


class Train(NamedTuple):
    """A training step of one client, or of several together."""

    batches: tuple[Planned, ...]


class PassWeights(NamedTuple):
    """A client continues from the weights of the client before it.

    Each segment goes to the party that has it in this client's steps: the client's
    segments to the client; with a cut for each client, layers between the cuts to the
    client or to its server.
    """

    to: int
    optimizer_state: OptimizerState = "keep"

    def apply(self, engine: LocalEngine) -> None:
        """Applies the action."""
        group = engine.placement.group_of(self.to)
        parts = PARTS if self.optimizer_state == "travel" else WEIGHTS
        sent: dict[tuple[str, str], Values] = {}
        for store, taker in engine.homes(self.to):
            giver = store.last.get(group, taker)
            store.last[group] = taker
            if giver == taker:
                continue
            # What all parties have (a mean) needs no sending.
            own = [part for part in parts if store.has_own(giver, part)]
            store.move(giver, taker, parts)
            if self.optimizer_state == "reset":
                store.drop(giver, ("optimizer",))
                store.drop(taker, ("optimizer",))
            payload = (t for part in own for t in tensors_in(store.peek(taker, part)))
            sent[giver, taker] = sent.get((giver, taker), ()) + tuple(payload)
            engine.changed()
        for (giver, taker), values in sent.items():
            if values:
                engine.channel.send("weights", giver, taker, values)

    def leaked(self, engine: LocalEngine) -> set[str]:
        """Returns the parties that still have what they passed on."""
        parts = WEIGHTS if self.optimizer_state == "keep" else PARTS
        return {
            name
            for store in engine.stores
            for part in parts
            for name in (store.parties_with(part, store.roles) if store.last else ())
            if name not in store.last.values()
        }


class Policy(NamedTuple):
    """What is averaged, and what happens to the rest.

    Attributes:
        optimizer_state: What happens to optimizer state: of clients, and of layers that
            clients and servers both have.
        server_optimizer_state: The same for servers.
        buffers: Whether buffers are averaged.
        remote: The roles whose parties are at different places, so that averaging sends
            something.
    """

    optimizer_state: OptimizerState = "keep"
    server_optimizer_state: OptimizerState = "keep"
    buffers: Buffers = "average"
    remote: tuple[str, ...] = ("client",)

    def of(self, roles: Collection[str]) -> OptimizerState:
        """Returns what happens to optimizer state of some roles."""
        if "client" in roles:
            return self.optimizer_state
        return self.server_optimizer_state

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of weights that are averaged."""
        return WEIGHTS if self.buffers == "average" else WEIGHTS[:1]


class Contribute(NamedTuple):
    """A client's parties add their weights to the next mean, and forget them.

    They count as much as the samples that they trained on since the last mean.
    """

    client: int
    roles: tuple[str, ...] = ("client",)
    policy: Policy = Policy()

    def apply(self, engine: LocalEngine) -> None:
        """Applies the action."""
        sent: dict[str, Values] = {}
        for store, name in engine.homes(self.client):
            if role_of(name) in self.roles:
                own = engine.state_name(name)
                roles = _pool(store, self.roles)
                _contribute(engine, store, own, self.policy, roles, sent)
        _send_to_mean(engine, sent)


class Average(NamedTuple):
    """All parties of some roles continue from the mean of those that trained.

    Layers that clients and servers both have are averaged with the clients' where
    `pooled`; else those of each role by themselves.
    """

    roles: tuple[str, ...] = ("client",)
    policy: Policy = Policy()
    pooled: bool = True

    def apply(self, engine: LocalEngine) -> None:
        """Applies the action."""
        sent: dict[str, Values] = {}
        for store in engine.stores:
            roles = self._roles_in(store)
            for name in [k for k in store.samples if role_of(k) in roles]:
                _contribute(engine, store, name, self.policy, roles, sent)
        _send_to_mean(engine, sent)
        received: dict[str, Values] = {}
        for number, store in enumerate(engine.stores):
            roles = self._roles_in(store)
            mean = engine.means.pop(number, None) if roles else None
            if mean is not None:
                payload = self._share(store, mean, roles)
                for name in mean.members:
                    own = payload if role_of(name) in self.policy.remote else ()
                    received[name] = received.get(name, ()) + own
        for name, values in received.items():
            engine.channel.send("weights", AGGREGATOR, name, values)
        engine.changed()

    def leaked(self, engine: LocalEngine) -> set[str]:
        """Returns the parties that still have what was averaged."""
        found: set[str] = set()
        for store in engine.stores:
            roles, parts = self._roles_in(store), self.policy.parts
            if self.policy.of(roles) != "keep":
                parts = (*parts, "optimizer")
            found.update(*(store.parties_with(part, roles) for part in parts))
        return found

    def _roles_in(self, store: StateStore) -> list[str]:
        """Returns the roles whose states of a segment are averaged."""
        if not self.pooled or len(store.roles) == 1:
            return [role for role in store.roles if role in self.roles]
        return store.roles if "client" in self.roles else []

    def _share(self, store: StateStore, mean: StateMean, roles: list[str]) -> Values:
        """Lets parties continue from a mean; returns its tensors."""
        state = mean.weights.state()
        for part in self.policy.parts:
            names = store.peek(mean.members[0], part)
            store.share(part, {name: state[name] for name in names}, roles)
        optimizer = mean.optimizer.state()
        if self.policy.of(roles) != "keep":
            store.share("optimizer", nested(optimizer), roles)
        for name in [k for k in store.samples if role_of(k) in roles]:
            del store.samples[name]
        return (*state.values(), *optimizer.values())


def _pool(store: StateStore, roles: tuple[str, ...]) -> Collection[str]:
    """Returns the roles whose policy a segment follows."""
    return store.roles if "client" in roles else roles


def _contribute(
    engine: LocalEngine,
    store: StateStore,
    name: str,
    policy: Policy,
    roles: Collection[str],
    sent: dict[str, Values],
) -> None:
    """Adds a party's state of one segment to the next mean, and to what is sent."""
    weight = store.samples.pop(name, 0)
    if weight == 0:  # it did not train, or none of its batches counted
        return
    parts = policy.parts
    state = {k: v for part in parts for k, v in store.peek(name, part).items()}
    mean = engine.means.setdefault(engine.stores.index(store), StateMean())
    mean.weights.add(state, weight)
    mean.members.append(name)
    payload: Values = tuple(state.values())
    if policy.of(roles) == "travel":
        optimizer = flat(store.peek(name, "optimizer"))
        mean.optimizer.add(optimizer, weight)
        payload += tuple(optimizer.values())
    if policy.of(roles) != "keep":
        parts = (*parts, "optimizer")
    store.drop(name, parts)
    sent[name] = sent.get(name, ()) + (
        payload if role_of(name) in policy.remote else ()
    )
    engine.changed()


def _send_to_mean(engine: LocalEngine, sent: Mapping[str, Values]) -> None:
    for name, values in sent.items():
        engine.channel.send("weights", name, AGGREGATOR, values)


class Synchronize(NamedTuple):
    """Clients that share a state send theirs to be averaged, and get the mean back.

    In one process they have one state, so the action only sends the messages. Nothing
    is sent while gradients accumulate.
    """

    clients: tuple[int, ...]
    parts: tuple[Part, ...] = WEIGHTS

    def apply(self, engine: LocalEngine) -> None:
        """Applies the action."""
        if engine.accumulated:
            return
        payloads: dict[str, Values] = {}
        for client in self.clients:
            for store, name in engine.homes(client, "client"):
                state = engine.state_name(name)
                own = (
                    v for part in self.parts for v in store.peek(state, part).values()
                )
                payloads[name] = payloads.get(name, ()) + tuple(own)
        for name, payload in payloads.items():
            engine.channel.send("weights", name, AGGREGATOR, payload)
        for name, payload in payloads.items():
            engine.channel.send("weights", AGGREGATOR, name, payload)


class Begin(NamedTuple):
    """A client begins its turn from the newest weights."""

    client: int
    optimizer_state: OptimizerState = "keep"
    buffers: Buffers = "average"

    def apply(self, engine: LocalEngine) -> None:
        """Applies the action."""
        received: dict[str, Values] = {}
        for store, name in engine.homes(self.client, "client"):
            store.remember_start()
            parts: tuple[Part, ...] = WEIGHTS
            if self.buffers == "keep":
                parts = WEIGHTS[:1]
            if self.optimizer_state == "travel":
                parts = (*parts, "optimizer")
            elif self.optimizer_state == "reset" and store.newest != name:
                store.drop(name, ("optimizer",))
            store.adopt(name, parts)
            payload = (t for part in parts for t in tensors_in(store.peek(name, part)))
            received[name] = received.get(name, ()) + tuple(payload)
        engine.changed()
        for name, values in received.items():
            engine.channel.send("weights", AGGREGATOR, name, values)


class Send(NamedTuple):
    """A client computes the forward pass of a batch with the weights it has now.

    The server takes the batch later. The gradient is computed for these weights, and
    the newest take the step (PipeDream, Harlap et al. 2018,
    https://arxiv.org/abs/1806.03377). BatchNorm's statistics are always the current
    ones. In one process the parameters are kept until then.
    """

    batch: Planned

    def apply(self, engine: LocalEngine) -> None:
        """Applies the action."""
        key = (self.batch.client_id, self.batch.number)
        kept: dict[str, dict[int, Any]] = {}
        for store, name in engine.homes(self.batch.client_id, "client"):
            weights = clone(store.peek(name, "parameters"))
            kept.setdefault(name, {})[store.depth] = weights
        engine.stash[key] = kept


class Mix(NamedTuple):
    """The newest weights become a mixture with those of a client whose turn ends.

    The client's share is `(1 + age) ** -exponent`; at age 0 it is 1: a hand-off.
    """

    client: int
    age: int
    exponent: float = 0.5
    optimizer_state: OptimizerState = "keep"
    buffers: Buffers = "average"

    def apply(self, engine: LocalEngine) -> None:
        """Applies the action."""
        share = (1 + self.age) ** -self.exponent
        payloads: dict[str, Values] = {}
        parts: tuple[Part, ...] = WEIGHTS if self.buffers == "average" else WEIGHTS[:1]
        if self.optimizer_state == "travel":
            parts = (*parts, "optimizer")
        for store, name in engine.homes(self.client, "client"):
            if name not in store.names():
                continue  # its turn did not begin
            common = store.common["client"]
            payload: Values = ()
            for part in parts:
                own = store.peek(name, part)
                payload += tuple(tensors_in(own))
                if part == "optimizer":
                    newest = flat(common.get(part, {}))
                    common[part] = nested(mixed(newest, flat(own), share))
                else:
                    common[part] = mixed(common[part], own, share)
            resets = self.optimizer_state == "reset"
            before = store.newest
            if resets and before not in (None, name):
                assert before is not None
                if not store.has_own(before, "parameters"):  # its turn is over
                    store.drop(before, ("optimizer",))
            store.newest = name if share == 1 else None
            if resets and share < 1:
                store.drop(name, ("optimizer",))
            store.drop(name, parts)
            store.samples.pop(name, None)
            payloads[name] = payloads.get(name, ()) + payload
        engine.changed()
        for name, values in payloads.items():
            engine.channel.send("weights", name, AGGREGATOR, values)

    def leaked(self, engine: LocalEngine) -> set[str]:
        """Returns the clients that still have what was mixed, once all turns ended."""
        parts: tuple[Part, ...] = WEIGHTS if self.buffers == "average" else WEIGHTS[:1]
        if self.optimizer_state == "travel":
            parts = (*parts, "optimizer")
        return {
            name
            for store in engine.stores
            for part in parts
            for name in store.parties_with(part, ("client",))
        }


Action: TypeAlias = (
    PassWeights | Contribute | Average | Synchronize | Begin | Send | Mix
)


def closes(actions: Iterable[Any]) -> list[Any]:
    """Returns the actions that are still due where a round is cut short."""
    return [a for a in actions if isinstance(a, Contribute | Average | Mix)]
