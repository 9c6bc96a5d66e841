"""A callback that trains in turns with other processes, for benchmarks/engines.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from baton import Baton


class Turns(pl.Callback):
    """Trains in turns with other processes.

    Args:
        address: The benchmark's Unix socket.
    """

    def __init__(self, address: str) -> None:
        self._baton = Baton(address)

    def on_train_batch_end(self, *_: Any) -> None:
        """Waits after the last batch of a block; ends the run after the last block."""
        if not self._baton.tick():
            raise SystemExit
