"""`Timeline`: when each party is ready, in virtual seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from split_lightning.route import Stage
from split_lightning.system.system import System
from split_lightning.system.work import Work


class Timeline:
    """Computes when things would happen, from what depends on what.

    Each client and each server does one thing at a time, in the order in which they
    come. A step begins at a client when it is ready; a server computes a step when all
    that belongs to it is there and it has done with the step before; what crosses takes
    the link's time. Who does not wait for each other works at the same time, in
    whatever order it is computed here.

    Args:
        system: Devices and links.
        route: Who computes which stretch of the network.
        work: What each of them computes of a sample.

    Attributes:
        clients: When each client that ever acted is ready.
        servers: When each server is ready, by its group and its place on the route.
    """

    def __init__(
        self, system: System, route: Sequence[Stage], work: Sequence[Work]
    ) -> None:
        self.system = system
        self.route = list(route)
        self.work = list(work)
        self.clients: dict[int, float] = {}
        self.servers: dict[tuple[int, int], float] = {}
        # Of each client the gradients that it has no use for yet, where several of its
        # batches are on their way: when it has them, and the backward's seconds.
        self._gradients: dict[int, list[tuple[float, float]]] = {}
        self._handed_in = 0.0  # when the last hand-in was there
        # The last mean of the clients: when it was made, its bytes, and who has it.
        self._mean: tuple[float, float, set[int]] | None = None

    @property
    def now(self) -> float:
        """The time when all that has begun is done."""
        return max([*self.clients.values(), *self.servers.values()], default=0.0)

    def step(
        self,
        samples: Mapping[int, int],
        group: int,
        crossing: Sequence[tuple[float, float]],
        in_flight: int = 1,
    ) -> None:
        """A step of clients and their server.

        Args:
            samples: Number of samples of each client.
            group: Their server.
            crossing: For each cut the bytes of a sample that cross it, forth and back.
                Clients compute no forward where they send nothing, and no backward
                where nothing comes back.
            in_flight: How many batches of a client may be on their way: its backward
                comes after the forwards of the next `in_flight - 1`.
        """
        times = {client_id: self._ready(client_id) for client_id in samples}
        places = list(enumerate(self.route))
        sends, returns = (num > 0 for num in (crossing[0] if crossing else (1, 1)))
        for place, stage in places:
            if place > 0 or sends:
                self._compute(times, samples, group, stage, self.work[place].forward)
            if place == 0:
                self.clients |= times
            if place < len(crossing):
                pair = self.route[place : place + 2]
                self._cross(times, samples, pair, crossing[place][0])
        for place, stage in reversed(places):
            if place < len(crossing):
                pair = self.route[place : place + 2][::-1]
                self._cross(times, samples, pair, crossing[place][1])
            if stage.party == "server" or place > 0:
                self._compute(times, samples, group, stage, self.work[place].backward)
        if self.route[0].party == "server":
            self.clients |= times
            return
        for client_id, time in times.items():
            flops = self.work[0].backward * samples[client_id] * returns
            seconds = flops / self.system.client(client_id).flops
            self._gradients.setdefault(client_id, []).append((time, seconds))
            self._go_back(client_id, in_flight - 1)

    def _go_back(self, client_id: int, waiting: int) -> None:
        """Lets a client compute backwards, until only so many gradients wait."""
        gradients = self._gradients.get(client_id, [])
        while len(gradients) > waiting:
            there, seconds = gradients.pop(0)
            self.clients[client_id] = max(self.clients[client_id], there) + seconds

    def _ready(self, client_id: int) -> float:
        ready = self.clients.get(client_id, 0.0)
        if self._mean is not None and client_id not in self._mean[2]:
            made, num_bytes, there = self._mean
            there.add(client_id)
            ready = max(ready, made) + self.system.client(client_id).receives(num_bytes)
        return ready

    def _compute(
        self,
        times: dict[int, float],
        samples: Mapping[int, int],
        group: int,
        stage: Stage,
        flops: float,
    ) -> None:
        """Lets a stage's party work; a server on the samples of all clients at once."""
        if stage.party == "client":
            for k, count in samples.items():
                times[k] += flops * count / self.system.client(k).flops
            return
        server = (group, stage.stretch)
        begin = max([*times.values(), self.servers.get(server, 0.0)])
        end = begin + flops * sum(samples.values()) / self.system.server_flops
        self.servers[server] = end
        times.update(dict.fromkeys(times, end))

    def _cross(
        self,
        times: dict[int, float],
        samples: Mapping[int, int],
        pair: Sequence[Stage],
        num_bytes: float,
    ) -> None:
        """Lets a sample's bytes, if any, go from one stage to another."""
        if not num_bytes:
            return
        sender, receiver = (stage.party for stage in pair)
        for k, count in samples.items():
            device = self.system.client(k)
            if sender == "client":
                times[k] += device.sends(num_bytes * count)
            elif receiver == "client":
                times[k] += device.receives(num_bytes * count)
        if sender == receiver == "server":
            taken = self.system.hops(num_bytes * sum(samples.values()))
            times.update({k: time + taken for k, time in times.items()})

    def hand_over(self, sender: int, receiver: int, num_bytes: float) -> None:
        """Weights go from one client to another, past a server.

        The receiver goes on when it has them.
        """
        there = (
            self._ready(sender)
            + self.system.client(sender).sends(num_bytes)
            + self.system.client(receiver).receives(num_bytes)
        )
        self.clients[receiver] = max(self._ready(receiver), there)

    def hand_in(self, client_id: int, num_bytes: float) -> None:
        """A client that is done with its turn sends its weights, if any.

        It goes on when they are there.
        """
        self._go_back(client_id, 0)
        there = self._ready(client_id)
        if num_bytes:
            there += self.system.client(client_id).sends(num_bytes)
        self.clients[client_id] = there
        self._handed_in = max(there, self._handed_in)

    def begin_turn(self, client_id: int, num_bytes: float) -> None:
        """A client gets the weights that were handed in last, if any, and begins."""
        there = max(self._ready(client_id), self._handed_in)
        if num_bytes:
            there += self.system.client(client_id).receives(num_bytes)
        self.clients[client_id] = there

    def average_clients(self, members: Mapping[int, float]) -> None:
        """Clients send their weights to where the mean is made, and get it back.

        It is made when all are there. Others get it when they act next.

        Args:
            members: The bytes that go up, and come down, for each.
        """
        made = self.exchange(members)
        self._mean = (made, max(members.values()), set(members))

    def exchange(self, members: Mapping[int, float]) -> float:
        """Clients send something to where a mean is made, and get that back.

        Args:
            members: The bytes that go up, and come down, for each.

        Returns:
            When the mean was made.
        """
        devices = {k: self.system.client(k) for k in members}
        made = max(self._ready(k) + devices[k].sends(n) for k, n in members.items())
        for client_id, num_bytes in members.items():
            self.clients[client_id] = made + devices[client_id].receives(num_bytes)
        return made

    def average_servers(self, members: Mapping[int, float]) -> None:
        """Servers send their weights to where the mean is made, and get it back.

        Args:
            members: The bytes that go there, and come back, for each group's servers; 0
                where replicas are at one place.
        """
        own = [server for server in self.servers if server[0] in members]
        made = max(
            self.servers[server]
            + (self.system.hops(members[server[0]]) if members[server[0]] else 0.0)
            for server in own
        )
        back = max(members.values())
        taken = self.system.hops(back) if back else 0.0
        self.servers = dict.fromkeys(self.servers, made + taken)

    def state_dict(self) -> dict[str, Any]:
        """Returns all times, in plain containers."""
        mean = None if self._mean is None else [*self._mean[:2], sorted(self._mean[2])]
        return {
            "clients": dict(self.clients),
            "servers": [[*server, time] for server, time in self.servers.items()],
            "mean": mean,
            "gradients": {
                k: [list(own) for own in waiting]
                for k, waiting in self._gradients.items()
            },
            "handed_in": self._handed_in,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.clients = dict(state["clients"])
        self.servers = {(g, stretch): time for g, stretch, time in state["servers"]}
        mean = state["mean"]
        self._mean = None if mean is None else (mean[0], mean[1], set(mean[2]))
        self._gradients = {
            k: [(there, seconds) for there, seconds in waiting]
            for k, waiting in state.get("gradients", {}).items()
        }
        self._handed_in = state.get("handed_in", 0.0)
