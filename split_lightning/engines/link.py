"""`Link`: the calls to one site, in order, over connections that may break."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple

from split_lightning.engines.expected import Expected, Reply
from split_lightning.engines.remote import Call
from split_lightning.engines.wire import Frame, FrameError, decoded, encoded
from split_lightning.finite import NotFinite

Send = Callable[[bytes], None]
_MOST_REFUSED = 3  # frames in a row, before the run ends
_LONGEST = 2000  # characters of an error's message


class SiteError(RuntimeError):
    """A site could not carry out a call; the message says why."""


class Room:
    """Memory for the calls that several links keep.

    Args:
        size: How many bytes they may keep before sites are asked to save.
    """

    def __init__(self, size: int = 1 << 25) -> None:
        self.size = size
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        """Whether sites should save their states, so that calls can be forgotten."""
        return self._taken >= self.size

    def take(self, size: int) -> None:
        """Notes that a number of bytes is kept; a negative one: no longer."""
        with self._lock:
            self._taken += size


class _Waiting(NamedTuple):
    """A call without a reply."""

    method: str
    future: Future[Any]
    expected: Reply


class Link:
    """Sends calls to a site, and takes its replies.

    A call is kept until the site has saved what came of it; the site is asked to save
    its state when there is no more room for calls. Where a connection breaks,
    or the site's process dies, the site names the last call that it has saved, and all
    that follow are sent again. What the site computes is a function of its calls, so
    the replies are the same; those that came before are ignored. Each call names the
    last one up to which all are answered: the site keeps the replies to later ones. It
    also says whether the site should save its state.

    A reply that does not fit its call changes nothing. After a few in a row the calls
    fail.

    Args:
        name: The name of the site.
        room: The memory for calls.

    Attributes:
        since: When the site last answered, or was first waited for, in seconds.
        is_over: Whether the site knows that the run is complete.
        expected: Knows what replies must look like; set before the first call.
        sent: Number of bytes that were sent.
        received: Number of bytes that came.
    """

    def __init__(self, name: str, room: Room) -> None:
        self.name = name
        self.room = room
        self.sent = self.received = 0
        self.since = 0.0
        self._lock = threading.Lock()
        self.expected: Expected | None = None
        self._calls: dict[int, bytes] = {}  # that may have to be sent again
        self.reset()

    def reset(self) -> None:
        """Begins a new session: the calls before it are forgotten."""
        with self._lock:
            self._forget_all()

    def _forget_all(self) -> None:
        if self.expected is not None:
            self.expected = Expected(self.expected.shapes)
        self._number = 0  # of the last call
        self._saved = 0  # the last call that the site need not carry out again
        self._refused = 0  # frames in a row
        self._drop(list(self._calls))
        self._waiting: dict[int, _Waiting] = {}
        self._send: Send | None = None
        self._failed: Exception | None = None
        self._end: bytes | None = None  # the last frame, which is no call
        self.is_over = False

    def deliver(self, call: Call) -> Future[Any]:
        """Sends a call; returns the reply to come."""
        assert self.expected is not None
        reply = self.expected.reply_to(call)
        future: Future[Any] = Future()
        with self._lock:
            if self._failed is not None:
                future.set_exception(self._failed)
                return future
            if not self._waiting:
                self.since = time.monotonic()
            answered = next(iter(self._waiting), self._number + 1) - 1
            self._number += 1
            frame = Frame("call", self._number, (*call, answered, self.room.is_full))
            self._calls[self._number] = data = encoded(frame)
            self.room.take(len(data))
            self._waiting[self._number] = _Waiting(call.method, future, reply)
            if self._send is not None:
                self._write(data)
        return future

    def end(self, value: Any) -> None:
        """Tells the site that the run is complete; `is_over` once it knows.

        Args:
            value: What the site is to know.
        """
        with self._lock:
            self._end = encoded(Frame("end", 0, value))
            if self._send is not None:
                self._write(self._end)

    def require_saved(self, saved: int) -> None:
        """Stops where a site cannot continue after the last call that it has saved.

        Raises:
            FrameError: Says why.
        """
        with self._lock:
            first, last = self._saved, self._number
        if not first <= saved <= last:
            raise FrameError(
                f"the last call that it has saved is {saved}, but that must be one "
                f"from {first} to {last}; its folder may be that of another run, or new"
            )

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
            if self._end is not None:
                self._write(self._end)

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
            FrameError: If the bytes are no reply that fits a call; no state changes
                then.
        """
        try:
            self._take(data, send)
        except FrameError as error:
            self._refuse(error)
            raise

    def _take(self, data: bytes, send: Send) -> None:
        kind, number, value = decoded(data)
        if kind == "lost" and isinstance(value, str):
            self.fail(self._error(value))
            return
        with self._lock:
            if self._send is not send:
                return
            if kind == "ended" and self._end is not None:
                self.is_over = True
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
            waiting = self._waiting.get(number)
            if waiting is not None:
                self._require_fit(waiting, number, kind, result)
                del self._waiting[number]
                self._refused = 0
                self.since = time.monotonic()
            self.received += len(data)
            self._forget(saved)
        if waiting is None:
            return  # it came before
        if kind == "reply":
            waiting.future.set_result(result)
        else:
            waiting.future.set_exception(self._error(result))

    def fail(self, error: Exception) -> None:
        """Ends all calls that wait for a reply, and those to come."""
        with self._lock:
            self._failed = error
            waiting, self._waiting = self._waiting, {}
        for own in waiting.values():
            own.future.set_exception(error)

    def _require_fit(
        self, waiting: _Waiting, number: int, kind: str, result: Any
    ) -> None:
        """Stops where a reply does not fit its call."""
        try:
            if kind == "reply":
                waiting.expected.accept(result)
            elif not isinstance(result, str):
                raise FrameError("an error is a text")
        except FrameError as error:
            raise FrameError(
                f"its reply to call {number}, `{waiting.method}`, does not fit: {error}"
            ) from error

    def _refuse(self, error: FrameError) -> None:
        """Counts a frame that was refused; gives up after a few in a row."""
        with self._lock:
            self._refused += 1
            if self._refused < _MOST_REFUSED:
                return
            waits = next(iter(self._waiting.items()), None)
        what = "no call" if waits is None else f"call {waits[0]}, `{waits[1].method}`"
        self.fail(
            SiteError(
                f"{self.name} has sent what it may not, {_MOST_REFUSED} times in a "
                f"row, where {what}, waits for a reply. The last time: {error}."
            )
        )

    def _write(self, data: bytes) -> None:
        assert self._send is not None
        self.sent += len(data)
        self._send(data)

    def _forget(self, saved: int) -> None:
        """Forgets the calls up to one that the site has saved."""
        self._saved = max(self._saved, saved)
        self._drop([number for number in self._calls if number <= saved])

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.room.take(-len(self._calls.pop(number)))

    def _error(self, result: str) -> Exception:
        line = " ".join(result.split())[:_LONGEST]
        kind, _, text = line.partition(": ")
        if kind == NotFinite.__name__:
            return NotFinite(f"{text} at {self.name}")
        return SiteError(f"{self.name}: {line}")
