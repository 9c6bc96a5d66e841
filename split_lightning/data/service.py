"""`Service`: what happens around a step, where clients train at the same time."""

from __future__ import annotations

from typing import NamedTuple


class TurnEvent(NamedTuple):
    """A turn begins or ends.

    Attributes:
        client_id: Whose turn it is.
        begins: Whether it begins, from the newest weights; else it ends, and its
            weights are handed in.
    """

    client_id: int
    begins: bool


class Service(NamedTuple):
    """What happens around a step; nothing, where clients act in turn.

    Attributes:
        before: Which turns begin or end before the step, in order of time.
        after: The same after it; only the last step of a round has any.
        in_flight: Number of batches that a client may have on their way: its forward is
            on the weights from before the last `in_flight - 1` of its turn.
    """

    before: tuple[TurnEvent, ...] = ()
    after: tuple[TurnEvent, ...] = ()
    in_flight: int = 1
