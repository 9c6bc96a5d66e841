"""`Piece`: layers that stay together, wherever they are held."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from split_lightning.joint_optimizer import JointOptimizer
from split_lightning.replicas import Replicas, State
from split_lightning.route import Party

Optimizers: TypeAlias = Mapping[str, Optimizer]
# The line of each holder, by the party that it is.
Entering: TypeAlias = Mapping[Party, Mapping[int, int]]


class Piece:
    """Layers that stay together: at clients, at servers, or now here, now there.

    Layers that both may hold are one pool where clients get weights from elsewhere:
    they go from whoever held them last to whoever holds them next, or the mean is over
    all. Where clients keep their own weights for ever, theirs are one pool and the
    servers' another.

    Args:
        name: What they are called.
        segment: The first live segment.
        make: Of each party that may hold them what makes the replicas of a segment.

    Attributes:
        live: The live segments of each party.
    """

    def __init__(
        self,
        name: str,
        segment: nn.Module,
        make: Mapping[Party, Callable[[nn.Module], Replicas]],
    ) -> None:
        self.name = name
        self.live: dict[Party, list[nn.Module]] = {
            party: [copy.deepcopy(segment) if number else segment]
            for number, party in enumerate(make)
        }
        self._make = make
        self._pools: dict[tuple[Party, ...], Replicas] = {}
        self.pool(is_one=True)

    @property
    def is_between(self) -> bool:
        """Whether clients as well as servers may hold it."""
        return len(self.live) > 1

    @property
    def is_one_pool(self) -> bool:
        """Whether its weights go between clients and servers."""
        return self.is_between and len(self._pools) == 1

    def pool(self, is_one: bool) -> None:
        """Says whether what clients hold and what servers hold are one pool.

        All that was remembered is forgotten where that changes.
        """
        parties = list(self.live)
        pools = [tuple(parties)] if is_one else [(party,) for party in parties]
        if pools == list(self._pools):
            return
        self._pools = {}
        for held_by in pools:
            first, *others = (s for party in held_by for s in self.live[party])
            replicas = self._make[held_by[0]](first)
            replicas.add_seats(others)
            self._pools[held_by] = replicas

    def make_room(self, num_clients: int) -> list[nn.Module]:
        """Makes room for so many clients that hold it to be live at once.

        Returns:
            The live segments that are new.
        """
        if "client" not in self.live:
            return []
        more = num_clients - len(self.live["client"])
        copies = [copy.deepcopy(self.live["client"][0]) for _ in range(more)]
        self.live["client"] += copies
        self.of("client").add_seats(copies)
        return copies

    def of(self, party: Party) -> Replicas:
        """Returns the replicas that a party's are among."""
        (found,) = (own for held_by, own in self._pools.items() if party in held_by)
        return found

    def pools(self) -> list[Replicas]:
        """Returns the replicas, those of all parties."""
        return list(self._pools.values())

    def enter(
        self, entering: Entering, optimizers: Optimizers, together: bool = False
    ) -> int:
        """Lets holders act next, each from where its line stands; see `Replicas.enter`.

        Returns:
            The bytes that would travel.
        """
        sent = 0
        for held_by, replicas in self._pools.items():
            seats = {
                number: self._seats(replicas, party)
                for party in held_by
                for number in entering.get(party, {})
            }
            lines = {n: k for p in held_by for n, k in entering.get(p, {}).items()}
            if not lines:
                replicas.seated = {}
                continue
            optimizer = self._optimizer(held_by, optimizers)
            sent += sum(replicas.enter(lines, optimizer, together, seats))
        return sent

    def _seats(self, replicas: Replicas, party: Party) -> list[int]:
        return [replicas.seats.index(segment) for segment in self.live[party]]

    def collect(self, party: Party, lines: list[int], optimizers: Optimizers) -> None:
        """Adds lines that are done to the mean; see `Replicas.collect`."""
        for held_by, replicas in self._pools.items():
            if party in held_by:
                replicas.collect(lines, self._optimizer(held_by, optimizers))

    def spread(self, party: Party, optimizers: Optimizers) -> dict[int, int]:
        """Lets all that share a pool with a party go on from the mean.

        Returns:
            The bytes of each holder: see `Replicas.spread`.
        """
        for held_by, replicas in self._pools.items():
            if party in held_by:
                return replicas.spread(self._optimizer(held_by, optimizers))
        return {}

    @staticmethod
    def _optimizer(held_by: tuple[Party, ...], optimizers: Optimizers) -> Any:
        if len(held_by) == 1:
            return optimizers[held_by[0]]
        return JointOptimizer([optimizers[party] for party in held_by])

    @property
    def are_apart(self) -> bool:
        """Whether holders' weights may differ from each other's."""
        return any(replicas.are_apart for replicas in self.pools())

    def forget(self, party: Party) -> None:
        """Goes back to before the first turn, with what is live, or shown, at a party.

        Args:
            party: One that may hold it; the others get the same.
        """
        shown = self.of(party).live
        for segment in (s for own in self.live.values() for s in own):
            if self.is_between and segment is not shown:
                segment.load_state_dict(shown.state_dict())
        for replicas in self.pools():
            replicas.forget()

    def hold(self, weights: Mapping[Party, Mapping[int, State | None]]) -> None:
        """Lets holders stand at given weights; those of `None` have the live ones."""
        for held_by, replicas in self._pools.items():
            replicas.hold({k: w for p in held_by for k, w in weights[p].items()})

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is remembered, in plain containers and tensors."""
        if len(self._pools) == 1:
            return self.pools()[0].state_dict()
        return {
            "apart": {held_by[0]: r.state_dict() for held_by, r in self._pools.items()}
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.pool(is_one="apart" not in state)
        own = state["apart"].values() if "apart" in state else [state]
        for replicas, remembered in zip(self.pools(), own, strict=True):
            replicas.load_state_dict(remembered)
