"""Processes: how a run is divided among several, and what they agree on."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor


class Processes(NamedTuple):
    """This process among those that train together.

    Attributes:
        rank: The place of this process, from 0.
        world_size: Number of processes.
    """

    rank: int
    world_size: int

    @property
    def own(self) -> slice:
        """Which samples of a batch are this process's."""
        return slice(self.rank, None, self.world_size)

    def share_of(self, num_samples: int) -> tuple[slice, float]:
        """Returns which samples of a training batch to compute with, and their part.

        Every process takes part in each step. One for which no sample is left computes
        with the batch's first, which counts for nothing.

        Args:
            num_samples: Number of samples in the whole batch.

        >>> Processes(1, 2).share_of(4), Processes(1, 2).share_of(1)
        ((slice(1, None, 2), 0.5), (slice(0, 1, None), 0.0))
        """
        count = len(range(num_samples)[self.own])
        if count == 0:
            return slice(0, 1), 0.0
        return self.own, count / num_samples


ONE_PROCESS = Processes(0, 1)


def processes_of(trainer: pl.Trainer | None) -> Processes:
    """Returns the processes of a Trainer; without one there is one."""
    if trainer is None:
        return ONE_PROCESS
    return Processes(trainer.global_rank, trainer.world_size)


def all_agree(trainer: pl.Trainer, verdict: bool) -> bool:
    """Returns whether the verdict of each process is true; each must call it."""
    if trainer.world_size == 1:
        return verdict
    return trainer.strategy.reduce_boolean_decision(verdict, all=True)


def summed(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Returns the sums of values over all processes; each must call it."""
    if trainer.world_size == 1:
        return values
    own = values.to(trainer.strategy.root_device)
    total: Tensor = trainer.strategy.reduce(own, reduce_op="sum")
    return total


def gathered(trainer: pl.Trainer, own: Any) -> list[Any]:
    """Returns what each process has, in the order of their ranks; each must call it."""
    everyones = [own]
    if trainer.world_size > 1:
        everyones *= trainer.world_size
        torch.distributed.all_gather_object(everyones, own)
    return everyones
