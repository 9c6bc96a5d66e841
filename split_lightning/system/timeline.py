"""`Timeline`: when each party is ready, in virtual seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple, TypeAlias

from split_lightning.route import Party, Stage
from split_lightning.system.system import System
from split_lightning.system.work import Work

# Who computes each stretch of the network, and what that takes.
Itinerary: TypeAlias = tuple[Sequence[Stage], Sequence[Work]]


class Holder(NamedTuple):
    """What one of a client's holders has to do, where each has a part of its samples.

    Attributes:
        work: What it computes of a sample, up to the first cut.
        share: Its share of the client's weights.
    """

    work: Work
    share: float


class _Cut(NamedTuple):
    place: int
    forth: float
    back: float


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
        of_client: The route and the work of a client, where clients differ; all are of
            as many stretches. `None`: as above, of all.
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
        of_client: Callable[[int], Itinerary] | None = None,
        holders: Sequence[Holder] = (),
        label_holder: int = 0,
    ) -> None:
        self.system = system
        self.of_client = of_client or (lambda client_id: (route, work))
        self.holders = list(holders)
        self.label_holder = label_holder
        self._shares = [holder.share for holder in holders] or [1.0]
        self.clients: dict[int, float] = {}
        self.servers: dict[tuple[int, int], float] = {}
        # Of each device the gradients that it has no use for yet, where several of its
        # batches are on their way: when it has them, and the backward's seconds.
        self._gradients: dict[int, list[tuple[float, float]]] = {}
        self._handed_in = 0.0  # when the last hand-in was there
        self._servers_mean = 0.0  # when the last mean of servers was there
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
        of_holders: Sequence[tuple[float, float]] = (),
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
            of_holders: The bytes of each holder at the first cut; none: there is one.
        """
        times = {d: self._ready(d) for k in samples for d in self._devices(k)}
        own = {client_id: self.of_client(client_id) for client_id in samples}
        at_cuts = [{self.label_holder: both} for both in crossing]
        if of_holders:
            at_cuts[0] = dict(enumerate(of_holders))
        (route, _), *_ = own.values()
        places = range(len(route))
        sent = {k: self._first_cut(route, at_cuts) for k, (route, _) in own.items()}
        for place in places:
            rest = {
                k for k, cut in sent.items() if place <= cut.place and not cut.forth
            }
            self._compute(times, samples, group, own, place, "forward", rest)
            if place == 0:
                self.clients |= times
            if place < len(at_cuts):
                pairs = self._pairs(own, place)
                forth = {v: both[0] for v, both in at_cuts[place].items()}
                self._cross(times, samples, pairs, forth)
        for place in reversed(places):
            if place < len(at_cuts):
                pairs = {k: p[::-1] for k, p in self._pairs(own, place).items()}
                back = {v: both[1] for v, both in at_cuts[place].items()}
                self._cross(times, samples, pairs, back)
            if place > 0:
                rest = {k for k, c in sent.items() if place <= c.place and not c.back}
                self._compute(times, samples, group, own, place, "backward", rest)
        if any(route[0].party == "server" for route, _ in own.values()):
            self._compute(times, samples, group, own, 0, "backward")
            self.clients |= times
            return
        for client_id, (_, work) in own.items():
            works = zip(self._devices(client_id), self._works(work, 0), strict=True)
            for device, (_, backward) in works:
                flops = backward * samples[client_id] * (sent[client_id].back > 0)
                there = (times[device], flops / self.system.client(device).flops)
                self._gradients.setdefault(device, []).append(there)
                self._go_back(device, in_flight - 1)

    @staticmethod
    def _first_cut(
        route: Sequence[Stage], at_cuts: Sequence[Mapping[int, tuple[float, float]]]
    ) -> _Cut:
        """Returns where a client's first cut is, and what crosses it of a sample."""
        cuts = (place for place, stage in enumerate(route) if stage.is_cut)
        place = next(cuts, len(route))
        if place >= len(at_cuts):  # the network is not cut
            return _Cut(place, 1.0, 1.0)
        ways = zip(*at_cuts[place].values(), strict=True)
        return _Cut(place, *(sum(way) for way in ways))

    def _devices(self, client_id: int) -> range:
        """Returns the devices of a client's holders."""
        number = len(self._shares)
        return range(client_id * number, (client_id + 1) * number)

    def _works(self, work: Sequence[Work], place: int) -> list[Work]:
        """Returns what each holder of a client computes at a place of its route."""
        if place == 0 and self.holders:
            return [holder.work for holder in self.holders]
        nothing = [Work(0, 0)] * len(self._shares)
        nothing[self.label_holder] = work[place]
        return nothing

    def _go_back(self, device: int, waiting: int) -> None:
        """Lets a client compute backwards, until only so many gradients wait."""
        gradients = self._gradients.get(device, [])
        while len(gradients) > waiting:
            there, seconds = gradients.pop(0)
            self.clients[device] = max(self.clients[device], there) + seconds

    @staticmethod
    def _pairs(
        own: Mapping[int, Itinerary], place: int
    ) -> dict[int, tuple[Party, ...]]:
        """Returns who sends and who receives, for each client that crosses a cut."""
        return {
            k: tuple(stage.party for stage in route[place : place + 2])
            for k, (route, _) in own.items()
            if route[place].is_cut
        }

    def _server_ready(self, server: tuple[int, int]) -> float:
        return self.servers.get(server, self._servers_mean)

    def _ready(self, device: int) -> float:
        ready = self.clients.get(device, 0.0)
        if self._mean is not None and device not in self._mean[2]:
            made, num_bytes, there = self._mean
            there.add(device)
            own = num_bytes * self._shares[device % len(self._shares)]
            ready = max(ready, made) + self.system.client(device).receives(own)
        return ready

    def _compute(
        self,
        times: dict[int, float],
        samples: Mapping[int, int],
        group: int,
        own: Mapping[int, Itinerary],
        place: int,
        direction: Literal["forward", "backward"],
        rest: AbstractSet[int] = frozenset(),
    ) -> None:
        """Lets stages' parties work, but for clients that rest.

        A server works on the samples of its clients at once.
        """
        served: dict[int, list[int]] = {}
        flops: dict[int, float] = dict.fromkeys(times, 0.0)
        for k, (route, work) in own.items():
            pairs = zip(self._devices(k), self._works(work, place), strict=True)
            count = 0 if k in rest else samples[k]
            flops |= {d: getattr(w, direction) * count for d, w in pairs}
            if route[place].party == "client":
                for d in self._devices(k):
                    times[d] += flops[d] / self.system.client(d).flops
            else:
                served.setdefault(route[place].stretch, []).extend(self._devices(k))
        for stretch, devices in served.items():
            server = (group, stretch)
            begin = max([*(times[d] for d in devices), self._server_ready(server)])
            end = begin + sum(flops[d] for d in devices) / self.system.server_flops
            self.servers[server] = end
            times.update(dict.fromkeys(devices, end))

    def _cross(
        self,
        times: dict[int, float],
        samples: Mapping[int, int],
        pairs: Mapping[int, Sequence[Party]],
        num_bytes: Mapping[int, float],
    ) -> None:
        """Lets a sample's bytes, of each holder, go from one stage to another."""
        if not any(num_bytes.values()):
            return
        hopping = [k for k, pair in pairs.items() if "client" not in pair]
        total = sum(num_bytes.values()) * sum(samples[k] for k in hopping)
        taken = self.system.hops(total)
        for k, (sender, receiver) in pairs.items():
            devices = self._devices(k)
            if sender == receiver == "server":
                times.update({d: times[d] + taken for d in devices})
                continue
            for holder, own in num_bytes.items():
                link = self.system.client(devices[holder])
                carries = link.sends if sender == "client" else link.receives
                times[devices[holder]] += carries(own * samples[k])

    def hand_over(
        self, sender: int | None, receiver: int | None, num_bytes: float, group: int = 0
    ) -> None:
        """Weights go from one client to another, past a server, or only to or from it.

        The receiver goes on when it has them. Each holder hands its own to the same
        holder of the receiver.

        Args:
            sender: The client; `None`: the server.
            receiver: The client; `None`: the server.
            num_bytes: Of the weights.
            group: The server.
        """
        server = (group, 0)
        for holder, share in enumerate(self._shares):
            there, own = self._server_ready(server), num_bytes * share
            if sender is not None:
                device = self._devices(sender)[holder]
                there = self._ready(device) + self.system.client(device).sends(own)
            if receiver is not None:
                device = self._devices(receiver)[holder]
                there += self.system.client(device).receives(own)
                self.clients[device] = max(self._ready(device), there)
            else:
                self.servers[server] = max(self._server_ready(server), there)

    def hand_in(self, client_id: int, num_bytes: float) -> None:
        """A client that is done with its turn sends its weights, if any.

        It goes on when they are there.
        """
        for device, share in zip(self._devices(client_id), self._shares, strict=True):
            self._go_back(device, 0)
            there = self._ready(device)
            if num_bytes:
                there += self.system.client(device).sends(num_bytes * share)
            self.clients[device] = there
            self._handed_in = max(there, self._handed_in)

    def begin_turn(self, client_id: int, num_bytes: float) -> None:
        """A client gets the weights that were handed in last, if any, and begins."""
        for device, share in zip(self._devices(client_id), self._shares, strict=True):
            there = max(self._ready(device), self._handed_in)
            if num_bytes:
                there += self.system.client(device).receives(num_bytes * share)
            self.clients[device] = there

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
            device: num_bytes * share
            for k, num_bytes in members.items()
            for device, share in zip(self._devices(k), self._shares, strict=True)
        }
        links = {device: self.system.client(device) for device in own}
        made = max(self._ready(d) + links[d].sends(n) for d, n in own.items())
        for device, num_bytes in own.items():
            self.clients[device] = made + links[device].receives(num_bytes)
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
        self._servers_mean = max(self._servers_mean, made + taken)
        self.servers = dict.fromkeys(self.servers, self._servers_mean)

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
            "servers_mean": self._servers_mean,
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
        self._servers_mean = state.get("servers_mean", 0.0)
