"""A callback that measures training steps, also in a run that the command line builds.

    python -m split_lightning.train +callbacks.probe._target_=stopwatch.Stopwatch

The callback takes no arguments. It hands each step to the probe that `measured_by`
has set in this process.
"""

from __future__ import annotations

import cProfile
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

import split_lightning

PACKAGE = str(Path(split_lightning.__file__).parent)
_probes: list[Probe] = []


class Probe:
    """Notes the end of each training step."""

    def tick(self, batch: Any) -> None:
        """Notes that the step of a batch has ended."""

    def stop(self) -> None:
        """Notes that training has ended."""


class Times(Probe):
    """Processor seconds at the end of each step, of all threads of this process."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def tick(self, batch: Any) -> None:
        """Notes the time."""
        self.seconds.append(time.process_time())

    def milliseconds(self, first: int, count: int) -> float:
        """Returns the mean milliseconds of so many steps after the first ones."""
        start, end = self.seconds[first - 1], self.seconds[first - 1 + count]
        return 1e3 * (end - start) / count


class Calls(Probe):
    """Counts the package's own Python calls in each step, by file.

    A step goes from the end of the last one to its own end: the next batch, the hooks
    of the callbacks and of the module, and what Lightning calls between them. A
    generator that goes on counts as a call.

    Attributes:
        steps: The calls of each step from the second on, by file.
        begins_turn: Whether each of these steps is the first of a turn.
    """

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self.begins_turn: list[bool] = []
        self._calls: Counter[str] = Counter()
        self._ended_turn: bool | None = None

    def tick(self, batch: Any) -> None:
        """Files the calls of the step, and counts those of the next."""
        sys.setprofile(None)
        if self._ended_turn is not None:
            self.steps.append(self._calls)
            self.begins_turn.append(self._ended_turn)
        self._ended_turn = ends_turn(batch)
        self._calls = Counter()
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Stops counting."""
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            self._calls[name[len(PACKAGE) + 1 :]] += 1


class Profile(Probe):
    """Profiles steps with cProfile, from the end of the first ones on."""

    def __init__(self, first: int) -> None:
        self.profile = cProfile.Profile()
        self._left = first

    def tick(self, batch: Any) -> None:
        """Begins after the first steps."""
        self._left -= 1
        if self._left == 0:
            self.profile.enable()

    def stop(self) -> None:
        """Stops profiling."""
        self.profile.disable()


class Stopwatch(pl.Callback):
    """Hands the end of each step to the probe of this process."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Hands the step over; training ends before what follows the round's last."""
        _probes[-1].tick(batch)
        if index + 1 == trainer.num_training_batches:
            _probes[-1].stop()

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Stops the probe."""
        _probes[-1].stop()


@contextmanager
def measured_by(probe: Probe) -> Iterator[Stopwatch]:
    """Sets the probe of this process; yields the callback that feeds it."""
    _probes.append(probe)
    try:
        yield Stopwatch()
    finally:
        probe.stop()
        _probes.pop()


def ends_turn(batch: Any) -> bool:
    """Returns whether other clients act in the next step; a plain batch has no turn."""
    return bool(getattr(batch, "ends_turn", False))
