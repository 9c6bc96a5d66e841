"""`TensorBoardLayout`: the charts of a run on one page of TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import pytorch_lightning as pl
from typing_extensions import override

from split_lightning.callbacks.communication_monitor import CommunicationMonitor
from split_lightning.callbacks.cut_monitor import CutMonitor
from split_lightning.callbacks.drift_monitor import DriftMonitor
from split_lightning.callbacks.logs import tensorboard_writers
from split_lightning.callbacks.memory_monitor import MemoryMonitor
from split_lightning.callbacks.speed_monitor import SpeedMonitor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Chart(NamedTuple):
    """A chart of several curves.

    Attributes:
        section: The heading that it is under.
        title: Its title.
        tags: Regular expressions; TensorBoard takes all tags that begin with a match.
        needs: The callback that logs them; `None`: the module does.
    """

    section: str
    title: str
    tags: list[str]
    needs: type[pl.Callback] | None = None


_PARTS = "(train|val|test)"
_CHARTS = [
    Chart("Train, validation, test", "loss", [f"{_PARTS}/loss$"]),
    Chart("Train, validation, test", "accuracy", [f"{_PARTS}/accuracy$"]),
    Chart("Cut", "bytes of a round", ["comm/(?!total).*_bytes$"], CommunicationMonitor),
    Chart("Cut", "bytes in total", ["comm/total_.*_bytes$"], CommunicationMonitor),
    Chart("Cut", "norm of the smashed data", ["cut/smashed_norm"], CutMonitor),
    Chart("Cut", "norm of its gradient", ["cut/gradient_norm"], CutMonitor),
    Chart("Cut", "drift: cosine of successive turns", ["drift/.*"], DriftMonitor),
    Chart("Machine", "images per second", ["train/images_per_second$"], SpeedMonitor),
    Chart("Machine", "memory (MiB)", ["memory/.*_mib$"], MemoryMonitor),
]


class TensorBoardLayout(pl.Callback):
    """Arranges the run's charts on TensorBoard's page "Custom Scalars".

    Losses and accuracies come first; bytes, norms at the cut, drift, speed and memory
    follow. (On its other pages TensorBoard sorts tags by the alphabet.) Only charts of
    what this run logs are there. `add_custom_scalars` works once for a writer, and is
    called once.
    """

    def __init__(self) -> None:
        self._done: WeakSet[SummaryWriter] = WeakSet()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        layout = _layout(trainer, pl_module)
        for writer in tensorboard_writers(trainer):
            if writer not in self._done:
                writer.add_custom_scalars(layout)
                self._done.add(writer)


def _layout(trainer: pl.Trainer, module: Any) -> dict[str, dict[str, list[Any]]]:
    """Returns the charts of what a run logs, as `add_custom_scalars` wants them."""
    layout: dict[str, dict[str, list[Any]]] = {}
    protocol = getattr(getattr(trainer, "datamodule", None), "protocol", None)
    moves_weights = getattr(protocol, "moves_weights", True)
    silent: list[type[pl.Callback] | None] = []
    if not module.topology.is_split:  # nothing crosses a cut
        silent = [CutMonitor] if moves_weights else [CutMonitor, CommunicationMonitor]
    for section, title, tags, needs in _CHARTS:
        if needs in silent:
            continue
        is_there = needs is None or any(
            isinstance(callback, needs)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        )
        if is_there:
            layout.setdefault(section, {})[title] = ["Multiline", tags]
    return layout
