"""`Channel`: delivers the messages between parties."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias

from split_lightning.message import Computed, Kind, Message, Values

Observer: TypeAlias = Callable[[Message], None]
# Changes the gradients at the first cut: for each client of a step those that come from
# each party.
Downlink: TypeAlias = Callable[[list[dict[str, Values]]], list[dict[str, Values]]]


class Channel:
    """Delivers messages. Parties have no other way to reach each other.

    Args:
        downlink: Changes the gradients that go back to the clients of a step, such as
            `AverageGradients`; `None`: they stay as they are.

    Attributes:
        observers: Are called with each `Message`: traffic, clocks, norms. They look,
            and change nothing.
        computations: Are called with each `Computed`: clocks.
        recent: The messages of the step so far.
    """

    def __init__(self, downlink: Downlink | None = None) -> None:
        self.downlink = downlink
        self.observers: list[Observer] = []
        self.computations: list[Callable[[Computed], None]] = []
        self.recent: list[Message] = []

    def send(
        self,
        kind: Kind,
        sender: str,
        receiver: str,
        payload: Values | Future[Values],
        step: int = 0,
        cut: int = 0,
    ) -> Values:
        """Sends a payload from one party to another; returns it as it arrives.

        A future is a payload that comes from another process.
        """
        if isinstance(payload, Future):
            payload = payload.result()
        message = Message(kind, sender, receiver, payload, step, cut)
        self.recent.append(message)
        for observer in self.observers:
            observer(message)
        return payload
