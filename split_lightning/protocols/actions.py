"""Actions: the steps of a round's plan, as plain data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from typing_extensions import override

from split_lightning.engines.engine import Engine
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
    """A training step of one client, or of several together: a batch of the Trainer."""

    batches: tuple[Planned, ...]


class Action(ABC):
    """What the protocol applies between training steps; it comes with a batch.

    NOTE a dataclass that is frozen stops Lightning where it converts batches, such as
    with Trainer(precision="64-true").

    Attributes:
        closes: Whether it ends a turn or a round, and so is applied even where the
            round is cut short before it, such as by `limit_train_batches`.
        roles: The roles of the parties that it concerns; empty: those that it finds.
    """

    closes: bool = False
    roles: tuple[str, ...] = ()

    @abstractmethod
    def apply(self, engine: Engine) -> None:
        """Applies the action."""

    def concerns(self, client: int) -> bool:
        """Returns whether a client's next step needs what the action does."""
        return True

    def leaked(self, engine: Engine) -> set[str]:
        """Returns the parties that still have states which the action takes away.

        At the end of a round the last action of its class, with its roles, is asked.
        """
        return set()


@dataclass
class PassWeights(Action):
    """A client continues from the weights of the client before it.

    Each segment goes to the party that has it in this client's steps: the client's
    segments to the client; with a cut for each client, layers between the cuts to the
    client or to its server.
    """

    to: int
    optimizer_state: OptimizerState = "keep"

    @override
    def apply(self, engine: Engine) -> None:
        group, before = engine.placement.group_of(self.to), engine.last_client
        is_near = engine.placement.group_of(before) == group
        trained = dict(engine.segments_of(before)) if is_near else {}
        parts = _moving(self.optimizer_state)
        sent: dict[tuple[str, str], Values] = {}
        for store, taker in engine.segments_of(self.to):
            giver = trained.get(store, "")  # also one that trained without a hand-off
            if not store.has_own(giver, "parameters"):
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

    @override
    def leaked(self, engine: Engine) -> set[str]:
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

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of weights that are averaged."""
        return _moving("keep", self.buffers)

    def of(self, store: StateStore, roles: Collection[str]) -> OptimizerState:
        """Returns what happens to optimizer state of a segment in a mean of roles."""
        if "client" in roles and "client" in store.roles:
            return self.optimizer_state
        return self.server_optimizer_state

    def given_up(self, store: StateStore, roles: Collection[str]) -> tuple[Part, ...]:
        """Returns the parts of a segment's state that no party has after the mean."""
        if self.of(store, roles) == "keep":
            return self.parts
        return (*self.parts, "optimizer")


_DEFAULT = Policy()


@dataclass
class Contribute(Action):
    """A client's parties add their weights to the next mean, and forget them.

    They count as much as the samples that they trained on since the last mean.
    """

    client: int
    roles: tuple[str, ...] = ("client",)
    policy: Policy = _DEFAULT
    closes = True

    @override
    def concerns(self, client: int) -> bool:
        return client == self.client

    @override
    def apply(self, engine: Engine) -> None:
        sent: dict[str, Values] = {}
        for store, name in engine.segments_of(self.client):
            if role_of(name) in self.roles:
                _contribute(self, engine, store, engine.state_name(name), sent)
        _send_to_mean(engine, sent)


@dataclass
class Average(Action):
    """All parties of some roles continue from the mean of those that trained.

    Layers that clients and servers both have are averaged with the clients' where
    `pooled`; else those of each role by themselves.
    """

    roles: tuple[str, ...] = ("client",)
    policy: Policy = _DEFAULT
    pooled: bool = True
    closes = True

    @override
    def apply(self, engine: Engine) -> None:
        sent: dict[str, Values] = {}
        for store in engine.stores:
            roles = self._roles_in(store)
            for name in [k for k in store.samples if role_of(k) in roles]:
                _contribute(self, engine, store, name, sent)
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

    @override
    def leaked(self, engine: Engine) -> set[str]:
        found: set[str] = set()
        for store in engine.stores:
            roles = self._roles_in(store)
            for part in self.policy.given_up(store, self.roles):
                found |= store.parties_with(part, roles)
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
        if self.policy.of(store, self.roles) != "keep":
            store.share("optimizer", nested(optimizer), roles)
        for name in [k for k in store.samples if role_of(k) in roles]:
            del store.samples[name]
        return (*state.values(), *optimizer.values())


def _contribute(
    action: Contribute | Average,
    engine: Engine,
    store: StateStore,
    name: str,
    sent: dict[str, Values],
) -> None:
    """Adds a party's state of one segment to the next mean, and to what is sent."""
    roles, policy = action.roles, action.policy
    weight = store.samples.pop(name, 0)
    if weight == 0:  # it did not train, or none of its batches counted
        return
    state = {k: v for part in policy.parts for k, v in store.peek(name, part).items()}
    mean = engine.means.setdefault(engine.stores.index(store), StateMean())
    mean.weights.add(state, weight)
    mean.members.append(name)
    payload: Values = tuple(state.values())
    if policy.of(store, roles) == "travel":
        optimizer = flat(store.peek(name, "optimizer"))
        mean.optimizer.add(optimizer, weight)
        payload += tuple(optimizer.values())
    store.drop(name, policy.given_up(store, roles))
    sent[name] = sent.get(name, ()) + (
        payload if role_of(name) in policy.remote else ()
    )
    engine.changed()


def _send_to_mean(engine: Engine, sent: Mapping[str, Values]) -> None:
    for name, values in sent.items():
        engine.channel.send("weights", name, AGGREGATOR, values)


@dataclass
class Synchronize(Action):
    """Clients that share a state send theirs to be averaged, and get the mean back.

    In one process they have one state, so the action only sends the messages. Nothing
    is sent while gradients accumulate.
    """

    clients: tuple[int, ...]
    parts: tuple[Part, ...] = WEIGHTS

    @override
    def apply(self, engine: Engine) -> None:
        if engine.accumulated:
            return
        payloads: dict[str, Values] = {}
        for client in self.clients:
            for store, name in engine.segments_of(client, "client"):
                state = engine.state_name(name)
                own = (
                    v for part in self.parts for v in store.peek(state, part).values()
                )
                payloads[name] = payloads.get(name, ()) + tuple(own)
        for name, payload in payloads.items():
            engine.channel.send("weights", name, AGGREGATOR, payload)
        for name, payload in payloads.items():
            engine.channel.send("weights", AGGREGATOR, name, payload)


@dataclass
class Begin(Action):
    """A client begins its turn from the newest weights."""

    client: int
    optimizer_state: OptimizerState = "keep"
    buffers: Buffers = "average"

    @override
    def apply(self, engine: Engine) -> None:
        received: dict[str, Values] = {}
        parts = _moving(self.optimizer_state, self.buffers)
        for store, name in engine.segments_of(self.client, "client"):
            store.remember_start()
            if self.optimizer_state == "reset" and store.newest != name:
                store.drop(name, ("optimizer",))
            store.adopt(name, parts)
            payload = (t for part in parts for t in tensors_in(store.peek(name, part)))
            received[name] = received.get(name, ()) + tuple(payload)
        engine.changed()
        for name, values in received.items():
            engine.channel.send("weights", AGGREGATOR, name, values)


@dataclass
class Send(Action):
    """A client computes the forward pass of a batch with the weights it has now.

    The server takes the batch later. The gradient is computed for these weights, and
    the newest take the step (PipeDream, Harlap et al. 2018,
    https://arxiv.org/abs/1806.03377). BatchNorm's statistics are always the current
    ones. In one process the parameters are kept until then.
    """

    batch: Planned

    @override
    def apply(self, engine: Engine) -> None:
        key = (self.batch.client_id, self.batch.number)
        kept: dict[str, dict[int, Any]] = {}
        for store, name in engine.segments_of(self.batch.client_id, "client"):
            weights = clone(store.peek(name, "parameters"))
            kept.setdefault(name, {})[store.depth] = weights
        engine.stash[key] = kept


@dataclass
class Mix(Action):
    """The newest weights become a mixture with those of a client whose turn ends.

    The client's share is `(1 + age) ** -exponent`; at age 0 it is 1: a hand-off.
    """

    client: int
    age: int
    exponent: float = 0.5
    optimizer_state: OptimizerState = "keep"
    buffers: Buffers = "average"
    closes = True

    @override
    def apply(self, engine: Engine) -> None:
        share = (1 + self.age) ** -self.exponent
        payloads: dict[str, Values] = {}
        parts = _moving(self.optimizer_state, self.buffers)
        for store, name in engine.segments_of(self.client, "client"):
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

    @override
    def leaked(self, engine: Engine) -> set[str]:
        return {
            name
            for store in engine.stores
            for part in _moving(self.optimizer_state, self.buffers)
            for name in store.parties_with(part, ("client",))
        }


def _moving(
    optimizer_state: OptimizerState, buffers: Buffers = "average"
) -> tuple[Part, ...]:
    """Returns the parts of a state that move under these policies."""
    parts = WEIGHTS if buffers == "average" else WEIGHTS[:1]
    return (*parts, "optimizer") if optimizer_state == "travel" else parts
