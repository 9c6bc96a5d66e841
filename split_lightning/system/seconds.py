"""Seconds of the parts of a batch, for protocols that plan by time."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class BatchSeconds(NamedTuple):
    """The seconds of each part of a batch.

    Attributes:
        forward: At the client, up to the cut.
        up: Until the server has it.
        service: From when the server begins with it until its gradient leaves.
        down: Until the client has the gradient.
        backward: At the client.
    """

    forward: float
    up: float
    service: float
    down: float
    backward: float


class Seconds(Protocol):
    """Returns how long things take; `repr` distinguishes it from others."""

    def of_batch(self, client_id: int, num_samples: int) -> BatchSeconds:
        """Returns the parts of the way of a client's batch."""

    def upload(self, client_id: int) -> float:
        """Returns how long a client's weights take to the aggregator."""

    def download(self, client_id: int) -> float:
        """Returns how long a client takes to get the newest weights."""


class EqualSeconds:
    """Each sample takes a second at its client, and nothing else takes any."""

    def __repr__(self) -> str:
        return "EqualSeconds()"

    def of_batch(self, client_id: int, num_samples: int) -> BatchSeconds:
        """Returns one second for each sample."""
        return BatchSeconds(float(num_samples), 0.0, 0.0, 0.0, 0.0)

    def upload(self, client_id: int) -> float:
        """Returns 0."""
        return 0.0

    def download(self, client_id: int) -> float:
        """Returns 0."""
        return 0.0
