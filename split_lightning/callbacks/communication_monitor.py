"""`CommunicationMonitor`: logs the bytes that parties send."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from typing_extensions import override


class CommunicationMonitor(pl.Callback):
    """Logs the bytes of all messages in training, each round and in total.

    `comm/uplink_bytes`, `comm/downlink_bytes`, `comm/handoff_bytes`, `comm/handoffs`,
    `comm/averaging_bytes` and `comm/server_averaging_bytes` are of the round,
    `comm/total_*` since the start of the run. Only training is counted; what has never
    happened is not logged. Loggers store 32-bit floats; `module.totals()` has the exact
    integers.
    """

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._before = pl_module.totals()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        total = pl_module.totals()
        for name, count in total.items():
            if count == 0:
                continue
            in_round = float(count - self._before[name])
            pl_module.log(f"comm/{name}", in_round)
            pl_module.log(f"comm/total_{name}", float(count))

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._before)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = dict(state_dict)
