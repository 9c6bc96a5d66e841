"""A site's end of gRPC: connects to the server, and answers its calls."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from split_lightning.credentials import read_credentials
from split_lightning.engines.answers import Answers
from split_lightning.engines.grpc_sites import METHOD, OPTIONS, SERVICE
from split_lightning.engines.hello import Hello
from split_lightning.engines.patience import PAUSE, Patience
from split_lightning.engines.wire import Frame, decoded, encoded

# Of the final network, each with the party that has its weights.
Segments: TypeAlias = list[tuple[int, str]]


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

    def serve(self, answers: Answers) -> Segments:
        """Answers calls until the server ends the run.

        Returns:
            The segments of the final network that are here.

        Raises:
            ConnectionError: If the server refuses the site, or does not answer.
        """
        self.waiting.renew()
        while (final := self._connect(answers)) is None:
            time.sleep(PAUSE)
        return final

    def _connect(self, answers: Answers) -> Segments | None:
        """Answers calls over one connection; returns what there is in the end."""
        credentials = grpc.ssl_channel_credentials(
            *read_credentials(self.certificates, self.name)
        )
        try:
            with grpc.secure_channel(self.server, credentials, OPTIONS) as channel:
                return self._serve_stream(channel, answers)
        except grpc.RpcError as error:
            self.waiting.after(error)
            return None

    def _serve_stream(self, channel: Any, answers: Answers) -> Segments | None:
        """Answers calls over one connection; returns what there is in the end."""
        replies: queue.Queue[bytes | None] = queue.Queue()
        hello = {
            "site": self.name,
            **self.says.plain(),
            "session": answers.session,
            "saved": answers.saved,
        }
        replies.put(encoded(Frame("hello", 0, hello)))
        connect = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        stream = connect(_until_none(replies))
        try:
            for data in stream:
                self.waiting.renew()
                frame = decoded(data)
                if frame.kind == "welcome":
                    answers.begin(frame.value["session"], frame.value["barrier"])
                    for reply in answers.replies.values():
                        replies.put(reply)
                elif frame.kind == "end":
                    return [(number, name) for number, name in frame.value]
                else:
                    answer = answers.answer(data)
                    if answer is not None:
                        replies.put(answer)
        finally:
            replies.put(None)
        return None


def _until_none(items: queue.Queue[bytes | None]) -> Iterator[bytes]:
    while (item := items.get()) is not None:
        yield item
