"""`GrpcSites`: sites that connect over gRPC, with mutual TLS."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from typing_extensions import override

from split_lightning.engines.expected import Expected
from split_lightning.engines.link import Link
from split_lightning.engines.remote import RemoteSite, Sites, site_of
from split_lightning.engines.shapes import Shapes
from split_lightning.engines.wire import Frame, FrameError, decoded, encoded
from split_lightning.message import role_of

SERVICE, METHOD = "split_lightning.Sites", "Connect"
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    # A connection whose other end is gone without a word is closed.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]
_logger = logging.getLogger(__name__)


def options(most_bytes: int) -> list[tuple[str, int]]:
    """Returns the options of an end of gRPC.

    Args:
        most_bytes: How large a frame may be that comes.
    """
    return [*_OPTIONS, ("grpc.max_receive_message_length", most_bytes)]


class GrpcSites(Sites):
    """Waits for the sites of all clients, each with a stream of its own.

    The name of a site is that in its certificate: `client-3` computes for `client/3`.

    Args:
        listen: Where to listen, such as `0.0.0.0:8443`; port 0: one that is free.
        certificates: The folder with `server.crt`, `server.key` and `authority.crt`.

    Attributes:
        port: The port.
        most_bytes: How large a frame from a site may be.
    """

    def __init__(self, listen: str, certificates: str | Path) -> None:
        self.listen = listen
        self.certificates = Path(certificates)
        self.port = 0
        self.session = uuid.uuid4().hex
        self.barrier: str | None = None
        self.agreed: dict[str, str] = {}
        self.links: dict[str, Link] = {}
        self.most_bytes = 0
        self._shapes: Shapes | None = None
        self._sites: dict[str, RemoteSite] = {}
        self._connected: dict[str, threading.Event] = {}
        self._queues: dict[str, asyncio.Queue[bytes | None]] = {}
        self._loop = asyncio.new_event_loop()
        self._server: Any = None
        self._barriers = 0
        # Is called with the port once the server listens.
        self.begin: Callable[[int], Any] = lambda port: None

    @override
    def of(self, party: str) -> RemoteSite | None:
        if role_of(party) != "client":
            return None
        name = site_of(party)
        if name not in self._sites:
            link = Link(name)
            if self._shapes is not None:
                link.expected = Expected(self._shapes)
            self.links[name] = link
            self._sites[name] = RemoteSite(name, link.deliver)
            self._connected[name] = threading.Event()
        return self._sites[name]

    @override
    def expect(self, shapes: Shapes) -> None:
        self.most_bytes = shapes.most_bytes
        self._shapes = shapes
        for link in self.links.values():
            link.expected = Expected(shapes)

    @override
    def open(
        self, parties: Sequence[str], agreed: Mapping[str, str], barrier: str | None
    ) -> None:
        if self._server is not None:
            return
        for party in parties:
            self.of(party)
        self.agreed, self.barrier = dict(agreed), barrier
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), daemon=True).start()
        ready.wait()
        _logger.info("Listening on port %d for %d sites.", self.port, len(self.links))
        self.begin(self.port)
        for connected in self._connected.values():
            connected.wait()

    @override
    def keep(self) -> str:
        self._barriers += 1
        barrier = f"{self.session[:8]}-{self._barriers}"
        kept = [site.call("keep", barrier) for site in self._sites.values()]
        for future in kept:
            future.result()
        return barrier

    @override
    def end(self) -> None:
        for link in self.links.values():
            link.write(Frame("end", 0, None))

    @override
    def close(self) -> None:
        if self._server is not None:
            end = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            end.result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._server = None

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        handler: Any = grpc.stream_stream_rpc_method_handler(self._connect)
        service = grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})
        self._server = grpc.aio.server(options=options(self.most_bytes))
        self._server.add_generic_rpc_handlers([service])
        credentials = grpc.ssl_server_credentials(
            [(self._read("server.key"), self._read("server.crt"))],
            self._read("authority.crt"),
            require_client_auth=True,
        )
        self.port = self._server.add_secure_port(self.listen, credentials)
        await self._server.start()

    async def _end(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(None)
        await self._server.stop(grace=5)

    def _read(self, name: str) -> bytes:
        return (self.certificates / name).read_bytes()

    async def _connect(
        self, frames: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        """Serves the stream of a site."""
        name = _name_in_certificate(context)
        try:
            link, hello = self._welcomed(name, await anext(frames, b""))
        except FrameError as error:
            _logger.warning("Refused %s (%s): %s.", name, context.peer(), error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            return
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._queues[name] = queue

        def send(data: bytes) -> None:
            self._loop.call_soon_threadsafe(queue.put_nowait, data)

        welcome = {"session": self.session, "barrier": self.barrier}
        send(encoded(Frame("welcome", 0, welcome)))
        link.attach(self._saved(hello), send)
        self._connected[name].set()
        taking = asyncio.ensure_future(self._take(link, frames, queue))
        try:
            while (data := await queue.get()) is not None:
                yield data
        finally:
            link.detach(send)
            taking.cancel()

    def _welcomed(self, name: str, data: bytes) -> tuple[Link, dict[str, Any]]:
        """Returns the link of a site, and its hello.

        Raises:
            FrameError: If it is refused; says why.
        """
        kind, _, hello = decoded(data)
        link = self.links.get(name)
        if link is None:
            known = ", ".join(self.links)
            raise FrameError(f"there is no site {name!r} in this run ({known})")
        if kind != "hello" or not isinstance(hello, dict):
            raise FrameError("expected a hello first")
        if hello.get("site") != name:
            raise FrameError(
                f"it says that it is {hello.get('site')!r:.80}, but its certificate is "
                f"that of {name!r}"
            )
        theirs = hello.get("agreed")
        theirs = theirs if isinstance(theirs, dict) else {}
        for key, value in self.agreed.items():
            if theirs.get(key) != value:
                raise FrameError(f"its `{key}` differs from the server's")
        if type(hello.get("saved")) is not int:
            raise FrameError("its hello names no call")
        link.require_saved(self._saved(hello))
        return link, hello

    def _saved(self, hello: dict[str, Any]) -> int:
        """Returns the last call of this session that a site has saved."""
        saved: int = hello["saved"]
        return saved if hello.get("session") == self.session else 0

    async def _take(
        self,
        link: Link,
        frames: AsyncIterator[bytes],
        queue: asyncio.Queue[bytes | None],
    ) -> None:
        """Takes the replies of a site until its stream ends."""
        try:
            async for data in frames:
                link.take(data)
        except FrameError as error:
            _logger.warning("%s sent what it may not: %s.", link.name, error)
        except Exception as error:  # the stream broke
            _logger.debug("%s: %s", link.name, error)
        queue.put_nowait(None)


def _name_in_certificate(context: Any) -> str:
    """Returns the first DNS name in the certificate of a stream's other end."""
    names = context.auth_context().get("x509_subject_alternative_name", [b""])
    return str(names[0].decode())
