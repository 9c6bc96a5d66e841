"""`Baton`: lets training processes take turns, a block of batches at a time."""

from __future__ import annotations

import json
import os
import socket
import time


class Baton:
    """A training process's end of the line to the benchmark.

    After a pause the first batch is not timed: clients may have begun it meanwhile.

    Args:
        address: The benchmark's Unix socket.
    """

    def __init__(self, address: str) -> None:
        line = socket.socket(socket.AF_UNIX)
        line.connect(address)
        self._line = line.makefile("rw")
        self._times: list[float] = []
        self._left = 1

    def tick(self) -> bool:
        """Notes the end of a batch; waits after a block. `False`: it was the last."""
        self._times.append(time.perf_counter())
        self._left -= 1
        if self._left > 0:
            return True
        pairs = zip(self._times, self._times[1:], strict=False)
        told = {"pid": os.getpid(), "seconds": [end - start for start, end in pairs]}
        print(json.dumps(told), file=self._line, flush=True)
        count = self._line.readline()
        self._times, self._left = [], int(count or 0) + 1
        return bool(count)
