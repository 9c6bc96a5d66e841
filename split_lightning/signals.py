"""Signals: a run that is asked to stop ends between two batches, or at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A run was asked to stop. As with Ctrl-C, nothing handles it as an error.

    Attributes:
        signal: The signal that asked.
        checkpoint: What was written at the stop; `None`: nothing.
    """

    def __init__(
        self, number: int, when: str = "", checkpoint: Path | None = None
    ) -> None:
        self.signal = signal.Signals(number)
        self.checkpoint = checkpoint
        text = f"{self.signal.name} {when}".rstrip()
        super().__init__(f"{text}; all is kept in {checkpoint}" if checkpoint else text)


class SignalCatcher:
    """Notes the first SIGINT or SIGTERM; a second one has its former effect.

    Attributes:
        received: The signal that came; `None` while there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    def install(self) -> None:
        """Begins to catch; only a program's main thread can."""
        self.received = None
        self._before = _handle(self._note)

    def remove(self) -> None:
        """Puts back what handled the signals before."""
        _put_back(self._before)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.remove()


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raises `Interrupted` at SIGINT and SIGTERM in the block.

    Training itself is not cut off: there a `SignalCatcher` waits for the batch's end.
    """
    before = _handle(_interrupt)
    try:
        yield
    finally:
        _put_back(before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _handle(
    handler: Callable[[int, FrameType | None], None],
) -> dict[int, Callable[..., Any] | int | None]:
    """Sets the signals' handler; returns what was there before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in _CAUGHT}


def _put_back(before: dict[int, Callable[..., Any] | int | None]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)
