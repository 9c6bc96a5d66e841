"""`RaySites`: sites that are workers of a Ray cluster, each with many clients."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError
from typing_extensions import override

from split_lightning.engines.answers import Answers
from split_lightning.engines.expected import Expected
from split_lightning.engines.link import Link
from split_lightning.engines.remote import RemoteSite, Sites
from split_lightning.engines.shapes import Shapes
from split_lightning.engines.wire import FrameError
from split_lightning.message import role_of

# Returns what answers for a site, from its name; and what it agrees on.
NewAnswers = Callable[[str], tuple[Answers, Mapping[str, str]]]
_STARTS = 10  # of a worker, before the run ends
_logger = logging.getLogger(__name__)


class RaySites(Sites):
    """Places the clients of a run on workers of a cluster, which one owner trusts.

    Ray runs code on any node for every member, and sends Python objects pickled. The
    calls themselves are frames, in arrays of bytes.

    Args:
        address: The cluster, such as `auto` or `ray://head:10001`; `None`: a new one on
            this machine.
        workers: Number of workers; clients are dealt out among them.
        num_cpus: Number of CPUs of each worker.
        num_gpus: Number of GPUs of each worker.

    Attributes:
        new_answers: Builds a site in a worker's process.
    """

    new_answers: NewAnswers

    def __init__(
        self,
        address: str | None = None,
        workers: int = 2,
        num_cpus: float = 1,
        num_gpus: float = 0,
    ) -> None:
        self.address = address
        self.workers = workers
        self.resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self.session = uuid.uuid4().hex
        self.barrier: str | None = None
        self.agreed: dict[str, str] = {}
        self.links = [Link(f"worker-{number}") for number in range(workers)]
        self._sites = [RemoteSite(link.name, link.deliver) for link in self.links]
        self._parties: dict[str, int] = {}
        self._barriers = 0
        self._is_open = False
        self._workers: list[_Worker] = []

    @override
    def of(self, party: str) -> RemoteSite | None:
        if role_of(party) != "client":
            return None
        number = self._parties.setdefault(party, len(self._parties))
        return self._sites[number % self.workers]

    @override
    def expect(self, shapes: Shapes) -> None:
        for link in self.links:
            link.expected = Expected(shapes)

    @override
    def open(
        self, parties: Sequence[str], agreed: Mapping[str, str], barrier: str | None
    ) -> None:
        if self._is_open:
            return
        self._is_open = True
        self.agreed, self.barrier = dict(agreed), barrier
        if not ray.is_initialized():
            local = {"_node_ip_address": "127.0.0.1"} if self.address is None else {}
            ray.init(
                address=self.address or "local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
        self._workers = [_Worker(self, link) for link in self.links]
        for worker in self._workers:
            worker.start()

    @override
    def keep(self) -> str:
        self._barriers += 1
        barrier = f"{self.session[:8]}-{self._barriers}"
        for future in [site.call("keep", barrier) for site in self._sites]:
            future.result()
        return barrier

    @override
    def end(self) -> None:
        pass

    @override
    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            ray.shutdown()


class _Worker:
    """An actor, which is started again when its process dies."""

    def __init__(self, sites: RaySites, link: Link) -> None:
        self.sites = sites
        self.link = link
        self._left = _STARTS
        self._lock = threading.Lock()
        self._actor: Any = None

    def start(self) -> None:
        """Starts the actor; it continues from its journal."""
        # Ray itself starts nothing again: it would compute on a state that is new.
        options = {**self.sites.resources, "max_restarts": 0, "max_task_retries": 0}
        remote: Any = ray.remote(**options)
        actor = remote(_Actor).remote(self.sites.new_answers, self.link.name)
        session, saved, agreed = ray.get(actor.hello.remote())
        for key, value in self.sites.agreed.items():
            if agreed.get(key) != value:
                raise ValueError(f"{self.link.name}: its `{key}` differs.")
        replies = ray.get(actor.begin.remote(self.sites.session, self.sites.barrier))
        for data in replies:
            self.link.take(data)
        self._actor = actor
        self.link.attach(saved if session == self.sites.session else 0, self._send)

    def _send(self, data: bytes) -> None:
        actor = self._actor
        reply = actor.answer.remote(np.frombuffer(data, dtype=np.uint8))
        reply.future().add_done_callback(lambda done: self._take(actor, done))

    def _take(self, actor: Any, done: Any) -> None:
        error = done.exception()
        if error is None:
            data = done.result()
            try:
                if data is not None:
                    self.link.take(data.tobytes())
            except FrameError as refused:
                self.link.fail(refused)
            return
        if not isinstance(error, RayActorError):
            self.link.fail(error)
            return
        with self._lock:  # every call that waited fails
            if actor is not self._actor or not self.sites._is_open:
                return
            self._left -= 1
            if self._left == 0:
                self.link.fail(error)
                return
            _logger.warning("%s died; it is started again.", self.link.name)
            self.link.detach(self._send)
            try:
                self.start()
            except Exception as failed:
                self.link.fail(failed)


class _Actor:
    """A site in a worker's process."""

    def __init__(self, new_answers: NewAnswers, name: str) -> None:
        self.answers, agreed = new_answers(name)
        self.agreed = dict(agreed)

    def hello(self) -> tuple[str, int, dict[str, str]]:
        """Returns the session, the last call that was saved, and what it agrees on."""
        return self.answers.session, self.answers.saved, self.agreed

    def begin(self, session: str, barrier: str | None) -> list[bytes]:
        """Begins a session, or continues one; returns the last replies."""
        self.answers.begin(session, barrier)
        return list(self.answers.replies.values())

    def answer(self, data: Any) -> Any:
        """Answers a call."""
        reply = self.answers.answer(data.tobytes())
        return None if reply is None else np.frombuffer(reply, dtype=np.uint8)
