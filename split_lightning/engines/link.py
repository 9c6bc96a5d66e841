"""`Link`: the calls to one site, in order, over connections that may break."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from split_lightning.engines.remote import Call
from split_lightning.engines.wire import Frame, FrameError, decoded, encoded
from split_lightning.finite import NotFinite

Send = Callable[[bytes], None]


class SiteError(RuntimeError):
    """A site could not carry out a call; the message says why."""


class Link:
    """Sends calls to a site, and takes its replies.

    A call is kept until the site has saved what came of it. Where a connection breaks,
    or the site's process dies, the site names the last call that it has saved, and all
    that follow are sent again. What the site computes is a function of its calls, so
    the replies are the same; those that came before are ignored. Each call names the
    last one up to which all are answered: the site keeps the replies to later ones.

    Args:
        name: The name of the site.

    Attributes:
        since: When the site was last heard of, or first waited for, in seconds.
        sent: Number of bytes that were sent.
        received: Number of bytes that came.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent = self.received = 0
        self.since = 0.0
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begins a new session: the calls before it are forgotten."""
        with self._lock:
            self._forget_all()

    def _forget_all(self) -> None:
        self._number = 0  # of the last call
        self._calls: dict[int, bytes] = {}  # that may have to be sent again
        self._waiting: dict[int, Future[Any]] = {}
        self._send: Send | None = None
        self._failed: Exception | None = None

    def deliver(self, call: Call) -> Future[Any]:
        """Sends a call; returns the reply to come."""
        future: Future[Any] = Future()
        with self._lock:
            if self._failed is not None:
                future.set_exception(self._failed)
                return future
            if not self._waiting:
                self.since = time.monotonic()
            answered = next(iter(self._waiting), self._number + 1) - 1
            self._number += 1
            frame = Frame("call", self._number, (*call, answered))
            self._calls[self._number] = data = encoded(frame)
            self._waiting[self._number] = future
            if self._send is not None:
                self._write(data)
        return future

    def write(self, frame: Frame) -> None:
        """Sends a frame that is no call, if the site is connected."""
        with self._lock:
            if self._send is not None:
                self._write(encoded(frame))

    def attach(self, saved: int, send: Send) -> None:
        """Continues over a new connection.

        Args:
            saved: The number of the last call that the site has saved.
            send: Sends bytes to the site, in order.
        """
        with self._lock:
            self._send = send
            self._forget(saved)
            for number in sorted(self._calls):
                self._write(self._calls[number])

    def detach(self, send: Send) -> None:
        """Notes that a connection has ended."""
        with self._lock:
            if self._send is send:
                self._send = None

    def silent_for(self) -> float:
        """Returns for how many seconds the site has been silent while waited for."""
        with self._lock:
            return time.monotonic() - self.since if self._waiting else 0.0

    def take(self, data: bytes, send: Send) -> None:
        """Takes a reply.

        Args:
            data: The reply.
            send: What sends to the site over the same connection; a reply over one
                that is no longer in use is ignored.

        Raises:
            FrameError: If the bytes are no reply to a call; nothing changes then.
        """
        kind, number, value = decoded(data)
        with self._lock:
            if self._send is not send:
                return
            if not 0 < number <= self._number:
                raise FrameError(f"there is no call {number}")
            if kind not in ("reply", "error"):
                raise FrameError(f"a site sends no {kind!r}")
            try:
                saved, result = value
            except (TypeError, ValueError) as error:
                raise FrameError("a reply is a pair") from error
            if type(saved) is not int or not 0 <= saved <= number:
                raise FrameError("a reply names a call that was saved")
            self.received += len(data)
            self.since = time.monotonic()
            self._forget(saved)
            future = self._waiting.pop(number, None)
        if future is None:
            return  # it came before
        if kind == "reply":
            future.set_result(result)
        else:
            future.set_exception(self._error(result))

    def fail(self, error: Exception) -> None:
        """Ends all calls that wait for a reply, and those to come."""
        with self._lock:
            self._failed = error
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(error)

    def _write(self, data: bytes) -> None:
        assert self._send is not None
        self.sent += len(data)
        self._send(data)

    def _forget(self, saved: int) -> None:
        """Forgets the calls up to one that the site has saved."""
        for number in [number for number in self._calls if number <= saved]:
            del self._calls[number]

    def _error(self, result: Any) -> Exception:
        kind, _, text = str(result).partition(": ")
        if kind == NotFinite.__name__:
            return NotFinite(f"{text} at {self.name}")
        return SiteError(f"{self.name}: {result}")
