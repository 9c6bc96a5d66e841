"""`SpeedMonitor`: how many images a run trains on in a second."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override


class SpeedMonitor(pl.Callback):
    """Logs `train/images_per_second` of each round, without the validation after it.

    Attributes:
        images: Number of images trained on in this process.
        seconds: Seconds of training in this process.
        has_begun: Whether training has begun in this process.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.images = 0
        self.seconds = 0.0
        self._round_images = 0
        self._round_start = 0.0
        self._round_seconds = 0.0

    @property
    def images_per_second(self) -> float:
        """Mean speed since the start of the process."""
        return self.images / self.seconds if self.seconds else 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._begin_round()  # one that goes on in its middle has no start of its own

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._begin_round()

    def _begin_round(self) -> None:
        self._round_images, self._round_seconds = 0, 0.0
        self._round_start = time.perf_counter()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.has_begun = True

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._round_images += batch.num_samples_of_all
        self._round_seconds = time.perf_counter() - self._round_start

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.images += self._round_images
        self.seconds += self._round_seconds
        speed = self._round_images / max(self._round_seconds, 1e-9)
        pl_module.log("train/images_per_second", speed)
