"""The parties' optimizers and learning-rate schedulers, from their factories."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

from pytorch_lightning.core.optimizer import do_nothing_closure
from pytorch_lightning.strategies import Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler]


def make_optimizer(
    party: str, factory: OptimizerFactory, parameters: Iterable[nn.Parameter]
) -> Optimizer:
    """Returns the optimizer of a party's parameters.

    Raises:
        ValueError: If its options are out of range, or not its own.
    """
    try:
        return factory(parameters)
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


class Uncounted:
    """An optimizer whose steps do not tick `trainer.global_step`.

    Args:
        strategy: Steps with the Trainer's precision and hooks.
        optimizer: The optimizer.
    """

    def __init__(self, strategy: Strategy, optimizer: Optimizer) -> None:
        self.strategy = strategy
        self.optimizer = optimizer

    def step(self) -> Any:
        """Steps the parameters that have a gradient."""
        return self.strategy.optimizer_step(self.optimizer, do_nothing_closure)

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self.optimizer.zero_grad()


def clipping(
    limit: float | None, algorithm: str
) -> Callable[[list[nn.Parameter]], Any] | None:
    """Returns what limits the gradient of a party; `None`: nothing does.

    Args:
        limit: The limit; `None`: there is none.
        algorithm: Whether it is for the `norm` or each `value`.

    Raises:
        ValueError: If the limit is not positive.
    """
    if limit is None:
        return None
    if limit <= 0:
        raise ValueError(
            "Expected argument `gradient_clip_val` to be positive, or null for no "
            f"limit, but got {limit}."
        )
    if algorithm == "norm":
        return partial(nn.utils.clip_grad_norm_, max_norm=limit)
    return partial(nn.utils.clip_grad_value_, clip_value=limit)
