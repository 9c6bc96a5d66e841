"""`Answers`: carries out a site's calls, each once, and saves what came of them."""

from __future__ import annotations

from typing import Any

from split_lightning.engines.journal import Journal
from split_lightning.engines.site import Site
from split_lightning.engines.wire import Frame, FrameError, decoded, encoded

# The calls that change what a site remembers between steps are part of its journal
# from the next step on; at the latest after so many.
_SAVE_AFTER = 100
METHODS = (
    "forward",
    "labels",
    "loss",
    "backward",
    "step",
    "read",
    "write",
    "share",
    "adopt",
    "evaluate",
    "score",
)


class Answers:
    """Answers the calls to a site.

    Args:
        site: The site.
        journal: Where it saves its state; `None`: nowhere.

    Attributes:
        number: The number of the last call that was carried out.
        saved: The number of the last one that need not be carried out again.
    """

    def __init__(self, site: Site, journal: Journal | None = None) -> None:
        self.site = site
        self.journal = journal
        self.number = self.saved = 0

    def answer(self, data: bytes) -> bytes | None:
        """Carries out a call; returns the reply, or `None` to a call that came before.

        Raises:
            FrameError: If the bytes are no call, or not the next one.
        """
        kind, number, value = decoded(data)
        if kind != "call":
            raise FrameError(f"expected a call, but got {kind!r}")
        if number <= self.number:
            return None
        if number != self.number + 1:
            raise FrameError(f"expected call {self.number + 1}, but got {number}")
        try:
            method, arguments = value
        except (TypeError, ValueError) as error:
            raise FrameError("a call is a method and its arguments") from error
        if method not in METHODS:
            raise FrameError(f"there is no call {method!r}")
        result: Any
        try:
            kind, result = "reply", getattr(self.site, method)(*arguments)
        except Exception as error:
            kind, result = "error", f"{type(error).__name__}: {error}"
        self.number = number
        if self.journal is None:
            self.saved = number
        elif self._is_due(method):
            self.save()
        return encoded(Frame(kind, number, (self.saved, result)))

    def save(self) -> None:
        """Saves the state of the site."""
        assert self.journal is not None
        state = {"number": self.number, "site": self.site.state_dict()}
        self.journal.save("journal", state)
        self.saved = self.number

    def _is_due(self, method: str) -> bool:
        if self.site.parties:  # that wait for their gradient
            return False
        return method == "step" or self.number - self.saved >= _SAVE_AFTER

    def resume(self, name: str = "journal") -> None:
        """Returns to a state that was saved."""
        assert self.journal is not None
        state = self.journal.load(name)
        self.site.load_state_dict(state["site"])
        self.number = self.saved = state["number"]
