"""`Histograms`: the distributions of weights and smashed data in TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from split_lightning.callbacks.logs import tensorboard_writers
from split_lightning.message import Message, role_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Histograms(pl.Callback):
    """Writes histograms at the end of each round: for use on request.

    `weights_client/NAME` and `weights_server/NAME` (of an unsplit network
    `weights_network/NAME`) are the parameters, `cut/smashed` the smashed data of the
    round's last batch. Values that are not finite are left out. A histogram of two
    million values takes about 0.1 s.
    """

    def __init__(self) -> None:
        self._smashed: tuple[Any, ...] = ()
        self._trainer: pl.Trainer | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        to_tensorboard = any(isinstance(x, TensorBoardLogger) for x in trainer.loggers)
        if not to_tensorboard and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "Histograms are written to TensorBoard, and no TensorBoardLogger is "
                "among the Trainer's loggers: add it (logger=tensorboard), or leave "
                "Histograms out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._trainer = trainer
        pl_module.channel.observers.append(self._observe)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        for writer in tensorboard_writers(trainer):
            for party, segment in pl_module.segments().items():
                for name, parameter in segment.named_parameters():
                    _write(writer, f"weights_{party}/{name}", parameter, step)
            several = len(self._smashed) > 1
            for i, tensor in enumerate(self._smashed):
                _write(writer, f"cut/smashed{f'_{i}' if several else ''}", tensor, step)
        self._smashed = ()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self._observe in pl_module.channel.observers:
            pl_module.channel.observers.remove(self._observe)
        self._trainer = None

    def _observe(self, event: Message) -> None:
        # Kept from the round's last batch alone: else it would hold on to memory.
        if event.kind != "smashed":
            return
        is_wanted = role_of(event.sender) == "client"
        if is_wanted and self._trainer and self._trainer.is_last_batch:
            sent = (v.detach() for v in event.payload if isinstance(v, Tensor))
            self._smashed = tuple(sent)


def _write(writer: SummaryWriter, tag: str, tensor: Tensor, step: int) -> None:
    values = tensor.detach().float()
    values = values[values.isfinite()]
    if len(values):
        writer.add_histogram(tag, values, step)
