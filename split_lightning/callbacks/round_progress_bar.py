"""`RoundProgressBar`: the progress of a run in rounds and turns."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from typing_extensions import override

# What fits beside a bar: the metrics' names, and what they are called there.
_SHOWN = {"train/batch_loss": "loss", "val/accuracy": "val"}


class RoundProgressBar(RichProgressBar):
    """Lightning's rich progress bar; says which round it is and which client trains."""

    def __init__(self, refresh_rate: int = 10, leave: bool = True) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._client = ""

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        client = f" client {batch.client_id}"
        if client == self._client or self.progress is None:
            return
        self._client = client
        if self.train_progress_bar_id is not None:
            description = self._get_train_description(trainer.current_epoch)
            self.progress.update(self.train_progress_bar_id, description=description)

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        rounds = self.trainer.max_epochs
        of = f"/{rounds}" if rounds is not None and rounds > 0 else ""
        return f"Round {current_epoch + 1}{of}{self._client}"

    @override
    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        found = super().get_metrics(trainer, pl_module)
        return {short: found[name] for name, short in _SHOWN.items() if name in found}
