"""`BestCheckpoint`: the best round's checkpoint, which moves with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn
from typing_extensions import override

from split_lightning.callbacks.checkpoint_io import copy_checkpoint


class BestCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, for runs that resume in another folder too.

    Lightning's own forgets there what was best, so that a worse round becomes the best
    one. This takes the files and their scores along: the files that lie beside the
    checkpoint from which the run resumes. Where one of them is missing, it is
    Lightning's. Arguments are those of `ModelCheckpoint`.
    """

    _trainer: pl.Trainer | None = None

    @property
    @override
    def state_key(self) -> str:
        """The key of Lightning's own in checkpoints: each reads what the other kept."""
        return super().state_key.replace(type(self).__qualname__, "ModelCheckpoint", 1)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer  # it learns only later where it resumes from

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trainer, folder = self._trainer, Path(self.dirpath or "")
        beside = None if trainer is None else _resumed_from(trainer)
        if trainer is not None and beside is not None:
            files = [beside / Path(path).name for path in state_dict["best_k_models"]]
            if all(file.is_file() for file in files):
                if trainer.is_global_zero:
                    _take_along(files, folder)
                state_dict = _moved(state_dict, folder)
        super().load_state_dict(state_dict)


def _resumed_from(trainer: pl.Trainer) -> Path | None:
    """Returns the folder of the checkpoint that training resumes from."""
    path = str(trainer.ckpt_path or "")
    is_ours = trainer.state.fn == TrainerFn.FITTING and path and "://" not in path
    return Path(path).parent if is_ours else None


def _take_along(files: list[Path], folder: Path) -> None:
    for file in files:
        target = folder / file.name
        if file.resolve() != target.resolve():
            copy_checkpoint(file, target)


def _moved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the state with its files in another folder."""

    def moved(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    return {
        **state,
        **{name: moved(state[name]) for name in paths},
        "dirpath": str(folder),
        "best_k_models": {moved(p): s for p, s in state["best_k_models"].items()},
    }
