"""`Answers`: carries out a site's calls, each once, and saves what came of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device

from split_lightning.engines.calls import Calls
from split_lightning.engines.journal import Journal
from split_lightning.engines.site import Site
from split_lightning.engines.wire import Frame, FrameError, decoded, encoded
from split_lightning.finite import NotFinite

_SAVE_AFTER = 100  # calls, at the latest
_BARRIERS = 3  # that are kept beside the one at which the session began
_LONGEST = 2000  # characters of an error's message


class Answers:
    """Answers the calls to a site.

    The journal has the state after some call, and the number of this call: a process
    that begins anew, or has a new connection, continues from there. A barrier is a
    state that the server's checkpoint names.

    A call that is none changes nothing. One that fails returns the site to the state in
    the journal, and no call is carried out any more before the next connection.

    Args:
        site: The site, before any training.
        journal: Where states are saved.

    Attributes:
        session: The server's run, as the server names it; empty: none yet.
        number: The number of the last call that was carried out.
        saved: The number of the last call that need not be carried out again.
        replies: The replies that the server may not have, by the number of the call.
    """

    def __init__(self, site: Site, journal: Journal) -> None:
        self.site = site
        self.journal = journal
        self.calls = Calls(site)
        self._failed = ""  # what became of a call; empty: none has failed
        self._has_trained = False  # since its state was saved
        self._began_at = ""  # the barrier of the session; empty: the start of training
        self.session, self.number, self.saved = "", 0, 0
        self.replies: dict[int, bytes] = {}
        journal.save("start", {"site": site.state_dict()})
        if journal.has("journal"):
            state = journal.load("journal")
            self.session, self.saved = state["session"], state["number"]

    def begin(self, session: str, barrier: str | None) -> None:
        """Begins a session of the server, or continues one.

        Args:
            session: The session.
            barrier: Where a new session begins; `None`: at the start of training.

        Raises:
            ValueError: If the site has no state of this barrier.
        """
        if session == self.session:
            self.rewind()
            return
        name = "start" if barrier is None else f"barrier-{barrier}"
        if not self.journal.has(name):
            raise ValueError(
                f"Expected the site to have its state of barrier {barrier!r}, at which "
                f"the server resumes, but {self.journal.folder} has none. Begin the "
                "run anew, or resume it from a later checkpoint."
            )
        self.site.load_state_dict(self.journal.load(name)["site"])
        self.session, self.number, self.replies = session, 0, {}
        self._failed, self._began_at = "", barrier or ""
        self._save()

    def rewind(self) -> None:
        """Returns to the state in the journal."""
        state = self.journal.load("journal")
        self.site.load_state_dict(state["site"])
        self.session, self._failed = state["session"], ""
        self._began_at = state["began_at"]
        self.number = self.saved = state["number"]
        self._has_trained = False
        replies = {n: data.numpy().tobytes() for n, data in state["replies"].items()}
        self.replies = replies

    def answer(self, data: bytes) -> bytes | None:
        """Carries out a call; returns the reply, or `None` to a call that came before.

        Raises:
            FrameError: If the bytes are no call, or not the next one. Nothing has
                changed then.
        """
        kind, number, value = decoded(data)
        if kind != "call" or not self.session:
            raise FrameError(f"expected a call of a session, but got {kind!r:.80}")
        if number <= self.number:
            return None
        if number != self.number + 1:
            raise FrameError(f"expected call {self.number + 1}, but got {number}")
        if not isinstance(value, tuple) or len(value) != 4:
            raise FrameError("a call is a method, its arguments, and two values")
        method, arguments, answered, save = value
        self.calls.check(method, arguments)
        if type(answered) is not int or type(save) is not bool:
            raise FrameError(
                "a call names the last reply that came, and may ask to save"
            )
        kind, result = self._result(method, arguments)
        self.number = number
        is_due = self._is_due(method, save)
        saved = number if is_due else self.saved
        reply = encoded(Frame(kind, number, (saved, result)))
        later = {n: own for n, own in self.replies.items() if n > answered}
        self.replies = {**later, number: reply}
        if is_due:
            self._save()
        return reply

    def _result(self, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        """Carries out a call; returns the kind of the reply, and its value."""
        if self._failed:
            return "error", self._failed
        try:
            return "reply", self._carry_out(method, arguments)
        except NotFinite as found:
            return "error", f"{NotFinite.__name__}: {found}"
        except Exception as error:  # somewhere in the middle
            self.rewind()
            self._failed = f"{type(error).__name__}: {error}"[:_LONGEST]
            return "error", self._failed

    def _carry_out(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "keep":
            return self._keep(*arguments)
        own = move_data_to_device(arguments, self.site.device)
        return getattr(self.site, method)(*own)

    def _keep(self, barrier: str) -> None:
        """Saves the state under the name of a barrier; forgets that of old ones.

        The barrier at which the session began stays: the server may be killed before it
        has written a checkpoint with the new one.
        """
        self.journal.save(f"barrier-{barrier}", {"site": self.site.state_dict()})
        first = f"barrier-{self._began_at}"
        self.journal.keep_newest("barrier-*", _BARRIERS, but=first)

    def _is_due(self, method: str, save: bool) -> bool:
        """Returns whether to save the state, which is at rest between steps.

        That is also when its weights leave, which is how turns end.
        """
        self._has_trained |= method == "step"
        if self._failed or self.site.is_waiting:
            return False
        leaves = method == "read" and self._has_trained
        is_late = self.number - self.saved >= _SAVE_AFTER
        return save or leaves or method == "keep" or is_late

    def _save(self) -> None:
        state = {
            "session": self.session,
            "began_at": self._began_at,
            "number": self.number,
            "replies": {
                number: torch.frombuffer(bytearray(data), dtype=torch.uint8)
                for number, data in self.replies.items()
            },
            "site": self.site.state_dict(),
        }
        self.journal.save("journal", state)
        self.saved, self._has_trained = self.number, False
