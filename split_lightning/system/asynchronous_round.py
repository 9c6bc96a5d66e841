"""`AsynchronousRound`: the order of events where clients train at the same time."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, NamedTuple

from split_lightning.system.seconds import Seconds


class Turn(NamedTuple):
    """A client's turn.

    Attributes:
        number: Its number in the order of a round robin.
        client_id: The client.
        counts: Number of samples in each of its batches.
    """

    number: int
    client_id: int
    counts: list[int]


class Served(NamedTuple):
    """The server takes a step on a batch.

    Attributes:
        client_id: The client of the batch.
        num_samples: Number of samples in it.
        ends_turn: Whether it is the last of its turn.
        time: When the server begins with it, in seconds since the round's start.
    """

    client_id: int
    num_samples: int
    ends_turn: bool
    time: float


class Ended(NamedTuple):
    """A client's turn ends: its weights are mixed into the newest.

    Attributes:
        client_id: The client.
        age: Number of turns that ended since this one began.
        time: When.
    """

    client_id: int
    age: int
    time: float


class Began(NamedTuple):
    """A client begins a turn, from the newest weights.

    Attributes:
        client_id: The client.
        time: When.
    """

    client_id: int
    time: float


Event = Served | Ended | Began


class _Kind(IntEnum):
    """The order of events at the same time."""

    END = 0
    ARRIVAL = 1
    SERVICE = 2
    BEGIN = 3


class _Running:
    """A turn that has begun.

    Attributes:
        turn: The turn.
        age: Number of turns that ended since it began.
        ready: When the client's device is free.
        arrived: When the last batch is at the server.
        sent: Number of batches that were sent.
    """

    def __init__(self, turn: Turn, ready: float) -> None:
        self.turn = turn
        self.age = 0
        self.ready = self.arrived = ready
        self.sent = 0


class AsynchronousRound:
    """Simulates a round in which clients train at the same time against one server.

    All begin at time 0. The server takes batches first come, first served. A client
    does one thing at a time, in the order of one-forward-one-backward (PipeDream,
    Harlap et al. 2018, https://arxiv.org/abs/1806.03377): `in_flight` forwards, then
    a backward and a forward in turn; what it sends arrives in the order in which it was
    sent. After its last gradient the client sends its weights; the turn ends
    when they arrive.

    At equal times ends of turns come first, then arrivals, services and begins of
    turns; among equals, in the order of the turns (services: of arrival). So a client
    that begins gets the newest weights.

    A heap of events instead of a library: so the order of simultaneous events is stated
    here.

    Args:
        turns: The turns of the round, in the order of a round robin.
        seconds: The seconds of each part of a batch.
        in_flight: Number of batches that a client may have on their way.
        max_staleness: No turn ends at a greater age; a client that could make one so
            old waits. `None`: no client waits.
    """

    def __init__(
        self,
        turns: Iterable[Turn],
        seconds: Seconds,
        in_flight: int = 1,
        max_staleness: int | None = None,
    ) -> None:
        self.seconds = seconds
        self.in_flight = in_flight
        self.max_staleness = max_staleness
        self._heap: list[tuple[float, _Kind, int, tuple[Any, ...]]] = []
        self._left: dict[int, deque[Turn]] = {}  # of each client
        for turn in turns:
            self._left.setdefault(turn.client_id, deque()).append(turn)
        # The turns that wait until they may begin.
        self._waiting = [(own[0].number, client) for client, own in self._left.items()]
        heapq.heapify(self._waiting)
        self._running: dict[int, _Running] = {}
        self._free = 0.0  # when the server is
        self._services = 0
        self._events: list[Event] = []

    def run(self) -> list[Event]:
        """Returns the events, in order."""
        self._push(0.0, _Kind.BEGIN, 0)
        happen: dict[_Kind, Callable[..., None]] = {
            _Kind.END: self._end,
            _Kind.ARRIVAL: self._arrive,
            _Kind.SERVICE: self._serve,
            _Kind.BEGIN: self._begin,
        }
        while self._heap:
            time, kind, _, what = heapq.heappop(self._heap)
            happen[kind](time, *what)
        return self._events

    def _push(self, time: float, kind: _Kind, rank: int, *what: Any) -> None:
        heapq.heappush(self._heap, (time, kind, rank, what))

    def _may_begin(self) -> bool:
        """Returns whether one more turn leaves all ages within the bound.

        In the worst case all other turns end before the oldest one.
        """
        if self.max_staleness is None:
            return True
        oldest = max((own.age for own in self._running.values()), default=0)
        return oldest + len(self._running) <= self.max_staleness

    def _begin(self, time: float) -> None:
        while self._waiting and self._may_begin():
            _, client_id = heapq.heappop(self._waiting)
            turn = self._left[client_id].popleft()
            self._events.append(Began(client_id, time))
            ready = time + self.seconds.download(client_id)
            self._running[client_id] = _Running(turn, ready)
            for _ in range(self.in_flight):
                self._send(client_id)

    def _send(self, client_id: int) -> None:
        """Lets a client compute the forward of its next batch, and send it."""
        own = self._running[client_id]
        number = own.sent
        if number == len(own.turn.counts):
            return
        taken = self.seconds.of_batch(client_id, own.turn.counts[number])
        own.ready += taken.forward
        own.arrived = max(own.arrived, own.ready + taken.up)
        own.sent += 1
        self._push(own.arrived, _Kind.ARRIVAL, own.turn.number, client_id, number)

    def _arrive(self, time: float, client_id: int, number: int) -> None:
        begin = max(time, self._free)
        count = self._running[client_id].turn.counts[number]
        self._free = begin + self.seconds.of_batch(client_id, count).service
        self._push(begin, _Kind.SERVICE, self._services, client_id, number)
        self._services += 1

    def _serve(self, time: float, client_id: int, number: int) -> None:
        own = self._running[client_id]
        turn = own.turn
        count, is_last = turn.counts[number], number + 1 == len(turn.counts)
        self._events.append(Served(client_id, count, is_last, time))
        taken = self.seconds.of_batch(client_id, count)
        back = time + taken.service + taken.down
        own.ready = max(own.ready, back) + taken.backward
        if is_last:
            there = own.ready + self.seconds.upload(client_id)
            self._push(there, _Kind.END, turn.number, client_id)
        else:
            self._send(client_id)

    def _end(self, time: float, client_id: int) -> None:
        own = self._running.pop(client_id)
        self._events.append(Ended(client_id, own.age, time))
        for other in self._running.values():
            other.age += 1
        if self._left[client_id]:
            following = self._left[client_id][0]
            heapq.heappush(self._waiting, (following.number, client_id))
        self._push(time, _Kind.BEGIN, 0)
