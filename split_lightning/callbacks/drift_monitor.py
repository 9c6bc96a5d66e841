"""`DriftMonitor`: how far successive clients pull in the same direction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from split_lightning.callbacks.logs import log_metrics
from split_lightning.data.datamodule import SplitDataModule

# By the parameters' positions in their optimizer; only those with a gradient.
Gradients: TypeAlias = dict[int, Tensor]


class DriftMonitor(pl.Callback):
    """Logs the cosine between the gradients of successive turns, at the end of a turn.

    A turn's gradient is the mean, over the turn's optimizer steps, of the gradients
    that a segment's optimizer is given: after accumulation, after clipping, before
    momentum and weight decay. So the policy for optimizer state
    has no effect, and without clipping each batch of the turn weighs the same,
    accumulated or not. `drift/client` is the cosine between this turn's gradient of the
    client segment's parameters and that of the turn before, over the end of a round
    too: 1 means the same direction, 0 orthogonal ones, and below 0 that one turn undoes
    the other. The first turn of a run has
    none, nor has a turn whose gradient is zero. For clients with different layers
    it is over those that both have.

    Memory: two gradients of the segment, of this turn and of the one before. They are
    in checkpoints, so that a run that resumes in mid-round logs the same values.
    Nothing is done without a logger.

    Args:
        server: Whether to log `drift/server`, of the server segment, too.

    Raises:
        ValueError: If `server` is neither true nor false.
        MisconfigurationException: When turns run at the same time.
    """

    def __init__(self, server: bool = False) -> None:
        if not isinstance(server, bool):
            raise ValueError(
                f"Expected argument `server` to be true or false, but got {server!r}."
            )
        self.parties = ("client", "server") if server else ("client",)
        self._now: dict[str, Gradients] = {}
        self._before: dict[str, Gradients] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, SplitDataModule):
            return
        if data.protocol.overlapping:
            raise MisconfigurationException(
                "DriftMonitor compares turns that follow each other, and those of "
                f"{type(data.protocol).__name__} run at the same time. Leave it out, "
                "or let clients take turns (RoundRobinWeightPassing)."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.ckpt_path is None:  # a run of its own
            self._now, self._before = {}, {}

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer
    ) -> None:
        if not trainer.loggers:
            return
        client, *_ = trainer.optimizers
        party = "client" if optimizer is client else "server"
        if party in self.parties:
            _add(self._now.setdefault(party, {}), optimizer)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # A round that is cut short (`limit_train_batches`) ends its last turn.
        if self._now and (batch.ends_turn or trainer.is_last_batch):
            cosines = {
                f"drift/{party}": _cosine(now, self._before[party])
                for party, now in self._now.items()
                if party in self._before
            }
            log_metrics(trainer, {k: c for k, c in cosines.items() if c is not None})
            self._before, self._now = self._now, {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"now": self._now, "before": self._before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._now, self._before = state_dict["now"], state_dict["before"]


def _add(sums: Gradients, optimizer: Optimizer) -> None:
    """Adds the gradients of an optimizer's parameters to sums, in float32 or wider."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for number, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if number not in sums:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            sums[number] = gradient.detach().to(dtype, copy=True)
        else:  # from a checkpoint they come on the CPU; else nothing moves
            sums[number] = sums[number].to(gradient.device).add_(gradient)


def _cosine(one: Gradients, other: Gradients) -> float | None:
    """Returns the cosine of the angle between two gradients; `None` if one is zero.

    It is over the layers of both: clients may have different layers.
    """
    common = one.keys() & other.keys()
    dot = sum(float((one[i] * other[i].to(one[i].device)).sum()) for i in common)
    lengths = _norm(one, common) * _norm(other, common)
    return dot / lengths if lengths != 0.0 else None


def _norm(gradients: Gradients, numbers: Iterable[int]) -> float:
    norms = [torch.linalg.vector_norm(gradients[number]) for number in sorted(numbers)]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
