"""What callbacks may monitor: the metrics that a run logs, known before it begins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from split_lightning.data.datamodule import SplitDataModule

_OURS = ("pytorch_lightning", "lightning_fabric", "split_lightning")
# Of callbacks: the metrics that each logs.
_BY_CALLBACK = {
    "AsynchronousWeightPassing": "staleness/(mean|max)",
    "AvailabilityMonitor": "system/(absent|dropped)",
    "CommunicationMonitor": "comm/.+",
    "LearningRateMonitor": "lr.*",
    "MemoryMonitor": "memory/.+",
    "SpeedMonitor": "train/images_per_second",
    "VirtualClock": "system/virtual_seconds",
}


def require_known_monitors(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: SplitDataModule,
    client_metric: Callable[[int, str], str],
) -> None:
    """Stops where a callback would wait for a metric that is never logged.

    Unknown names are left to callbacks and modules of others, if there are any: they
    may log them.

    Args:
        trainer: Some callbacks have a `monitor`, such as `EarlyStopping`.
        module: The module.
        data: The data.
        client_metric: Returns the name of a client's own loss or accuracy.

    Raises:
        MisconfigurationException: Names the metric, and the available ones.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    known = ["train/loss", "train/batch_loss", "lr/client", "lr/server"]
    if data.val_share > 0 and trainer.limit_val_batches != 0:
        known += ["val/loss", "val/accuracy"]
        known += [client_metric(k, "accuracy") for k in range(data.num_clients)]
    every = data.protocol.clients_per_round is None and data.availability.is_trivial
    if every:
        parties = 1 if data.protocol.pools_samples else data.num_clients
        known += [client_metric(k, "loss") for k in range(parties)]
    patterns = [_BY_CALLBACK.get(type(own).__name__, "(?!)") for own in callbacks]
    strangers = [o for o in (module, *callbacks) if not _is_ours(o)]
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if not isinstance(name, str) or not getattr(callback, "strict", True):
            continue
        is_known = name in known or any(re.fullmatch(p, name) for p in patterns)
        is_misspelled = _letters(name) in map(_letters, known)
        if is_known or (strangers and not is_misspelled):
            continue
        raise MisconfigurationException(
            f"Expected `monitor` of {type(callback).__name__} to be a metric of each "
            f"round of this run, but got {name!r}. {_near(name, known)}"
        )


def _is_ours(thing: object) -> bool:
    return type(thing).__module__.partition(".")[0] in _OURS


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).lower()


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"{guess}There are: {listed}."
