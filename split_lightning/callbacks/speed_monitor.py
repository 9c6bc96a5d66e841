"""`SpeedMonitor`: images per second of a run."""

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
        self._fit_seconds = 0.0  # before `_fit_start`
        self._fit_start: float | None = None

    @property
    def fit_seconds(self) -> float:
        """Seconds of the whole fit, those before a resumption included."""
        if self._fit_start is None:
            return self._fit_seconds
        return self._fit_seconds + time.perf_counter() - self._fit_start

    @property
    def images_per_second(self) -> float:
        """Mean speed since the start of the process."""
        return self.images / self.seconds if self.seconds else 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._fit_seconds, self._fit_start = 0.0, time.perf_counter()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._fit_seconds, self._fit_start = self.fit_seconds, None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fit_seconds": self.fit_seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._fit_seconds = state_dict["fit_seconds"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._begin_round()  # one that resumes in its middle has no start of its own

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
