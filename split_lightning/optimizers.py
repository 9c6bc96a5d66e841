"""The parties' optimizers and learning-rate schedulers, from what makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler]


def make_optimizer(
    party: str, factory: OptimizerFactory, segment: nn.Module
) -> Optimizer:
    """Returns the optimizer of a party's parameters.

    Raises:
        ValueError: If its options are out of range, or not its own.
    """
    try:
        return factory(segment.parameters())
    except (TypeError, ValueError) as error:
        options = getattr(factory, "keywords", {})
        raise ValueError(
            f"Expected the {party}'s optimizer (`optimizer.{party}` in a "
            f"configuration) to have valid options, but got {options}: {error}"
        ) from error


def make_scheduler(factory: SchedulerFactory, optimizer: Optimizer) -> LRScheduler:
    """Returns the learning-rate scheduler of a party's optimizer.

    Raises:
        ValueError: If it needs a metric to step.
    """
    scheduler = factory(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "Expected a scheduler that steps without a metric, but got "
            "ReduceLROnPlateau."
        )
    return scheduler
