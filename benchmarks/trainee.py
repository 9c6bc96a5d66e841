"""A training process that a benchmark starts, and times in blocks (see turns.py)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

_MARK = "SPLIT_LIGHTNING_BENCHMARK"  # in the environment of all that a trainee starts
_SECONDS_TO_BEGIN = 300
_SECONDS_TO_END = 60


class Trainee:
    """A process with a `Baton`, and all processes that it starts.

    Args:
        name: What it is called in reports.
        command: Starts it; `{socket}` becomes the address of its `Baton`.
        folder: Gets its socket and its log.
        environment: Variables of its environment, beside those of this process.

    Attributes:
        pid: The process with the `Baton`, once it has begun.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.name, self.pid = name, 0
        self._mark, self._log = uuid.uuid4().hex, folder / f"{name}.log"
        address = str(folder / f"{name}.socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen()
        self._listener.settimeout(1)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [word.replace("{socket}", address) for word in command],
                env={**os.environ, **environment, _MARK: self._mark},
                cwd=folder,
                stdout=log,
                stderr=log,
            )

    def begin(self) -> None:
        """Waits until its first batch has ended."""
        for _ in range(_SECONDS_TO_BEGIN):
            try:
                line, _ = self._listener.accept()
                break
            except TimeoutError:
                if self._process.poll() is not None:
                    self._fail()
        else:
            self._fail()
        line.settimeout(None)
        self._line = line.makefile("rw")
        self.pid = int(self._told()["pid"])

    def block(self, num_batches: int) -> float:
        """Trains a block; returns the mean seconds of its batches but the first."""
        print(num_batches, file=self._line, flush=True)
        seconds: list[float] = self._told()["seconds"]
        return sum(seconds) / len(seconds)

    def end(self) -> None:
        """Ends it, and all that it started."""
        if self.pid:
            self._line.close()
        else:
            self._process.terminate()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._listener.close()

    def pin(self, own: Collection[int], others: Collection[int]) -> None:
        """Pins the process with the `Baton` to cores, and its other processes, too."""
        for pid in self.processes():
            cores = own if pid == self.pid else others
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)

    def processes(self) -> Iterator[int]:
        """Yields what it started, by the mark in the environment."""
        mark = f"{_MARK}={self._mark}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    variables = (folder / "environ").read_bytes().split(b"\0")
                except OSError:  # it has ended
                    continue
                if mark in variables:
                    yield int(folder.name)

    def _told(self) -> dict[str, object]:
        line = self._line.readline()
        if not line:
            self._fail()
        told: dict[str, object] = json.loads(line)
        return told

    def _fail(self) -> None:
        self._process.kill()
        tail = self._log.read_text(errors="replace")[-3000:]
        time.sleep(1)
        sys.exit(f"{self.name} has failed:\n{tail}")
