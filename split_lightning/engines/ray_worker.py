"""`RayWorker`: a process of a Ray cluster that computes for many clients."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from split_lightning.engines.answers import Answers
from split_lightning.engines.hello import Hello
from split_lightning.engines.link import Link, Send
from split_lightning.engines.ray_cluster import import_ray

# Builds a site for some clients in a worker's process: from the worker's name and the
# clients what answers for the site, and what it says first.
NewAnswers = Callable[[str, Sequence[int]], tuple[Answers, Hello]]
_SAY_EVERY = 30  # seconds of waiting
_logger = logging.getLogger(__name__)


class _Came(NamedTuple):
    """The reply to a call, as a future, and over which connection it came."""

    reply: Any
    actor: Any
    send: Send


class RayWorker:
    """An actor, which is started again when its process dies.

    It continues from its journal. Ray itself starts nothing again, and repeats no call:
    it would compute on a state that is new.

    Args:
        link: The calls to it.
        new_answers: Builds its site.
        clients: The clients that it computes for.
        resources: What Ray reserves for it, such as `{"num_cpus": 1}`.
        starts: How often it may start, before the run ends.
    """

    def __init__(
        self,
        link: Link,
        new_answers: NewAnswers,
        clients: Sequence[int],
        resources: Mapping[str, float],
        starts: int,
    ) -> None:
        self.link = link
        self.new_answers = new_answers
        self.clients = list(clients)
        self.resources = dict(resources)
        self.starts = self._left = starts
        self._session: tuple[str, str | None] | None = None  # and its barrier
        self._actor: Any = None
        self._greeting: Any = None
        self._came: queue.SimpleQueue[_Came | None] = queue.SimpleQueue()
        threading.Thread(target=self._take_all, daemon=True).start()

    def start(self) -> None:
        """Starts the actor; `greeting` waits for it."""
        self._left -= 1
        remote = import_ray().remote(
            **self.resources,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",  # over the nodes
        )
        self._actor = remote(_Actor).remote(
            self.new_answers, self.link.name, self.clients
        )
        self._greeting = self._actor.greet.remote()

    def greeting(self) -> tuple[str, int, Mapping[str, Any]]:
        """Returns the session, the last call that was saved, and the hello.

        Raises:
            ConnectionError: If the worker cannot start; says why.
        """
        ray = import_ray()
        while not ray.wait([self._greeting], timeout=_SAY_EVERY)[0]:
            _logger.warning(
                "Waiting for %s, which needs %s. These are free: %s.",
                self.link.name,
                self.resources,
                ray.available_resources(),
            )
        try:
            found: tuple[str, int, Mapping[str, Any]] = ray.get(self._greeting)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise ConnectionError(
                f"{self.link.name} could not start: {type(cause).__name__}: {cause}"
            ) from error
        return found

    def begin(self, session: str, barrier: str | None) -> None:
        """Begins a session.

        Args:
            session: Its name.
            barrier: The state from which it begins; `None`: the start of training.
        """
        self._session = session, barrier
        self._attach(0)

    def _attach(self, saved: int) -> None:
        assert self._session is not None
        actor = self._actor
        replies = import_ray().get(actor.begin.remote(*self._session))

        def send(data: bytes) -> None:
            reply = actor.answer.remote(np.frombuffer(data, dtype=np.uint8))
            # The callback may run at once, in this thread, which has the link's lock.
            came = self._came
            reply.future().add_done_callback(lambda r: came.put(_Came(r, actor, send)))

        self.link.attach(saved, send)
        for data in replies:
            self.link.take(data, send)

    def end(self) -> None:
        """Ends the actor."""
        actor, self._actor = self._actor, None
        self._came.put(None)
        if actor is not None:
            import_ray().kill(actor)

    def _take_all(self) -> None:
        """Takes replies until the end, in a thread of its own."""
        while (came := self._came.get()) is not None:
            self._take(came)

    def _take(self, came: _Came) -> None:
        try:
            data = came.reply.result()
            if data is not None:
                self.link.take(data.tobytes(), came.send)
        except import_ray().exceptions.RayActorError:
            if came.actor is self._actor:  # all its calls come with this error
                self.link.detach(came.send)
                self._start_again()
        except Exception as error:
            self.link.fail(error)

    def _start_again(self) -> None:
        """Starts the actor until it lives, or has died too often."""
        try:
            while not self._continues():
                pass
        except Exception as error:
            self.link.fail(error)

    def _continues(self) -> bool:
        """Starts the actor; returns whether it lives, and continues from its journal.

        Raises:
            ConnectionError: If it may not start again, or has lost its journal.
        """
        name = self.link.name
        if self._left == 0:
            raise ConnectionError(
                f"{name} died {self.starts} times. The reason is in Ray's logs, in "
                "/tmp/ray/session_latest/logs on its node: often there was too little "
                "memory. Resume the run from its last checkpoint."
            )
        _logger.warning("%s died; it is started again.", name)
        try:
            self.start()
            session, saved, _ = self.greeting()
            assert self._session is not None
            if session != self._session[0]:
                raise ConnectionError(
                    f"{name} was started again where the state that it saved is not. "
                    "Keep the run's folder (`hydra.run.dir`) on storage that all nodes "
                    "share, and resume the run from its last checkpoint."
                )
            self._attach(saved)
        except import_ray().exceptions.RayActorError:
            return False
        return True


class _Actor:
    """A site in a worker's process."""

    def __init__(
        self, new_answers: NewAnswers, name: str, clients: Sequence[int]
    ) -> None:
        self._build = new_answers, name, clients

    def greet(self) -> tuple[str, int, Mapping[str, Any]]:
        """Builds the site; returns its session, the last saved call, and its hello."""
        new_answers, name, clients = self._build
        self.answers, hello = new_answers(name, clients)
        return self.answers.session, self.answers.saved, hello.plain()

    def begin(self, session: str, barrier: str | None) -> list[bytes]:
        """Begins a session, or continues one; returns the last replies."""
        self.answers.begin(session, barrier)
        return list(self.answers.replies.values())

    def answer(self, data: Any) -> Any:
        """Answers a call."""
        reply = self.answers.answer(data.tobytes())
        return None if reply is None else np.frombuffer(reply, dtype=np.uint8)
