"""`AvailabilityMonitor`: which clients were absent from a round or dropped out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from split_lightning.data.loader import TrainLoader

_logger = logging.getLogger(__name__)


class AvailabilityMonitor(pl.Callback):
    """Reports the clients that are absent from a round or drop out, and logs how many.

    A round with such clients begins with a message in the log (logger
    `split_lightning`, level INFO), rounds counted from 1. At the end of each round
    `system/absent` and `system/dropped` are logged: the number of clients that were
    drawn for it and absent, and of those that dropped out. Nothing is logged where all
    clients are always there.
    """

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = _missing(trainer)
        if found is not None and any(found) and trainer.is_global_zero:
            _logger.info(_line(trainer.current_epoch + 1, *found))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = _missing(trainer)
        if found is not None:
            absent, dropped = found
            pl_module.log("system/absent", float(len(absent)))
            pl_module.log("system/dropped", float(len(dropped)))


def _missing(
    trainer: pl.Trainer,
) -> tuple[list[int], dict[int, tuple[int, int]]] | None:
    """Returns the clients of the round that are absent, and those that drop out.

    Returns:
        The absent clients; and for each that drops out the numbers of batches that it
        makes and that were planned. `None`: all clients are always there.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, TrainLoader):
        return None
    round = loader.round()
    if round.availability.is_trivial:
        return None
    for _ in loader.protocol.steps(round):  # planning finds out
        pass
    return round.absent, round.dropped


def _line(
    number: int, absent: Sequence[int], dropped: Mapping[int, tuple[int, int]]
) -> str:
    """Describes which clients are absent from a round or drop out of it.

    >>> _line(3, [4, 7], {2: (5, 12)})
    'round 3: absent: clients 4, 7; dropped out: client 2 after 5 of 12 batches'
    """
    parts = []
    if absent:
        clients = "clients" if len(absent) > 1 else "client"
        parts.append(f"absent: {clients} {', '.join(map(str, absent))}")
    if dropped:
        told = (f"client {k} after {m} of {n} batches" for k, (m, n) in dropped.items())
        parts.append(f"dropped out: {', '.join(told)}")
    return f"round {number}: {'; '.join(parts)}"
