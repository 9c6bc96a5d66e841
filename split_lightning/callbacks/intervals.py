"""Intervals: averaging every so many rounds."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from split_lightning.route import Party


def check_rounds(name: str, every: Any, otherwise: str) -> None:
    """Stops where an interval is neither a positive number of rounds nor `None`.

    Raises:
        ValueError: Names the argument, and what is allowed.
    """
    whole = isinstance(every, int) and not isinstance(every, bool)
    if every is not None and not (whole and every > 0):
        raise ValueError(
            f"Expected argument `{name}` to be a positive number of rounds, "
            f"{otherwise}, but got {every!r}."
        )


def average_if_due(
    party: Party,
    every: int,
    trainer: pl.Trainer,
    module: Any,
    batch: Any,
    is_remote: bool = True,
) -> int:
    """Averages a party's segments after the last step of each n-th round.

    Before the validation that follows: what is validated is the mean.

    Returns:
        The bytes that would travel, as this process counts them.
    """
    if (trainer.current_epoch + 1) % every:
        return 0
    module.collect(party, *(p.client_id for p in batch.parts if p.ends_round))
    sent = module.average(party, is_remote) if trainer.is_last_batch else 0
    return sent if trainer.is_global_zero else 0  # all processes do the same
