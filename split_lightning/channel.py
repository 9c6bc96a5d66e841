"""`Channel`: delivers the messages between parties."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from split_lightning.message import Computed, Kind, Message, Values

Observer: TypeAlias = Callable[[Message | Computed], None]
# Changes the gradients at the first cut: for each client of a step those that come from
# each party.
Downlink: TypeAlias = Callable[[list[dict[str, Values]]], list[dict[str, Values]]]


class Channel:
    """Delivers messages. Parties have no other way to reach each other.

    Args:
        downlink: Changes the gradients that go back to the clients of a step, such as
            `AverageGradients`; `None`: they stay as they are.

    Attributes:
        observers: Are called with each `Message` that is delivered, and with each
            `Computed`: traffic, clocks, norms. They look, and change nothing.
    """

    def __init__(self, downlink: Downlink | None = None) -> None:
        self.downlink = downlink
        self.observers: list[Observer] = []

    def send(
        self,
        kind: Kind,
        sender: str,
        receiver: str,
        payload: Values,
        step: int = 0,
        place: int = 0,
    ) -> Values:
        """Returns the payload as it arrives.

        A party sends itself nothing: the payload stays where it is.
        """
        if sender != receiver:
            self.notify(Message(kind, sender, receiver, payload, step, place))
        return payload

    def lower(self, gradients: list[dict[str, Values]]) -> list[dict[str, Values]]:
        """Returns the gradients that clients are sent at the first cut."""
        return gradients if self.downlink is None else self.downlink(gradients)

    def notify(self, event: Message | Computed) -> None:
        """Shows an event to the observers."""
        for observer in self.observers:
            observer(event)
