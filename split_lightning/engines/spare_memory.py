"""`SpareMemory`: returns memory to the system that frames no longer need."""

from __future__ import annotations

import ctypes

_EVERY = 1 << 26  # bytes of frames


class SpareMemory:
    """Counts the bytes of frames that came, and returns free memory now and then.

    The C library keeps large free blocks between the small buffers of connections: the
    more connections, the more blocks.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # GNU's has it
        self._passed = 0

    def note(self, size: int) -> None:
        """Notes that a frame of a size has come."""
        self._passed += size
        if self._trim is not None and self._passed >= _EVERY:
            self._passed = 0
            self._trim(0)
