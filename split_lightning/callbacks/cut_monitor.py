"""`CutMonitor`: norms of the smashed data and gradients."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from split_lightning.callbacks.logs import is_logged, log_metrics
from split_lightning.observers.norms import Norms
from split_lightning.processes import summed


class CutMonitor(pl.Callback):
    """Logs the norms of the smashed data and of its gradient, as they cross the cut.

    Of the first cut; those of a further one have its number (`cut/smashed_norm_2`).
    `cut/smashed_norm` and `cut/gradient_norm` are Euclidean norms over all values of a
    step, of all tensors that cross together (where several do, or several clients
    take part). The gradient is that
    of the batch's mean loss divided by `accumulate_grad_batches`; clipping, which comes
    after the cut, does not change it. Measured in every `log_every_n_steps`-th batch of
    the Trainer; the others cost nothing.
    """

    def __init__(self) -> None:
        self._norms = Norms()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.channel.observers.append(self._norms)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._norms.looks = is_logged(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._norms.looks:
            return
        norms, self._norms.looks = self._norms.take(), False
        if norms and trainer.world_size > 1:
            norms = self._of_all(trainer, norms, is_own=batch.share > 0)
        if norms:
            log_metrics(trainer, {name: norm.item() for name, norm in norms.items()})

    @staticmethod
    def _of_all(
        trainer: pl.Trainer, norms: dict[str, Tensor], is_own: bool
    ) -> dict[str, Tensor]:
        """Returns the norms of the whole batch, of which each process has a share."""
        squares = torch.stack(list(norms.values())).square() * is_own
        joint = dict(zip(norms, summed(trainer, squares).sqrt(), strict=True))
        # Each process's gradient is of its loss times their number, to be averaged.
        for name in joint:
            if name.startswith("cut/gradient"):
                joint[name] /= trainer.world_size
        return joint

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self._norms in pl_module.channel.observers:
            pl_module.channel.observers.remove(self._norms)
