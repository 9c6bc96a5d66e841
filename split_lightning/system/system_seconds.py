"""`SystemSeconds`: how long a batch takes on its way, on the devices of a system."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from split_lightning.data.seconds import BatchSeconds
from split_lightning.route import Stage
from split_lightning.system.system import System
from split_lightning.system.timeline import Timeline
from split_lightning.system.work import Work


class SystemSeconds:
    """Says how long things take on the devices and links of a system.

    The server is busy with a batch from its first forward to its last backward, and
    waits meanwhile for whoever computes in between: other servers, or the head of a
    U-shape. A client's device is not thought busy with its head.

    Args:
        system: Devices and links.
        route: Who computes which stretch of the network, a client the first.
        work: What each of them computes of a sample.
        crossing: For each cut the bytes of a sample that cross it, forth and back.
        weight_bytes: The bytes of a client's weights.
    """

    def __init__(
        self,
        system: System,
        route: Sequence[Stage],
        work: Sequence[Work],
        crossing: Sequence[tuple[float, float]],
        weight_bytes: int,
    ) -> None:
        self.system = system
        self.route = list(route)
        self.work = list(work)
        self.crossing = list(crossing)
        self.weight_bytes = weight_bytes
        self.of_batch = lru_cache(maxsize=None)(self._of_batch)

    def __repr__(self) -> str:
        told = ("ranges", "server_flops", "server_link", "server_latency", "seed")
        system = {name: getattr(self.system, name) for name in told}
        counted = (self.route, self.work, self.crossing, self.weight_bytes)
        return f"SystemSeconds({system}, {counted})"

    def _of_batch(self, client_id: int, num_samples: int) -> BatchSeconds:
        """Returns the parts of the way of a client's batch."""
        device = self.system.client(client_id)
        up, down = (num_samples * num_bytes for num_bytes in self.crossing[0])
        behind = Timeline(self.system, self.route[1:], self.work[1:])
        behind.step({client_id: num_samples}, 0, self.crossing[1:])
        return BatchSeconds(
            forward=num_samples * self.work[0].forward / device.flops,
            up=device.sends(up),
            service=behind.clients[client_id],
            down=device.receives(down) if down else 0.0,  # nothing trains below it
            backward=num_samples * self.work[0].backward / device.flops,
        )

    def hand_in(self, client_id: int) -> float:
        """Returns how long a client's weights take until they are handed in."""
        return self.system.client(client_id).sends(self.weight_bytes)

    def take_over(self, client_id: int) -> float:
        """Returns how long a client takes to get the newest weights."""
        return self.system.client(client_id).receives(self.weight_bytes)
