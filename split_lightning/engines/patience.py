"""`Patience`: how long a site waits for a server, and what it says meanwhile."""

from __future__ import annotations

import logging
import time
from typing import Any

import grpc

PAUSE = 0.2  # seconds between two tries to connect
_TELL_AFTER = 1.0  # second without an answer
_REFUSED = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # a frame is too large for one of them
    grpc.StatusCode.UNAUTHENTICATED,
)
_logger = logging.getLogger(__name__)


class Patience:
    """Decides whether a site tries again, after a connection to the server broke.

    Args:
        name: The site, such as `client-3`.
        server: The server's address.
        seconds: For how long the server may give no answer.
    """

    def __init__(self, name: str, server: str, seconds: float) -> None:
        self.name = name
        self.server = server
        self.seconds = seconds
        self._has_heard = False
        self.begin()

    def begin(self) -> None:
        """Begins to wait: there is no connection."""
        self._since, self._has_told = time.monotonic(), False

    def hear(self) -> None:
        """Notes that the server has answered."""
        self._has_heard = True

    def after(self, error: Any) -> None:
        """Decides what follows a connection that broke; returns if it is another try.

        Args:
            error: The error of gRPC.

        Raises:
            ConnectionError: If the server refuses the site, or gave no answer for too
                long.
        """
        if error.code() in _REFUSED:
            raise ConnectionError(
                f"The server (`engine.server={self.server}`) refuses {self.name}: "
                f"{error.details()}."
            ) from error
        if time.monotonic() - self._since >= self.seconds:
            raise ConnectionError(
                f"The server (`engine.server={self.server}`) has not answered for "
                f"{self.seconds:g} s. {self._advice()}"
            ) from error
        if not self._has_told and time.monotonic() - self._since > _TELL_AFTER:
            _logger.warning(
                "%s waits for the server at %s, for %g s at most.",
                self.name,
                self.server,
                self.seconds,
            )
            self._has_told = True

    def _advice(self) -> str:
        if self._has_heard:
            return (
                "It has answered before. If the run is not complete, resume it at the "
                "server (`ckpt_path=last`), and start this client again."
            )
        return (
            "Is it running, and is its certificate one for this address "
            "(`split-lightning certificates --host NAME`), from the same authority as "
            f"that of {self.name}?"
        )
