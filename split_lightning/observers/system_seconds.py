"""`SystemSeconds`: the seconds of each part of a batch on the devices of a system."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from split_lightning.channel import Channel
from split_lightning.message import Computed, Message, role_of
from split_lightning.observers.clock import Clock
from split_lightning.system.seconds import BatchSeconds
from split_lightning.system.system import System


class SystemSeconds:
    """Computes how long things take on the devices and links of a system.

    The server is busy with a batch from its first forward pass to its last backward
    pass, and waits meanwhile for the parties that compute in between: other servers, or
    the head of a U-shape. A client's device is not busy with its head.

    Args:
        system: Devices and links.
        new_clock: Returns a clock at time 0.
        run_step: Sends the messages of a client's step of so many samples.
        weight_bytes: The bytes of a client's weights.
    """

    def __init__(
        self,
        system: System,
        new_clock: Callable[[], Clock],
        run_step: Callable[[int, int, Channel], None],
        weight_bytes: int,
    ) -> None:
        self.system = system
        self.new_clock = new_clock
        self.run_step = run_step
        self.weight_bytes = weight_bytes
        self.of_batch = lru_cache(maxsize=None)(self._of_batch)

    def __repr__(self) -> str:
        return f"SystemSeconds({self.system!r}, {self.of_batch(0, 1)})"

    def _of_batch(self, client_id: int, num_samples: int) -> BatchSeconds:
        """Returns the parts of the way of a client's batch."""
        clock, times = self.new_clock(), dict[str, float]()
        name = f"client/{client_id}"
        first: list[str] = []  # the server behind the first cut

        def look(event: Message | Computed) -> None:
            is_lowest = isinstance(event, Computed) and event.segment == 0
            ready = clock.ready
            if isinstance(event, Message) and event.cut == 0:
                if event.kind == "gradient":
                    times.setdefault("leaves", ready[event.sender])
                    clock(event)
                    times["back"] = ready[event.receiver]
                    return
                clock(event)
                if event.kind == "smashed" and role_of(event.receiver) == "server":
                    first.append(event.receiver)
                if event.receiver in first:  # labels may go to another server
                    times["arrives"] = ready[event.receiver]
                return
            before = ready.get(name, 0.0)
            clock(event)
            if is_lowest and isinstance(event, Computed):
                times[event.direction] = ready[name] - before

        channel = Channel()
        channel.observers.append(look)
        channel.computations.append(look)
        self.run_step(client_id, num_samples, channel)
        forward = times["forward"]
        leaves = times.get("leaves", times["arrives"])
        return BatchSeconds(
            forward=forward,
            up=times["arrives"] - forward,
            service=leaves - times["arrives"],
            down=times.get("back", leaves) - leaves,
            backward=times.get("backward", 0.0),
        )

    def upload(self, client_id: int) -> float:
        """Returns how long a client's weights take to the aggregator."""
        return self.system.client(client_id).sends(self.weight_bytes)

    def download(self, client_id: int) -> float:
        """Returns how long a client takes to get the newest weights."""
        return self.system.client(client_id).receives(self.weight_bytes)
