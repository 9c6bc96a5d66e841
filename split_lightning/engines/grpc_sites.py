"""`GrpcSites`: sites that connect over gRPC, with mutual TLS."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from typing_extensions import override

from split_lightning.credentials import read_credentials
from split_lightning.engines.expected import Expected
from split_lightning.engines.gone import Gone
from split_lightning.engines.hello import ClientData, Hello, require_alike
from split_lightning.engines.link import Link, Room
from split_lightning.engines.remote import (
    RemoteSite,
    SiteAbsent,
    Sites,
    client_of_site,
    site_of,
)
from split_lightning.engines.shapes import Shapes
from split_lightning.engines.spare_memory import SpareMemory
from split_lightning.engines.wire import Frame, FrameError, decoded, encoded
from split_lightning.message import role_of
from split_lightning.system.absences import Absences

SERVICE, METHOD, WORDS = "split_lightning.Sites", "Connect", "Words"
_MOST_OF_HELLO = 1 << 20  # bytes of a frame, before shapes are known
MOST_OF_WORDS = 1 << 20  # bytes of the frame with a run's keys
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),  # two servers do not share a port
    # A connection whose other end is gone without a word is closed.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]
_GRACE = 5  # seconds, in which streams may end
_SAY_EVERY = 30  # seconds, which sites are missing
_WATCH_EVERY = 2  # seconds, which sites are gone
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
        deadline: For how many seconds a site may be silent while it is waited for;
            then its clients are absent. `None`: it is waited for.
        absences: Records which clients were absent.

    Attributes:
        port: The port.
        words: What was typed for the run, as sites may ask for it.
        most_bytes: How large a frame from a site may be.
        room: The memory for calls.
    """

    def __init__(
        self,
        listen: str,
        certificates: str | Path,
        deadline: float | None = None,
        absences: Absences | None = None,
    ) -> None:
        self.listen = listen
        self.certificates = Path(certificates)
        self.deadline = deadline
        if deadline is not None:
            self.absences = absences or Absences()
            self.absences.decide = self._decide
        self.port = 0
        self.words: Sequence[str] = ()
        self.session = ""
        self.room = Room()
        self.links: dict[str, Link] = {}
        self.most_bytes = _MOST_OF_HELLO
        self._agreed: Mapping[str, str] = {}
        self._shapes: Shapes | None = None
        self._sites: dict[str, RemoteSite] = {}
        self._told: dict[str, list[ClientData]] = {}  # by sites that said hello
        self._barriers: dict[str, str] = {}  # the last one of each site
        self._streams: dict[str, asyncio.Queue[bytes | None]] = {}
        self._changed = threading.Condition()  # of what came from sites
        self._loop = asyncio.new_event_loop()
        self._spare = SpareMemory()
        self._server: Any = None
        self._failed: Exception | None = None
        self._watching: asyncio.Future[None] | None = None
        self._begun = asyncio.Event()
        # Is called with the port once the server listens.
        self.start: Callable[[int], Any] = lambda port: None

    @override
    def of(self, party: str) -> RemoteSite | None:
        if role_of(party) != "client":
            return None
        name = site_of(party)
        if name not in self._sites:
            link = Link(name, self.room)
            if self._shapes is not None:
                link.expected = Expected(self._shapes)
            self.links[name] = link
            self._sites[name] = RemoteSite(name, link.deliver)
        return self._sites[name]

    @override
    def expect(self, shapes: Shapes) -> None:
        self._shapes = shapes
        for link in self.links.values():
            link.expected = Expected(shapes)
        if self.most_bytes != shapes.most_bytes:
            self.most_bytes = shapes.most_bytes
            again = self._listen_again()
            asyncio.run_coroutine_threadsafe(again, self._loop).result()

    @override
    def meet(
        self, parties: Sequence[str], agreed: Mapping[str, str]
    ) -> list[ClientData]:
        for party in parties:
            self.of(party)
        self._agreed = agreed
        if self._server is None:
            ready = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(ready,), daemon=True
            )
            self._thread.start()
            ready.wait()
            if self._failed is not None:
                raise self._failed
            _logger.info(
                "Listening on port %d for %d sites.", self.port, len(self.links)
            )
            self.start(self.port)
        self._wait_for_all()
        return list({own.client_id: own for own in self._all_told()}.values())

    def _all_told(self) -> list[ClientData]:
        """Returns what sites have said; the holders of a client say the same."""
        return [own for told in self._told.values() for own in told]

    def _wait_for_all(self) -> None:
        """Waits until all sites have said hello; says which have not."""
        with self._changed:
            while missing := [name for name in self.links if name not in self._told]:
                if self._failed is not None:
                    raise self._failed
                if not self._changed.wait(timeout=_SAY_EVERY):
                    _logger.info("Waiting for %s.", ", ".join(missing))

    def give_up(self, name: str, reason: str) -> None:
        """Ends the run: a site will not come back.

        Args:
            name: The site.
            reason: Why.
        """
        with self._changed:
            self._failed = ConnectionError(f"{name} {reason}")
            self._changed.notify_all()
        self.links[name].fail(self._failed)

    def connected(self) -> set[str]:
        """Returns the sites that are connected now."""
        return set(self._streams)

    @override
    def begin(self, barrier: Mapping[str, str]) -> None:
        self.session = uuid.uuid4().hex
        self._barriers = dict(barrier)
        for name, site in self._sites.items():
            self.links[name].reset()
            site.reset()
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        """Has sites connect again, so that they begin the session."""
        self._begun.set()
        for stream in self._streams.values():
            stream.put_nowait(None)

    @override
    def keep(self) -> Mapping[str, str]:
        number = uuid.uuid4().hex[:8]
        there = [name for name in self._sites if name not in self._away()]
        kept = {name: self._sites[name].call("keep", number) for name in there}
        for name, future in kept.items():
            future.result()
            self._barriers[name] = number
        return dict(self._barriers)

    def _away(self) -> set[str]:
        """Returns the sites whose clients are absent from the round."""
        clients = () if self.absences is None else self.absences.latest()
        return {name for name in self._sites if client_of_site(name) in clients}

    @override
    def end(self, final: Mapping[str, Sequence[tuple[int, str]]]) -> None:
        for name, link in self.links.items():
            link.end(list(final.get(name, ())))
        expected = [name for name in self.links if name not in self._away()]

        def is_done() -> bool:
            return self._failed is not None or all(
                self.links[name].is_over for name in expected
            )

        with self._changed:
            self._changed.wait_for(is_done, timeout=self.deadline)
        if missing := [name for name in expected if not self.links[name].is_over]:
            _logger.warning(
                "The run is complete, but %s did not get its part of the network.",
                ", ".join(missing),
            )

    @override
    def close(self) -> None:
        if self._server is not None:
            end = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            end.result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._server = None

    def _decide(self) -> list[int]:
        """Returns the clients that are absent as a round begins.

        Those that were there in the round before are waited for.
        """
        before = self._away()

        def are_here() -> bool:
            here = self._streams.keys()
            return bool(here) and all(n in here or n in before for n in self._sites)

        with self._changed:
            self._changed.wait_for(are_here, timeout=self.deadline)
            self._changed.wait_for(lambda: self._streams)  # for one at least
            gone = [name for name in self._sites if name not in self._streams]
        return [client_of_site(name) for name in gone]

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._listen())
        except Exception as error:
            self._failed = error
            return
        finally:
            ready.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        handler: Any = grpc.stream_stream_rpc_method_handler(self._connect)
        tell: Any = grpc.unary_unary_rpc_method_handler(self._tell)
        methods = {METHOD: handler, WORDS: tell}
        service = grpc.method_handlers_generic_handler(SERVICE, methods)
        server = grpc.aio.server(options=options(self.most_bytes))
        server.add_generic_rpc_handlers([service])
        own = read_credentials(self.certificates, "server")
        credentials = grpc.ssl_server_credentials(
            [(own.key, own.certificate)], own.authority, require_client_auth=True
        )
        _require_free(self.listen)
        self.port = server.add_secure_port(self.listen, credentials)
        await server.start()
        self._server = server
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch())

    async def _listen_again(self) -> None:
        """Listens at the same port, with another limit; sites connect again."""
        before, self._begun = self._begun, asyncio.Event()
        before.set()
        for stream in self._streams.values():
            stream.put_nowait(None)
        await self._server.stop(grace=_GRACE)
        host, _, _ = self.listen.rpartition(":")
        self.listen = f"{host}:{self.port}"
        await self._listen()

    async def _watch(self) -> None:
        """Says which sites are gone; gives those up that are silent for too long."""
        deadline, gone = self.deadline or math.inf, Gone()
        while True:
            await asyncio.sleep(min(_WATCH_EVERY, deadline / 10))
            for name, link in self.links.items():
                if link.silent_for() > deadline:
                    link.fail(SiteAbsent(name, deadline))
            if self._begun.is_set():
                over = {name for name, link in self.links.items() if link.is_over}
                gone.note(self.links.keys() - self._streams.keys() - over)

    async def _end(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for stream in self._streams.values():
            stream.put_nowait(None)
        await self._server.stop(grace=_GRACE)

    async def _tell(self, data: bytes, context: Any) -> bytes:
        """Tells a site what was typed for the run."""
        name = _name_in_certificate(context)
        try:
            self._link(name)
        except FrameError as error:
            _logger.warning("Refused %s (%s): %s.", name, context.peer(), error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return encoded(Frame("words", 0, list(self.words)))

    async def _connect(
        self, frames: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        """Serves the stream of a site."""
        name = _name_in_certificate(context)
        try:
            link, hello = self._greeted(name, await anext(frames, b""))
        except FrameError as error:
            _logger.warning("Refused %s (%s): %s.", name, context.peer(), error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            return
        begun = self._begun
        yield encoded(Frame("accepted", 0, None))
        await begun.wait()
        if begun is not self._begun:  # it is to connect again
            return
        stream: asyncio.Queue[bytes | None] = asyncio.Queue()

        def send(data: bytes) -> None:
            self._loop.call_soon_threadsafe(stream.put_nowait, data)

        welcome = {"session": self.session, "barrier": self._barriers.get(name)}
        stream.put_nowait(encoded(Frame("welcome", 0, welcome)))
        if before := self._streams.get(name):
            before.put_nowait(encoded(Frame("replaced", 0, None)))
            before.put_nowait(None)
        link.attach(self._saved(hello), send)
        self._note(name, stream)
        taking = asyncio.ensure_future(self._take(link, frames, stream, send))
        try:
            while (data := await stream.get()) is not None:
                yield data
        finally:
            link.detach(send)
            taking.cancel()
            if self._streams.get(name) is stream:
                self._note(name, None)

    def _note(self, name: str, stream: asyncio.Queue[bytes | None] | None) -> None:
        """Notes the stream of a site; `None`: it has ended."""
        with self._changed:
            if stream is None:
                del self._streams[name]
            else:
                self._streams[name] = stream
            self._changed.notify_all()

    def _link(self, name: str) -> Link:
        """Returns the link of a site.

        Raises:
            FrameError: If there is no such site.
        """
        if name not in self.links:
            known = ", ".join(self.links)
            raise FrameError(f"there is no site {name!r} in this run ({known})")
        return self.links[name]

    def _greeted(self, name: str, data: bytes) -> tuple[Link, dict[str, Any]]:
        """Returns the link of a site, and its hello.

        Raises:
            FrameError: If it is refused; says why.
        """
        kind, _, hello = decoded(data)
        link = self._link(name)
        if kind != "hello" or not isinstance(hello, dict):
            raise FrameError("expected a hello first")
        if hello.get("site") != name:
            raise FrameError(
                f"it says that it is {hello.get('site')!r:.80}, but its certificate is "
                f"that of {name!r}"
            )
        if type(hello.get("saved")) is not int:
            raise FrameError("its hello names no call")
        try:
            told = list(Hello.of(hello, self._agreed).data)
        except ValueError as error:
            raise FrameError(str(error)) from error
        link.require_saved(self._saved(hello))
        if [own.client_id for own in told] != [client_of_site(name)]:
            raise FrameError("its hello has the data of other clients")
        with self._changed:
            if name not in self._told:
                self._require_alike(told)
            if self._told.setdefault(name, told) != told:
                raise FrameError("its data differ from those that it began with")
            self._changed.notify_all()
        return link, hello

    def _require_alike(self, told: list[ClientData]) -> None:
        """Refuses a site whose samples do not go together with those of others.

        Raises:
            FrameError: Says why.
        """
        try:
            require_alike([*self._all_told(), *told])
        except ValueError as error:
            raise FrameError(str(error).rstrip(".")) from error

    def _saved(self, hello: dict[str, Any]) -> int:
        """Returns the last call of this session that a site has saved."""
        saved: int = hello["saved"]
        return saved if hello.get("session") == self.session else 0

    async def _take(
        self,
        link: Link,
        frames: AsyncIterator[bytes],
        stream: asyncio.Queue[bytes | None],
        send: Callable[[bytes], None],
    ) -> None:
        """Takes the replies of a site until its stream ends."""
        try:
            async for data in frames:
                link.take(data, send)
                self._spare.note(len(data))
                if link.is_over:
                    break
        except FrameError as error:
            _logger.warning("%s sent what it may not: %s.", link.name, error)
        except Exception as error:  # the stream broke
            _logger.debug("%s: %s", link.name, error)
        stream.put_nowait(None)
        with self._changed:
            self._changed.notify_all()


def _require_free(address: str) -> None:
    """Stops where a server cannot listen at an address; gRPC does not say why.

    Raises:
        OSError: Says why.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, int(port)))
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"Cannot listen at {address} (`engine.listen`): {reason}."
            ) from error


def _name_in_certificate(context: Any) -> str:
    """Returns the first DNS name in the certificate of a stream's other end."""
    names = context.auth_context().get("x509_subject_alternative_name", [b""])
    return str(names[0].decode())
