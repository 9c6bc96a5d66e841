"""`AsynchronousSchedule`: clients train at the same time, against one server."""

from __future__ import annotations

from collections import Counter

from typing_extensions import override

from split_lightning.data.asynchronous_round import (
    AsynchronousRound,
    Event,
    Served,
    Turn,
    events_of_turns,
)
from split_lightning.data.schedule import Draw, RoundRobinSchedule, Step
from split_lightning.data.seconds import EqualSeconds, Seconds
from split_lightning.data.service import Service


class AsynchronousSchedule(RoundRobinSchedule):
    """No client waits for another's turn: the server takes batches as they arrive.

    Each client has the turns that it would have in a `RoundRobinSchedule`, and they all
    run at the same time. A round begins for all at once, and ends when all are done
    with it: each passes over its samples as often as in any other protocol, so that the
    slowest decides how long a round takes. What happens when is simulated
    (`AsynchronousRound`) from what `seconds` says; nothing waits in truth.

    Args:
        shuffle: Whether the order of turns is drawn anew for each round; it decides
            among those who would begin, or be served, at the same time.
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        local_steps: Number of batches in a turn, after which it is handed in; `None`:
            all of the round.
        max_staleness: No hand-in is older than this number of hand-ins; who could make
            one so, waits. 0 is the round robin in turn. `None`: nobody waits.
        in_flight: Number of batches that a client may have on their way. Its forward is
            on the weights from before the last `in_flight - 1` of them.

    Attributes:
        seconds: How long things take. `EqualSeconds`, so that clients' batches
            alternate, until a `VirtualClock` knows better.

    Raises:
        ValueError: If an argument is out of range.
    """

    hands_in = True

    def __init__(
        self,
        shuffle: bool = False,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
        max_staleness: int | None = None,
        in_flight: int = 1,
    ) -> None:
        super().__init__(shuffle, clients_per_round, local_steps)
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(
                "Expected argument `max_staleness` to be a number of hand-ins from 0, "
                f"or null for no bound, but got {max_staleness}."
            )
        if in_flight < 1:
            raise ValueError(
                "Expected argument `in_flight` to be a positive number of batches, but "
                f"got {in_flight}."
            )
        self.max_staleness = max_staleness
        self.in_flight = in_flight
        self.seconds: Seconds = EqualSeconds()

    @override
    def placed(self, steps: list[list[Draw]]) -> list[Step]:
        placed, since = list[Step](), list[Event]()
        for event in self.trace(steps):
            if not isinstance(event, Served):
                since.append(event)
                continue
            draw = Draw(event.client_id, event.num_samples)
            around = Service(events_of_turns(since), (), self.in_flight)
            placed.append(Step([draw], event.ends_turn, around))
            since = []
        if placed:
            last = placed[-1]
            around = last.service._replace(after=events_of_turns(since))
            placed[-1] = last._replace(service=around)
        return placed

    def trace(self, steps: list[list[Draw]]) -> list[Event]:
        """Returns all that happens in a round, in order.

        Args:
            steps: The steps of the round in turn, one client each.
        """
        turns = self._turns_in(steps)
        options = (self.seconds, self.in_flight, self.max_staleness)
        return AsynchronousRound(turns, *options).run()

    def _turns_in(self, steps: list[list[Draw]]) -> list[Turn]:
        """Returns the turns that steps make, in the order in which they begin."""
        turns: dict[tuple[int, int], Turn] = {}
        made: Counter[int] = Counter()
        for ((client_id, count),) in steps:
            place = made[client_id] // self.local_steps if self.local_steps else 0
            made[client_id] += 1
            turn = turns.setdefault((client_id, place), Turn(len(turns), client_id, []))
            turn.counts.append(count)
        return list(turns.values())
