"""`System`: speeds of devices and links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch

from split_lightning.seeding import generator

# One value for all clients, or the ends of the range that each client's is drawn from.
Range: TypeAlias = float | Sequence[float]


class Device(NamedTuple):
    """A client's device and its link to the servers.

    Attributes:
        flops: Floating-point operations in a second.
        uplink: Bits in a second that it sends.
        downlink: Bits in a second that it receives.
        latency: Seconds until the first bit of what is sent is there, either way.
    """

    flops: float
    uplink: float
    downlink: float
    latency: float

    def sends(self, num_bytes: float) -> float:
        """Returns the seconds until all that it sends is there."""
        return self.latency + 8 * num_bytes / self.uplink

    def receives(self, num_bytes: float) -> float:
        """Returns the seconds until it has all that is sent to it."""
        return self.latency + 8 * num_bytes / self.downlink


class System:
    """Devices and links, of which a run's virtual seconds are computed.

    A client's values are drawn once, log-uniformly from the ranges, as a function of
    (seed, client).

    Args:
        client_flops: Floating-point operations in a second of a client's device. Here
            and below: a number, or the ends of a range.
        server_flops: The same for a server, which serves one step at a time.
        uplink: Bits in a second from a client to a server.
        downlink: Bits in a second from a server to a client.
        latency: Seconds from a client to a server, either way.
        server_link: Bits in a second from server to server.
        server_latency: Seconds from server to server.
        seed: Seeds the draws.

    Raises:
        ValueError: If a value is not positive (a latency negative), or a range is none.

    >>> System(1e9, 1e12, uplink=1e7, downlink=2e7, latency=0.01).client(3).sends(1e6)
    0.81
    """

    def __init__(
        self,
        client_flops: Range,
        server_flops: float,
        uplink: Range,
        downlink: Range,
        latency: Range = 0.0,
        server_link: float = 1e10,
        server_latency: float = 0.0,
        seed: int = 0,
    ) -> None:
        ranges = {
            "client_flops": client_flops,
            "uplink": uplink,
            "downlink": downlink,
            "latency": latency,
        }
        single = {
            "server_flops": server_flops,
            "server_link": server_link,
            "server_latency": server_latency,
        }
        for name, value in (ranges | single).items():
            _check(name, value, is_range=name in ranges)
        self.ranges = {name: _ends(value) for name, value in ranges.items()}
        self.server_flops = server_flops
        self.server_link = server_link
        self.server_latency = server_latency
        self.seed = seed
        self.client = lru_cache(maxsize=None)(self._draw)

    def __repr__(self) -> str:
        servers = (self.server_flops, self.server_link, self.server_latency)
        return f"System({self.ranges}, servers: {servers}, seed: {self.seed})"

    def _draw(self, client_id: int) -> Device:
        """Returns the device of a client."""
        stream = generator(self.seed, "system", client_id)
        drawn = torch.rand(len(self.ranges), generator=stream, dtype=torch.float64)
        flops, uplink, downlink, latency = (
            _between(*ends, share)
            for ends, share in zip(self.ranges.values(), drawn.tolist(), strict=True)
        )
        return Device(flops, uplink, downlink, latency)

    def hops(self, num_bytes: float) -> float:
        """Returns the seconds until a server has all that another one sends."""
        return self.server_latency + 8 * num_bytes / self.server_link


def _check(name: str, value: Range, is_range: bool) -> None:
    ends = list(value) if isinstance(value, Sequence) else [value]
    is_number = all(isinstance(v, int | float) and math.isfinite(v) for v in ends)
    least = 0.0 if name.endswith("latency") else 1e-12
    fits = is_number and (len(ends) == 1 or (is_range and len(ends) == 2))
    if not fits or min(ends) < least or ends[0] > ends[-1]:
        what = "a number" + (", or a range [low, high]," if is_range else "")
        positive = "not negative" if least == 0 else "positive"
        raise ValueError(
            f"Expected argument `{name}` to be {what} that is {positive}, but got "
            f"{value!r}."
        )


def _ends(value: Range) -> tuple[float, float]:
    ends = list(value) if isinstance(value, Sequence) else [value]
    return float(ends[0]), float(ends[-1])


def _between(low: float, high: float, share: float) -> float:
    """Returns a value on the way from low to high, in equal factors."""
    if low == high or low == 0:
        return low + share * (high - low)
    return float(low * (high / low) ** share)
