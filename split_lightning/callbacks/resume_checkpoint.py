"""`ResumeCheckpoint`: a run that was killed at any time resumes exactly."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger
from typing_extensions import override

from split_lightning.callbacks.checkpoint_io import FOLDER, LAST, AtomicCheckpointIO
from split_lightning.processes import all_agree
from split_lightning.signals import Interrupted, SignalCatcher


class ResumeCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which a run resumes bit for bit, in mid-round too.

    Each write replaces the file in one step; the one before it stays as
    `previous.ckpt`. SIGINT (Ctrl-C) and SIGTERM end the run after the batch that they
    meet (or after the validation), with a checkpoint and `Interrupted`; a second
    signal ends it at once.

    Args:
        dirpath: The folder of the checkpoints; `None`: `checkpoints` in the Trainer's
            `default_root_dir`.
        every_n_rounds: Write at the end of every n-th round, and of the last.
        every_n_batches: Write after every n-th batch of a round too; `None`: no.
        every_n_minutes: Write after the batch at which so many minutes have passed
            since the last write too; `None`: no.

    Attributes:
        metrics: What was logged last when the checkpoint was written, by name.

    Raises:
        ValueError: If an interval is not positive.

    Example::

        checkpoint = ResumeCheckpoint("run/checkpoints", every_n_minutes=10)
        trainer = Trainer(callbacks=[RoundRobinWeightPassing(), checkpoint])
        trainer.fit(module, datamodule=data, ckpt_path="run/checkpoints/last.ckpt")
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_rounds: int = 1,
        every_n_batches: int | None = None,
        every_n_minutes: float | None = None,
    ) -> None:
        for name, value in (
            ("every_n_rounds", every_n_rounds),
            ("every_n_batches", every_n_batches),
            ("every_n_minutes", every_n_minutes),
        ):
            if value is not None and value <= 0:
                raise ValueError(
                    f"Expected argument `{name}` to be positive, but got {value}."
                )
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_rounds = every_n_rounds
        self.every_n_batches = every_n_batches
        self.every_n_minutes = every_n_minutes
        self.metrics: dict[str, float] = {}
        self._signals = SignalCatcher()
        self._written_at = 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._written_at = time.monotonic()
        self._signals.install()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.is_last_batch:  # the round's end follows, with its validation
            return
        number = batch_idx + 1
        by_count = self.every_n_batches and number % self.every_n_batches == 0
        if _wished(trainer, bool(by_count) or self._is_late()):
            self._write(trainer)
        place = f"after batch {number} of round {trainer.current_epoch + 1}"
        self._stop_if_asked(trainer, place)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        rounds = trainer.current_epoch + 1
        ends = rounds == trainer.max_epochs or trainer.should_stop
        if rounds % self.every_n_rounds == 0 or ends:
            self._write(trainer)
        self._stop_if_asked(trainer, f"after round {rounds}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._signals.remove()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: Any, exception: BaseException
    ) -> None:
        self._signals.remove()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics = state_dict["metrics"]

    def _is_late(self) -> bool:
        if self.every_n_minutes is None:
            return False
        return time.monotonic() - self._written_at >= 60 * self.every_n_minutes

    def _stop_if_asked(self, trainer: pl.Trainer, place: str) -> None:
        received = self._signals.received
        if not _wished(trainer, received is not None):
            return
        path = self._write(trainer)
        number = received or signal.SIGTERM  # or another's
        raise Interrupted(number, place, path)

    def _write(self, trainer: pl.Trainer) -> Path:
        folder = self.dirpath or Path(trainer.default_root_dir, FOLDER)
        path = folder / LAST
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return path
        self.metrics = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if not name.startswith("clients/")  # older for those that were absent
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # what came before is not lost
                logger.experiment.flush()
        trainer.save_checkpoint(path, weights_only=False)  # the whole state
        self._written_at = time.monotonic()
        return path


def _wished(trainer: pl.Trainer, wish: bool) -> bool:
    """Returns whether any process wishes it, so that all do the same."""
    return not all_agree(trainer, not wish)
