"""`Timeline`: when each party is ready, in virtual seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from split_lightning.route import Stage
from split_lightning.system.system import System
from split_lightning.system.work import Work


class Holder(NamedTuple):
    """What one of a client's holders has to do, where each has a part of its samples.

    Attributes:
        work: What it computes of a sample, up to the first cut.
        share: Its share of the client's weights.
    """

    work: Work
    share: float


class Timeline:
    """Computes when things would happen, from what depends on what.

    Each client and each server does one thing at a time, in the order in which they
    come. A step begins at a client when it is ready; a server computes a step when all
    that belongs to it is there and it has done with the step before; what crosses takes
    the link's time. Who does not wait for each other works at the same time, in
    whatever order it is computed here.

    A client that is a group of holders has a device for each, which compute and send at
    the same time: of V holders, holder v of client k has the device k * V + v.

    Args:
        system: Devices and links.
        route: Who computes which stretch of the network.
        work: What each of them computes of a sample.
        holders: What each holder of a client has to do; none: it is one device.
        label_holder: Which of them has the labels, and what is behind the last cut.

    Attributes:
        clients: When each client that ever acted is ready; of holders each device.
        servers: When each server is ready, by its group and its place on the route.
    """

    def __init__(
        self,
        system: System,
        route: Sequence[Stage],
        work: Sequence[Work],
        holders: Sequence[Holder] = (),
        label_holder: int = 0,
    ) -> None:
        self.system = system
        self.route = list(route)
        self.work = list(work)
        self.holders = list(holders) or [Holder(self.work[0], 1.0)]
        self.label_holder = label_holder
        self.clients: dict[int, float] = {}
        self.servers: dict[tuple[int, int], float] = {}
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
        of_holders: Sequence[tuple[float, float]] = (),
    ) -> None:
        """A step of clients and their server.

        Args:
            samples: Number of samples of each client.
            group: Their server.
            crossing: For each cut the bytes of a sample that cross it, forth and back.
            of_holders: Those of each holder at the first cut; none: there is one.
        """
        counts = {d: n for k, n in samples.items() for d in self._devices(k)}
        times = {device: self._ready(device) for device in counts}
        first = list(of_holders) or list(crossing[:1])
        places = list(enumerate(self.route))
        for place, stage in places:
            works = [own.forward for own in self._work_at(place)]
            self._compute(times, counts, group, stage, works)
            if place < len(crossing):
                pair = self.route[place : place + 2]
                own = self._at_cut(place, crossing, first)
                self._cross(times, counts, pair, {v: b[0] for v, b in own.items()})
        for place, stage in reversed(places):
            if place < len(crossing):
                pair = self.route[place : place + 2][::-1]
                own = self._at_cut(place, crossing, first)
                self._cross(times, counts, pair, {v: b[1] for v, b in own.items()})
            works = [own.backward for own in self._work_at(place)]
            self._compute(times, counts, group, stage, works)
        self.clients |= times

    def _devices(self, client_id: int) -> range:
        """Returns the devices of a client's holders."""
        number = len(self.holders)
        return range(client_id * number, (client_id + 1) * number)

    def _work_at(self, place: int) -> list[Work]:
        """Returns what each holder computes at a place of the route."""
        if place == 0:
            return [holder.work for holder in self.holders]
        nothing = [Work(0, 0)] * len(self.holders)
        nothing[self.label_holder] = self.work[place]
        return nothing

    def _at_cut(
        self,
        cut: int,
        crossing: Sequence[tuple[float, float]],
        first: Sequence[tuple[float, float]],
    ) -> dict[int, tuple[float, float]]:
        """Returns the bytes of a sample of each holder that has to do with a cut."""
        return {self.label_holder: crossing[cut]} if cut else dict(enumerate(first))

    def _ready(self, device: int) -> float:
        ready = self.clients.get(device, 0.0)
        if self._mean is not None and device not in self._mean[2]:
            made, num_bytes, there = self._mean
            there.add(device)
            own = num_bytes * self.holders[device % len(self.holders)].share
            ready = max(ready, made) + self.system.client(device).receives(own)
        return ready

    def _compute(
        self,
        times: dict[int, float],
        counts: Mapping[int, int],
        group: int,
        stage: Stage,
        flops: Sequence[float],
    ) -> None:
        """Lets a stage's party work; a server on the samples of all clients at once."""
        if stage.party == "client":
            for device, count in counts.items():
                own = flops[device % len(self.holders)]
                times[device] += own * count / self.system.client(device).flops
            return
        server = (group, stage.stretch)
        begin = max([*times.values(), self.servers.get(server, 0.0)])
        taken = sum(flops) * self._total(counts) / self.system.server_flops
        end = begin + taken
        self.servers[server] = end
        times.update(dict.fromkeys(times, end))

    def _cross(
        self,
        times: dict[int, float],
        counts: Mapping[int, int],
        pair: Sequence[Stage],
        of_holders: Mapping[int, float],
    ) -> None:
        """Lets a sample's bytes go from one stage to another."""
        sender, receiver = (stage.party for stage in pair)
        if sender == receiver == "server":
            (num_bytes,) = of_holders.values()
            taken = self.system.hops(num_bytes * self._total(counts))
            times.update({k: time + taken for k, time in times.items()})
            return
        for number, count in counts.items():
            holder, device = number % len(self.holders), self.system.client(number)
            if holder in of_holders:
                carries = device.sends if sender == "client" else device.receives
                times[number] += carries(of_holders[holder] * count)

    def _total(self, counts: Mapping[int, int]) -> int:
        """Returns the number of samples of all clients of a step."""
        return sum(counts.values()) // len(self.holders)

    def hand_over(self, sender: int, receiver: int, num_bytes: float) -> None:
        """Weights go from one client to another, past a server.

        The receiver goes on when it has them. Each holder hands its own to the same
        holder of the receiver.
        """
        pairs = zip(self._devices(sender), self._devices(receiver), strict=True)
        for holder, (one, other) in zip(self.holders, pairs, strict=True):
            own = num_bytes * holder.share
            there = (
                self._ready(one)
                + self.system.client(one).sends(own)
                + self.system.client(other).receives(own)
            )
            self.clients[other] = max(self._ready(other), there)

    def average_clients(self, members: Mapping[int, float]) -> None:
        """Clients send their weights to where the mean is made, and get it back.

        It is made when all are there. Others get it when they act next.

        Args:
            members: The bytes that go up, and come down, for each.
        """
        made = self.exchange(members)
        there = {device for k in members for device in self._devices(k)}
        self._mean = (made, max(members.values()), there)

    def exchange(self, members: Mapping[int, float]) -> float:
        """Clients send something to where a mean is made, and get that back.

        Args:
            members: The bytes that go up, and come down, for each.

        Returns:
            When the mean was made.
        """
        own = {
            device: num_bytes * holder.share
            for k, num_bytes in members.items()
            for device, holder in zip(self._devices(k), self.holders, strict=True)
        }
        devices = {k: self.system.client(k) for k in own}
        made = max(self._ready(k) + devices[k].sends(n) for k, n in own.items())
        for device, num_bytes in own.items():
            self.clients[device] = made + devices[device].receives(num_bytes)
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.clients = dict(state["clients"])
        self.servers = {(g, stretch): time for g, stretch, time in state["servers"]}
        mean = state["mean"]
        self._mean = None if mean is None else (mean[0], mean[1], set(mean[2]))
