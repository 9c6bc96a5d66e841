"""A site's end of gRPC: connects to the server, and answers its calls."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from split_lightning.engines.answers import Answers
from split_lightning.engines.calls import is_barrier
from split_lightning.engines.grpc_sites import METHOD, SERVICE, options
from split_lightning.engines.wire import Frame, FrameError, decoded, encoded

_logger = logging.getLogger(__name__)
_PAUSE = 0.2  # seconds between two tries to connect
_REFUSED = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # a frame is too large for it
    grpc.StatusCode.UNAUTHENTICATED,
)
_MOST_REFUSED = 3  # frames in a row, before the site ends


class GrpcClient:
    """Connects a site to the server, again where the connection breaks.

    Args:
        name: The site, such as `client-3`.
        server: The server's address, such as `server.example:8443`.
        certificates: The folder with `NAME.crt`, `NAME.key` and `authority.crt`.
        agreed: Digests of what all have to agree on.
        patience: For how many seconds to wait for a server that does not answer.
    """

    def __init__(
        self,
        name: str,
        server: str,
        certificates: str | Path,
        agreed: Mapping[str, str],
        patience: float = 600.0,
    ) -> None:
        self.name = name
        self.server = server
        self.certificates = Path(certificates)
        self.agreed = dict(agreed)
        self.patience = patience

    def serve(self, answers: Answers) -> None:
        """Answers calls until the server ends the run.

        Raises:
            RuntimeError: If the server refuses the site, does not answer, or sends
                what it may not.
        """
        self._since, self._told = time.monotonic(), False
        self._refused, self._furthest = 0, 0
        while not self._connect(answers):
            time.sleep(_PAUSE)

    def _connect(self, answers: Answers) -> bool:
        """Answers calls over one connection; returns whether the run has ended."""
        credentials = self._credentials()
        try:
            most = options(answers.site.shapes.most_bytes)
            with grpc.secure_channel(self.server, credentials, most) as channel:
                return self._answer(channel, answers)
        except grpc.RpcError as error:
            self._wait_after(error)
        except FrameError as error:
            self._refuse(error)
        return False

    def _refuse(self, error: FrameError) -> None:
        """Counts a frame that was refused; gives up after a few in a row."""
        self._refused += 1
        if self._refused == _MOST_REFUSED:
            raise RuntimeError(
                f"The server at {self.server} has sent what it may not, {self._refused}"
                f" times in a row. The last time: {error}."
            ) from error
        _logger.warning(
            "The server at %s sent what it may not: %s.", self.server, error
        )

    def _wait_after(self, error: Any) -> None:
        """Decides what follows a broken connection."""
        if error.code() in _REFUSED:
            raise RuntimeError(
                f"The server refuses {self.name}: {error.details()}."
            ) from error
        if time.monotonic() - self._since > self.patience:
            raise RuntimeError(
                f"The server at {self.server} has not answered for "
                f"{self.patience:.0f} s."
            ) from error
        if not self._told:
            _logger.warning(
                "%s waits for the server at %s, for %.0f s at most.",
                self.name,
                self.server,
                self.patience,
            )
            self._told = True

    def _answer(self, channel: Any, answers: Answers) -> bool:
        """Answers calls over one connection; returns whether the run has ended."""
        replies: queue.Queue[bytes | None] = queue.Queue()
        hello = {
            "site": self.name,
            "agreed": self.agreed,
            "session": answers.session,
            "saved": answers.saved,
        }
        replies.put(encoded(Frame("hello", 0, hello)))
        connect = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        stream = connect(_until_none(replies))
        try:
            for data in stream:
                self._since, self._told = time.monotonic(), False
                frame = decoded(data)
                if frame.kind == "welcome":
                    answers.begin(*_welcome(frame.value))
                    for reply in answers.replies.values():
                        replies.put(reply)
                elif frame.kind == "end":
                    return True
                else:
                    answer = answers.answer(data)
                    if answer is not None:
                        replies.put(answer)
                    if answers.number > self._furthest:
                        self._refused, self._furthest = 0, answers.number
        finally:
            replies.put(None)
        return False

    def _credentials(self) -> Any:
        read = [
            (self.certificates / name).read_bytes()
            for name in ("authority.crt", f"{self.name}.key", f"{self.name}.crt")
        ]
        return grpc.ssl_channel_credentials(*read)


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
