"""`CutMonitor`: how large is what crosses the cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from split_lightning.callbacks.logs import is_logged, log_metrics
from split_lightning.channel import Crossing
from split_lightning.processes import summed

_NAMES = {"smashed data": "cut/smashed_norm", "gradient": "cut/gradient_norm"}


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
        self._norms: dict[str, Tensor] = {}
        self._looks = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.channel.observers.append(self._observe)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._looks = is_logged(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        norms, self._norms, self._looks = self._norms, {}, False
        if not norms:
            return
        if trainer.world_size > 1:
            norms = self._of_all(trainer, norms, is_own=batch.share > 0)
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
            if name.startswith(_NAMES["gradient"]):
                joint[name] /= trainer.world_size
        return joint

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self._observe in pl_module.channel.observers:
            pl_module.channel.observers.remove(self._observe)

    def _observe(self, crossing: Crossing, values: tuple[Any, ...]) -> None:
        if self._looks and crossing.content in _NAMES:
            name, norm = _NAMES[crossing.content], joint_norm(values)
            name += f"_{crossing.cut + 1}" if crossing.cut else ""
            before = self._norms.get(name, torch.zeros_like(norm))  # other clients'
            self._norms[name] = torch.hypot(before, norm)


def joint_norm(values: Iterable[Any]) -> Tensor:
    """Returns the Euclidean norm of all floating-point tensors among values, as one.

    >>> joint_norm([torch.tensor([3.0]), None, torch.tensor([[4.0]]), 7])
    tensor(5.)
    """
    norms = [
        torch.linalg.vector_norm(value.detach(), dtype=torch.float32)
        for value in values
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)
