"""Signals: a run that is asked to stop ends between two batches."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run was asked to stop, and did so between two batches.

    Attributes:
        signal: The signal that asked.
        checkpoint: From where the run can go on.
        place: Where in the run it stopped, in words.
    """

    def __init__(self, number: int, checkpoint: Path, place: str) -> None:
        self.signal = signal.Signals(number)
        self.checkpoint = checkpoint
        self.place = place
        super().__init__(f"{self.signal.name} {place}; all is kept in {checkpoint}")


class SignalCatcher:
    """Notes the first SIGINT or SIGTERM; a second one does what it did before.

    Attributes:
        received: The signal that came; `None` while there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    def install(self) -> None:
        """Begins to catch; only a program's main thread can."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _CAUGHT}
            for number in _CAUGHT:
                signal.signal(number, self._note)

    def remove(self) -> None:
        """Puts back what handled the signals before."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.remove()
