"""`ConfigFile`: a run's configuration is written when the run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from typing_extensions import override

from split_lightning.runs.artifacts import save_config


class ConfigFile(pl.Callback):
    """Writes the configuration of a run once nothing can refuse it any more.

    A run that resumes in the same folder and is refused leaves the file unchanged. So
    does one that has nothing left to train.

    Args:
        cfg: The configuration as it was composed.
        path: The file.
    """

    def __init__(self, cfg: DictConfig, path: Path) -> None:
        self.cfg = cfg
        self.path = path

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_config(self.cfg, self.path)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.path.exists():  # nothing was left to train
            self.on_train_start(trainer, pl_module)
