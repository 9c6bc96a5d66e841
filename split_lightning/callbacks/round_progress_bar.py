"""`RoundProgressBar`: the progress of a run in rounds and turns."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import CustomBarColumn
from rich import filesize
from rich.console import Console
from rich.progress import ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text
from typing_extensions import override

# The figures next to a bar, in the order in which a narrow terminal drops them.
_DROPPED_FIRST = ("batches", "bytes", "speed", "left", "val")
_TEXT_WIDTH = 96  # of all figures; a wider terminal has a longer bar
_WINDOW = 20  # batches that the running mean of the loss covers


class RoundProgressBar(RichProgressBar):
    """Lightning's rich progress bar, for rounds and turns.

    One line shows the round, the client that trains, the loss (a running mean over the
    last 20 batches), the last validation accuracy, images per second (of the round),
    bytes sent (of the run) and the time left (of the run). A narrow terminal shows
    fewer figures, so that the line never wraps from 60 columns on. Nothing is shown
    where the output is not a terminal. Log messages appear above the bar.

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
        self._figures: dict[str, str] = {}
        self._losses = deque[torch.Tensor](maxlen=_WINDOW)
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
        # A run that resumes in mid-round has done a part of it.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        batches = progress.processed if trainer.fit_loop.restarted_mid_epoch else 0
        self._start = (now, _share_done(trainer, batches))
        self._round_start = now
        self._client, self._figures, self._images = "", {}, 0
        self._losses.clear()

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
        if isinstance(outputs, Mapping) and "loss" in outputs:
            self._losses.append(outputs["loss"].detach())
        self._figures |= self._progress_figures(trainer, pl_module, batch_idx + 1)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _progress_figures(
        self, trainer: pl.Trainer, pl_module: Any, batches: int
    ) -> dict[str, str]:
        """Returns the speed, the bytes sent and the time left, by name."""
        now = time.perf_counter()
        speed = self._images / max(now - self._round_start, 1e-9)
        figures = {
            "batches": f"{batches}/{trainer.num_training_batches}",
            "speed": f"{speed:,.0f} img/s",
        }
        if trainer.world_size == 1:  # a sum over processes needs all of them
            totals = pl_module.totals()
            sent = sum(n for name, n in totals.items() if name.endswith("_bytes"))
            figures |= {"bytes": filesize.decimal(sent)} if sent else {}
        since, before = self._start
        done = _share_done(trainer, batches)
        if done > before:
            left = (now - since) * (1 - done) / (done - before)
            figures["left"] = f"{timedelta(seconds=round(left))} left"
        return figures

    @override
    def configure_columns(self, trainer: pl.Trainer) -> list[ProgressColumn]:
        width = Console(**self._console_kwargs).width
        bar = CustomBarColumn(
            bar_width=max(4, min(30, width - _TEXT_WIDTH)),
            complete_style=self.theme.progress_bar,
            finished_style=self.theme.progress_bar_finished,
            pulse_style=self.theme.progress_bar_pulse,
        )
        one_line = Column(no_wrap=True)
        description = TextColumn("{task.description}", table_column=one_line)
        return [description, bar, _Figures(self, bar)]

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        rounds = self.trainer.max_epochs
        of = f"/{rounds}" if rounds is not None and rounds > 0 else ""
        return f"Round {current_epoch + 1}{of}{self._client}"

    @override
    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        if self._losses:
            mean = torch.stack(list(self._losses)).mean().item()
            self._figures["loss"] = f"loss: {mean:.3f}"
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if accuracy is not None:
            self._figures["val"] = f"val: {accuracy.item():.3f}"
        return {}  # Lightning's own column of metrics would wrap


class _Figures(ProgressColumn):
    """The figures next to a bar, as many as its terminal has room for."""

    def __init__(self, bar: RoundProgressBar, graphic: CustomBarColumn) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.bar = bar
        self.graphic = graphic
        self.figures: dict[int, dict[str, str]] = {}

    @override
    def render(self, task: Task) -> Text:
        if task.id == self.bar.train_progress_bar_id:
            self.figures[task.id] = dict(self.bar._figures)
        figures = self.figures.get(task.id, {})
        return Text(_fitted(figures, self._room()), style="dim")

    def _room(self) -> int:
        """Returns the number of columns that are left for the figures."""
        progress = self.bar.progress
        assert progress is not None
        described = max((len(task.description) for task in progress.tasks), default=0)
        bar_width = self.graphic.bar_width or 0
        gaps = 3  # one behind each column
        return progress.console.width - described - bar_width - gaps


def _fitted(figures: Mapping[str, str], room: int) -> str:
    """Returns figures in one line, without those for which there is no room.

    >>> figures = {"loss": "loss: 0.1", "val": "val: 0.9", "bytes": "5 MB"}
    >>> _fitted(figures, 23), _fitted(figures, 22), _fitted(figures, 9)
    ('loss: 0.1 val: 0.9 5 MB', 'loss: 0.1 val: 0.9', 'loss: 0.1')
    """
    order = ("batches", "loss", "val", "speed", "bytes", "left")
    shown = [name for name in order if name in figures]
    for dropped in _DROPPED_FIRST:
        if len(" ".join(figures[name] for name in shown)) <= room:
            break
        shown = [name for name in shown if name != dropped]
    return " ".join(figures[name] for name in shown)[: max(room, 0)]


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
