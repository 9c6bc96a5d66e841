"""`Clock`: when each party is ready, in virtual seconds, from the messages it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from split_lightning.channel import Channel
from split_lightning.message import AGGREGATOR, Computed, Message, role_of
from split_lightning.system.system import Device, System
from split_lightning.system.work import Work


class Clock:
    """Computes when things would happen on the devices and links of a system.

    A party does one thing at a time, in order of arrival. Computing takes
    time, and so does each message; a message leaves when its sender is ready, and its
    receiver continues when it is there. A link carries the messages of a step one after
    the other. Parties that do not wait for each other work at the same time, regardless
    of the order in which they are computed here. Not counted: optimizer steps,
    validation and tests.

    Args:
        system: Devices and links.
        work: The work of each segment for one sample.
        num_holders: Number of holders that a client consists of: holder v of client k
            has device k * num_holders + v.
        server_work: How often a server computes a batch in a step.
        in_flight: Number of batches that a client may have on their way: its backward
            pass comes after the forward passes of the next `in_flight - 1`.
        shares_means: Whether clients that took no part in a mean get it before their
            next step.

    Attributes:
        ready: When each party is ready.
    """

    def __init__(
        self,
        system: System,
        work: Callable[[int], Work],
        num_holders: int = 1,
        server_work: int = 1,
        in_flight: int = 1,
        shares_means: bool = True,
    ) -> None:
        self.system = system
        self.work = work
        self.num_holders = num_holders
        self.server_work = server_work
        self.in_flight = in_flight
        self.shares_means = shares_means
        self.ready: dict[str, float] = {}
        self._free: dict[tuple[str, str], tuple[int, float]] = {}  # step, and when
        self._servers_mean = 0.0  # when the last mean of servers was made
        # The last mean of clients: its time, its bytes, and the clients that have it.
        self._mean: tuple[float, int, set[str]] | None = None
        self._is_collecting = False  # whether a next mean of clients is being made
        # Of each client gradients that wait: when they are there, and the seconds of
        # the backward pass.
        self._gradients: dict[str, list[tuple[float, float]]] = {}
        self._there: dict[str, float] = {}
        # Of clients with several batches on their way: when the batch of the step is
        # ready; the client continues with others.
        self._aside: dict[str, float] = {}

    @property
    def now(self) -> float:
        """The time when all that has begun is done."""
        times = (t for name, t in self.ready.items() if role_of(name) != "aggregator")
        return max(times, default=0.0)

    def __call__(self, event: Message | Computed) -> None:
        """Takes the time of a message, or of a computation."""
        if isinstance(event, Message):
            self._deliver(event)
        else:
            self._compute(event)

    def watch(self, channel: Channel) -> None:
        """Begins to look at a channel."""
        channel.observers.append(self)
        channel.computations.append(self)

    def leave(self, channel: Channel) -> None:
        """Stops looking at a channel."""
        for observers in (channel.observers, channel.computations):
            if self in observers:
                observers.remove(self)

    def _compute(self, event: Computed) -> None:
        name = event.party
        work = self.work(event.segment)
        flops = work.forward if event.direction == "forward" else work.backward
        flops *= event.num_samples
        if role_of(name) == "server":
            seconds = flops * self.server_work / self.system.server_flops
        else:
            seconds = flops / self._device(name).flops
        if name in self._there:  # a gradient that came while it computes on
            waiting = self._gradients.setdefault(name, [])
            waiting.append((self._there.pop(name), seconds))
            self._go_back(name, self.in_flight - 1)
            return
        if self.in_flight > 1 and event.segment == 0 and event.direction == "forward":
            self._aside.pop(name, None)
            self.ready[name] = self._aside[name] = self._ready(name) + seconds
        else:
            self._set(name, self._ready(name) + seconds)

    def _set(self, name: str, time: float) -> None:
        times = self._aside if name in self._aside else self.ready
        times[name] = time

    def _go_back(self, name: str, waiting: int) -> None:
        """Lets a client compute backwards, until only so many gradients wait."""
        gradients = self._gradients.get(name, [])
        while len(gradients) > waiting:
            there, seconds = gradients.pop(0)
            self.ready[name] = max(self._ready(name), there) + seconds

    def _deliver(self, message: Message) -> None:
        sender, receiver = message.sender, message.receiver
        is_weights = message.kind == "weights"
        if is_weights and role_of(sender) == "client":
            self._aside.pop(sender, None)
            self._go_back(sender, 0)
        num_bytes = message.num_bytes
        link = sender, receiver
        begin = self._ready(sender, receiver)
        step, free = self._free.get(link, (-1, 0.0))
        if not is_weights and step == message.step:
            begin = max(begin, free)
        latency, seconds_per_byte = self._link(sender, receiver)
        free = begin + num_bytes * seconds_per_byte
        if message.kind in ("smashed", "labels", "gradient"):
            self._free[link] = message.step, free
        arrival = free + latency if num_bytes else begin
        if self.in_flight > 1 and message.kind == "gradient" and message.cut == 0:
            self._there[receiver] = arrival
            self._aside.pop(receiver, None)
            return
        if receiver == AGGREGATOR:
            self._gather(message, arrival)
            return
        if sender == AGGREGATOR and is_weights:
            self._share(message, begin)
        self._set(receiver, max(self._ready(receiver), arrival))

    def _gather(self, message: Message, arrival: float) -> None:
        role = role_of(message.sender)
        key = f"{AGGREGATOR}/{role}"
        self.ready[key] = max(self.ready.get(key, 0.0), arrival)
        if message.kind != "weights":
            return
        self._is_collecting = self._is_collecting or role == "client"
        if not self.shares_means:
            # A client's turn is over when its weights are there.
            self.ready[message.sender] = arrival

    def _share(self, message: Message, made: float) -> None:
        """Notes which clients have the last mean."""
        name = message.receiver
        if role_of(name) == "server":
            self._servers_mean = max(self._servers_mean, made)
            return
        if self.shares_means:
            if self._is_collecting or self._mean is None:
                self._mean = made, message.num_bytes, set()
                self._is_collecting = False
            self._mean[2].add(name)

    def _ready(self, name: str, receiver: str = "") -> float:
        """Returns when a party is ready, once it has the last mean."""
        if name in self._aside:
            return self._aside[name]
        role = role_of(name)
        if role == "aggregator":
            return self.ready.get(f"{AGGREGATOR}/{role_of(receiver)}", 0.0)
        ready = self.ready.get(name, 0.0)
        if role == "server":
            return max(ready, self._servers_mean)
        if self._mean is not None and name not in self._mean[2]:
            made, num_bytes, there = self._mean
            there.add(name)
            ready = max(ready, made) + self._device(name).receives(num_bytes)
            self.ready[name] = ready
        return ready

    def _device(self, name: str) -> Device:
        number, _, holder = name.partition("/")[2].partition(".")
        return self.system.client(int(number) * self.num_holders + int(holder or 0))

    def _link(self, sender: str, receiver: str) -> tuple[float, float]:
        """Returns the latency of a link, and the seconds that a byte takes."""
        ends = role_of(sender) == "client", role_of(receiver) == "client"
        if not any(ends):
            return self.system.server_latency, 8 / self.system.server_link
        latency = seconds = 0.0
        if ends[0]:
            own = self._device(sender)
            latency, seconds = own.latency, 8 / own.uplink
        if ends[1]:
            own = self._device(receiver)
            latency, seconds = latency + own.latency, seconds + 8 / own.downlink
        return latency, seconds

    def state_dict(self) -> dict[str, Any]:
        """Returns all times, in plain containers."""
        mean = None if self._mean is None else [*self._mean[:2], sorted(self._mean[2])]
        return {
            "ready": dict(self.ready),
            "mean": mean,
            "is_collecting": self._is_collecting,
            "aside": dict(self._aside),
            "servers_mean": self._servers_mean,
            "gradients": {
                name: [list(own) for own in waiting]
                for name, waiting in self._gradients.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self.ready = dict(state["ready"])
        mean = state["mean"]
        self._mean = None if mean is None else (mean[0], mean[1], set(mean[2]))
        self._is_collecting = state["is_collecting"]
        self._aside = dict(state["aside"])
        self._servers_mean = state["servers_mean"]
        self._gradients = {
            name: [(there, seconds) for there, seconds in waiting]
            for name, waiting in state["gradients"].items()
        }
