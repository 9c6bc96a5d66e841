"""A site's end of gRPC: connects to the server, and answers its calls."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from split_lightning.credentials import read_credentials
from split_lightning.engines.answers import Answers
from split_lightning.engines.calls import is_barrier
from split_lightning.engines.grpc_sites import METHOD, SERVICE, options
from split_lightning.engines.hello import Hello
from split_lightning.engines.patience import PAUSE, Patience
from split_lightning.engines.wire import Frame, FrameError, decoded, encoded

# Of the final network, each with the party that has its weights.
Segments: TypeAlias = list[tuple[int, str]]
_logger = logging.getLogger(__name__)
_MOST_REFUSED = 3  # frames in a row, before the site ends


class GrpcClient:
    """Connects a site to the server, again where the connection breaks.

    Args:
        name: The site, such as `client-3`.
        server: The server's address, such as `server.example:8443`.
        certificates: The folder with `NAME.crt`, `NAME.key` and `authority.crt`.
        says: What it says first.
        patience: For how many seconds to wait for a server that does not answer.
    """

    def __init__(
        self,
        name: str,
        server: str,
        certificates: str | Path,
        says: Hello,
        patience: float = 600.0,
    ) -> None:
        self.name = name
        self.server = server
        self.certificates = Path(certificates)
        self.says = says
        self.waiting = Patience(name, server, patience)
        self._lost: ValueError | None = None  # why the site cannot begin
        self._is_over = False

    def serve(self, answers: Answers, end: Callable[[Segments], None]) -> None:
        """Answers calls until the server ends the run.

        Args:
            answers: Answers calls.
            end: Is called at the end with the segments of the final network that are
                here. If the process dies before it returns, the server names them
                again.

        Raises:
            ConnectionError: If the server refuses the site, does not answer, or sends
                what it may not.
            ValueError: If the site does not have the state at which the server begins.
        """
        self._end = end
        self.waiting.begin()
        self._refused, self._furthest = 0, 0
        self._is_over, self._lost = False, None
        while not self._is_over:
            self._connect(answers)
            if not self._is_over:
                time.sleep(PAUSE)
        if self._lost is not None:
            raise self._lost

    def _connect(self, answers: Answers) -> None:
        """Answers calls over one connection."""
        credentials = grpc.ssl_channel_credentials(
            *read_credentials(self.certificates, self.name)
        )
        try:
            most = options(answers.site.shapes.most_bytes)
            with grpc.secure_channel(self.server, credentials, most) as channel:
                self._serve_stream(channel, answers)
        except grpc.RpcError as error:
            if not self._is_over:
                self.waiting.after(error)
        except FrameError as error:
            self._refuse(error)

    def _refuse(self, error: FrameError) -> None:
        """Counts a frame that was refused; gives up after a few in a row."""
        self._refused += 1
        if self._refused == _MOST_REFUSED:
            raise ConnectionError(
                f"The server at {self.server} has sent what it may not, {self._refused}"
                f" times in a row. The last time: {error}."
            ) from error
        _logger.warning(
            "The server at %s sent what it may not: %s.", self.server, error
        )

    def _serve_stream(self, channel: Any, answers: Answers) -> None:
        """Answers calls until the connection ends."""
        replies: queue.Queue[bytes | None] = queue.Queue()
        hello = {
            "site": self.name,
            **self.says.plain(),
            "session": answers.session,
            "saved": answers.saved,
        }
        replies.put(encoded(Frame("hello", 0, hello)))
        connect = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        is_connected = False
        try:
            for data in connect(_until_none(replies)):
                is_connected = True
                self.waiting.hear()
                for reply in self._replies(data, answers):
                    replies.put(reply)
        finally:
            replies.put(None)
            if is_connected:
                self.waiting.begin()

    def _replies(self, data: bytes, answers: Answers) -> Iterable[bytes]:
        """Does what a frame asks for; returns what to send.

        Raises:
            FrameError: If the frame asks for nothing.
        """
        frame = decoded(data)
        if frame.kind == "accepted":
            return ()
        if frame.kind == "welcome":
            return self._begin(*_welcome(frame.value), answers)
        if frame.kind == "end":
            self._end(_final(frame.value, answers))
            self._is_over = True
            return (encoded(Frame("ended", 0, None)),)
        if frame.kind == "replaced":
            raise ConnectionError(
                f"Another process with the certificate of {self.name} has connected to "
                f"the server at {self.server}. Let one of them run."
            )
        answer = answers.answer(data)
        if answers.number > self._furthest:
            self._refused, self._furthest = 0, answers.number
        return () if answer is None else (answer,)

    def _begin(
        self, session: str, barrier: str | None, answers: Answers
    ) -> Iterable[bytes]:
        """Begins a session, or continues one; returns the last replies."""
        try:
            answers.begin(session, barrier)
        except ValueError as error:
            self._is_over, self._lost = True, error
            return (encoded(Frame("lost", 0, str(error))),)
        return answers.replies.values()


def _until_none(items: queue.Queue[bytes | None]) -> Iterator[bytes]:
    while (item := items.get()) is not None:
        yield item


def _welcome(value: Any) -> tuple[str, str | None]:
    """Returns the session and the barrier in the value of a welcome.

    Raises:
        FrameError: If it has none.
    """
    found = value if isinstance(value, dict) else {}
    session, barrier = found.get("session"), found.get("barrier")
    if not is_barrier(session) or not (barrier is None or is_barrier(barrier)):
        raise FrameError("a welcome names a session, and a barrier or none")
    return str(session), barrier


def _final(value: Any, answers: Answers) -> Segments:
    """Returns the segments of the final network that a server names.

    Raises:
        FrameError: If there are no such segments.
    """
    found: list[Any] = value if isinstance(value, list) else [None]
    for pair in found:
        if not isinstance(pair, tuple) or not answers.calls.names_segment(*pair[:2]):
            raise FrameError("the end names segments of the network, and parties")
    return found
