"""`RoundProgressBar`: the progress of a run in rounds and turns."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
)
from rich import filesize
from rich.console import Console
from rich.progress import ProgressColumn, Task, TextColumn
from rich.text import Text
from typing_extensions import override

# What fits beside a bar: the metrics' names, and what they are called there.
_SHOWN = {"train/batch_loss": "loss", "val/accuracy": "val"}
_TEXT_WIDTH = 76  # what stands beside the bar itself
_WIDE = 100  # a terminal that has room for the number of batches too


class RoundProgressBar(RichProgressBar):
    """Lightning's rich progress bar, of rounds and turns.

    It shows the round, the client that trains, the batch's loss, the last validation
    accuracy, images per second (of the round), bytes that travelled (of the run) and
    the time that is left (of the run). It shows nothing where the output is no
    terminal, such as a file. What is logged meanwhile stands above the bar.

    Args:
        refresh_rate: Number of refreshes in a second.
        leave: Whether the bars of past rounds stay.
        console_kwargs: Arguments of rich's `Console`.
    """

    def __init__(
        self,
        refresh_rate: int = 10,
        leave: bool = True,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(refresh_rate, leave, console_kwargs=console_kwargs)
        self._client = ""
        self._figures = ""
        self._images = 0
        self._round_start = 0.0
        self._start = (0.0, 0.0)  # seconds, and the share of the run that was done
        self._lifted: list[tuple[logging.StreamHandler[Any], Any]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = Console(**self._console_kwargs)
        if not (console.is_terminal or console.is_jupyter):
            self.disable()

    @override
    def _init_progress(self, trainer: pl.Trainer) -> None:
        before = sys.stdout, sys.stderr
        super()._init_progress(trainer)
        for old, new in zip(before, (sys.stdout, sys.stderr), strict=True):
            if new is not old:  # rich's, which writes above the bar
                self._lifted += [(h, h.setStream(new)) for h in _handlers(old)]

    @override
    def _stop_progress(self) -> None:
        super()._stop_progress()
        for handler, stream in self._lifted:
            handler.setStream(stream)
        self._lifted = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        now = time.perf_counter()
        # A run that goes on in mid-round has done a part of it, and no start of it.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        batches = progress.processed if trainer.fit_loop.restarted_mid_epoch else 0
        self._start = (now, _share_done(trainer, batches))
        self._round_start = now
        self._client, self._figures, self._images = "", "", 0

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._images, self._round_start = 0, time.perf_counter()
        super().on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        clients = [part.client_id for part in batch.parts]
        several = f" {len(clients)} clients"
        client = several if len(clients) > 1 else f" client {clients[0]}"
        if client == self._client or self.progress is None:
            return
        self._client = client
        if self.train_progress_bar_id is not None:
            description = self._get_train_description(trainer.current_epoch)
            self.progress.update(self.train_progress_bar_id, description=description)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.is_disabled:
            return
        self._images += batch.num_samples_of_all
        self._figures = self._describe(trainer, pl_module, batch_idx + 1)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _describe(self, trainer: pl.Trainer, pl_module: Any, batches: int) -> str:
        """Returns speed, bytes and the time that is left."""
        now = time.perf_counter()
        speed = self._images / max(now - self._round_start, 1e-9)
        words = [f"{speed:,.0f} img/s"]
        if trainer.world_size == 1:  # to sum over processes all of them must ask
            totals = pl_module.totals()
            travelled = sum(n for name, n in totals.items() if name.endswith("_bytes"))
            words += [filesize.decimal(travelled)] if travelled else []
        since, before = self._start
        done = _share_done(trainer, batches)
        if done > before:
            left = (now - since) * (1 - done) / (done - before)
            words.append(f"{timedelta(seconds=round(left))} left")
        return " ".join(words)

    @override
    def configure_columns(self, trainer: pl.Trainer) -> list[ProgressColumn]:
        width = Console(**self._console_kwargs).width
        bar = CustomBarColumn(
            bar_width=max(4, min(30, width - _TEXT_WIDTH)),
            complete_style=self.theme.progress_bar,
            finished_style=self.theme.progress_bar_finished,
            pulse_style=self.theme.progress_bar_pulse,
        )
        batches = [BatchesProcessedColumn("")] if width >= _WIDE else []
        return [TextColumn("{task.description}"), bar, *batches, _Figures(self)]

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        rounds = self.trainer.max_epochs
        of = f"/{rounds}" if rounds is not None and rounds > 0 else ""
        return f"Round {current_epoch + 1}{of}{self._client}"

    @override
    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        found = super().get_metrics(trainer, pl_module)
        return {short: found[name] for name, short in _SHOWN.items() if name in found}


class _Figures(ProgressColumn):
    """What a round's bar says beside its metrics."""

    def __init__(self, bar: RoundProgressBar) -> None:
        super().__init__()
        self.bar = bar
        self.texts: dict[int, str] = {}

    @override
    def render(self, task: Task) -> Text:
        if task.id == self.bar.train_progress_bar_id:
            self.texts[task.id] = self.bar._figures
        return Text(self.texts.get(task.id, ""), style="dim")


def _handlers(stream: Any) -> Iterator[logging.StreamHandler[Any]]:
    """Yields the handlers of all loggers that write to a stream."""
    known = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(x for x in known if isinstance(x, logging.Logger))]
    handlers = {id(h): h for logger in loggers for h in logger.handlers}
    for handler in handlers.values():
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
            yield handler


def _share_done(trainer: pl.Trainer, batches: int) -> float:
    """Returns which share of the run is done, after so many batches of the round.

    Whichever limit comes first ends the run: rounds, steps. 0 where none is known.
    """
    shares = [0.0]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        # Without a known number of batches only whole rounds count.
        in_round = batches / trainer.num_training_batches
        shares.append((trainer.current_epoch + in_round) / trainer.max_epochs)
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    return min(max(shares), 1.0)
