"""`RayCluster`: the Ray cluster of a run, which is joined or started."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import secrets
import socket
from typing import Any

_SECONDS_TO_ANSWER = 10
# How Ray binds all ports of a cluster to the loopback address, on any system.
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class RayCluster:
    """Joins a cluster, or starts one on this machine.

    A cluster that this process has joined or started already is used, and stays.

    A new one listens on the loopback address alone, and lets no process in that lacks
    its token: Ray runs code for every member. It keeps to both where this process has
    not imported Ray before.

    Args:
        address: The cluster: `auto` or `HOST:PORT`; `None`: a new one.

    Raises:
        ImportError: If Ray is not installed.
    """

    def __init__(self, address: str | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ImportError(
                "Expected the package ray to be installed for engine=ray, but it is "
                'not. Install it with pip install "split-lightning[ray]".'
            )
        self.address = address
        self._is_ours = False

    def open(self, num_cpus: float) -> None:
        """Joins or starts the cluster, unless it is there.

        Args:
            num_cpus: Number of CPUs that a new cluster offers.

        Raises:
            ConnectionError: If no cluster answers.
            ValueError: If the address is none.
        """
        if self.address is None:
            self._start(num_cpus)
        else:
            self._join(self.address)

    def _start(self, num_cpus: float) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        for name, value in {**_ON_LOOPBACK, **token}.items():
            os.environ.setdefault(name, value)
        self._init("local", num_cpus=max(1, math.ceil(num_cpus)))

    def _join(self, address: str) -> None:
        if address != "auto":
            _require_answer(address)
        try:
            self._init(address)
        except (ConnectionError, RuntimeError) as error:
            raise _no_cluster(address) from error

    def _init(self, address: str, **options: Any) -> None:
        ray = import_ray()
        if ray.is_initialized():
            return
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )
        self._is_ours = True

    def close(self) -> None:
        """Leaves the cluster; ends one that was started."""
        if self._is_ours:
            self._is_ours = False
            import_ray().shutdown()


def import_ray() -> Any:
    """Returns the package, which is imported late.

    It takes long, and a new cluster is set up by variables that it reads then.
    """
    return importlib.import_module("ray")


def _require_answer(address: str) -> None:
    """Stops where nothing listens at an address: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(
            "Expected argument `address` to be null, auto or HOST:PORT, such as "
            f"head.example:6379, but got {address!r}."
        )
    try:
        socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> ConnectionError:
    return ConnectionError(
        f"Expected argument `address` to name a Ray cluster, but none answers at "
        f"{address!r}. Start one with `ray start --head`, or leave `address` out for "
        "one on this machine."
    )
