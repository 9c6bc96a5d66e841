"""Links of a given rate and delay between network namespaces (Linux, root).

    python benchmarks/tun_link.py LINK [LINK ...]

Each link is two TUN devices, each in a namespace, with this process between them. A
packet waits for those before it, takes its size / the rate, and arrives after the
delay: what `tc`'s netem does, which not every kernel has. A packet that finds the queue
full is lost. TCP in the namespaces is the kernel's own: it meets the delay, the rate
and the losses.

A link is JSON: `{"ends": [{"namespace": ..., "address": "10.77.0.1/30", "rate": bits a
second that leave here}, {...}], "delay": seconds one way}`. `ready` is printed once all
are up.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from typing import Any

_SET_INTERFACE, _TUN, _NO_HEADER = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
MTU = 1500
QUEUE = 1000  # packets that wait, as netem's default


class Direction:
    """A direction of a link.

    Args:
        source: The device whose packets come.
        target: The device that gets them.
        rate: Bits in a second.
        delay: Seconds.
    """

    def __init__(self, source: int, target: int, rate: float, delay: float) -> None:
        self.source, self.target = source, target
        self.seconds_per_byte, self.delay = 8 / rate, delay
        self.lost = 0
        self._free = 0.0  # when the link has sent what it has
        self._packets: deque[tuple[float, bytes]] = deque()
        self._leaving: deque[float] = deque()  # when each that waits has left

    def take(self, now: float) -> None:
        """Takes the packets that are there."""
        while True:
            try:
                packet = os.read(self.source, MTU)
            except BlockingIOError:
                return
            while self._leaving and self._leaving[0] <= now:
                self._leaving.popleft()
            if len(self._leaving) >= QUEUE:
                self.lost += 1
                continue
            begin = max(now, self._free)
            self._free = begin + len(packet) * self.seconds_per_byte
            self._leaving.append(self._free)
            self._packets.append((self._free + self.delay, packet))

    def give(self, now: float) -> float | None:
        """Delivers the packets that are due; returns when the next one is."""
        while self._packets and self._packets[0][0] <= now:
            os.write(self.target, self._packets.popleft()[1])
        return self._packets[0][0] if self._packets else None


def device(name: str, namespace: str, address: str) -> int:
    """Makes a TUN device in a namespace; returns its file descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), _TUN | _NO_HEADER)
    fcntl.ioctl(descriptor, _SET_INTERFACE, request)
    inside = ["ip", "-n", namespace]
    for command in (
        ["ip", "link", "set", name, "netns", namespace],
        [*inside, "address", "add", address, "dev", name],
        [*inside, "link", "set", name, "mtu", str(MTU), "txqueuelen", str(QUEUE)],
        [*inside, "link", "set", name, "up"],
    ):
        subprocess.run(command, check=True)
    return descriptor


def directions(number: int, link: dict[str, Any]) -> list[Direction]:
    """Makes a link; returns its two directions."""
    ends, delay = link["ends"], link["delay"]
    first, second = (
        device(f"shaped{number}{side}", end["namespace"], end["address"])
        for side, end in zip("ab", ends, strict=True)
    )
    return [
        Direction(first, second, ends[0]["rate"], delay),
        Direction(second, first, ends[1]["rate"], delay),
    ]


def relay(links: list[Direction]) -> None:
    """Delivers packets for ever."""
    sources = {link.source: link for link in links}
    while True:
        due = [t for link in links if (t := link.give(time.monotonic())) is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        for source in select.select(list(sources), [], [], wait)[0]:
            sources[source].take(time.monotonic())


def main() -> None:
    links = [json.loads(word) for word in sys.argv[1:]]
    made = [directions(number, link) for number, link in enumerate(links)]
    print("ready", flush=True)
    relay([direction for pair in made for direction in pair])


if __name__ == "__main__":
    main()
