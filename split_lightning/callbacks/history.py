"""`History`: one row per round of a run."""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from pathlib import Path
from typing import Any, TypeAlias

import pytorch_lightning as pl
from rich import filesize
from typing_extensions import override

from split_lightning.callbacks.curves import draw_curves
from split_lightning.callbacks.virtual_clock import virtual_seconds

Row: TypeAlias = dict[str, Any]

COLUMNS = (
    "round",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "uplink_bytes",
    "downlink_bytes",
    "handoff_bytes",
    "handoffs",
    "averaging_bytes",
    "server_averaging_bytes",
    "hop_bytes",
    "layer_bytes",
    "images",
    "virtual_seconds",
    "seconds",
)
_logger = logging.getLogger(__name__)


class History(pl.Callback):
    """Keeps one row per round, writes them to a file, and draws them at the end.

    The columns are `COLUMNS`: the round, from 1; the round's training loss; loss and
    accuracy of the validation after it, empty where there was none; and, since the
    start of the run, bytes, hand-offs, images trained on, virtual seconds where there
    is a `VirtualClock`, and seconds of the fit, validation and writing included. The
    rows are in checkpoints, so that a run that resumes from one has
    them all. Where no progress bar shows, each row is a line of the log (logger
    `split_lightning`, level INFO).

    Args:
        folder: Where `history.csv` is written anew each round, and `curves.png` at the
            end of the fit; `None`: rows are only kept.
        curves: Whether they are drawn at the end.
        title: The title above the curves. A test after the fit adds its result.

    Attributes:
        rows: The rows so far.
    """

    def __init__(
        self, folder: str | Path | None = None, curves: bool = True, title: str = ""
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.curves = curves
        self.title = title
        self._forget()

    def _forget(self) -> None:
        self.rows: list[Row] = []
        self._images = 0
        self._seconds = 0.0  # of the fit before `_start`
        self._start: float | None = None
        self._validated: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Seconds of the fit so far, those before a resumption included."""
        since = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._seconds + since

    def best(self) -> Row | None:
        """Returns the row of the first round of the highest validation accuracy."""
        validated = [row for row in self.rows if row["val_accuracy"] is not None]
        return max(validated, key=lambda row: row["val_accuracy"], default=None)

    def time_to_accuracy(self) -> dict[str, float]:
        """Returns when validation accuracy first was at each tenth: virtual seconds.

        Those that were never reached are left out.
        """
        found: dict[str, float] = {}
        for row in self.rows:
            for tenth in range(1, 11):
                reached = (row["val_accuracy"] or 0.0) >= tenth / 10
                if reached and row["virtual_seconds"] is not None:
                    found.setdefault(f"{tenth / 10}", row["virtual_seconds"])
        return found

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.ckpt_path is None:  # a run of its own
            self._forget()
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._images += batch.num_samples_of_all

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        for name in ("val/loss", "val/accuracy"):
            if name in trainer.callback_metrics:
                value = float(trainer.callback_metrics[name])
                self._validated[name.replace("/", "_")] = value

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        validated, self._validated = self._validated, {}
        known = {
            "round": trainer.current_epoch + 1,
            "train_loss": float(pl_module.round_loss()),
            **validated,
            **pl_module.totals(),
            "images": self._images,
            "seconds": round(self.seconds, 3),
            "virtual_seconds": virtual_seconds(trainer),
        }
        row = {column: known.get(column) for column in COLUMNS}
        self.rows = [r for r in self.rows if r["round"] < row["round"]] + [row]
        if self.folder is not None and trainer.is_global_zero:
            _write(self.rows, self.folder / "history.csv")
        # Lightning's bars know whether they are disabled, their base class does not.
        bar_is_off = getattr(trainer.progress_bar_callback, "is_disabled", True)
        if bar_is_off and trainer.is_global_zero:
            _logger.info(_line(row, trainer.max_epochs))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._draw(trainer, self.title)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = [
            f"test {name} {float(trainer.callback_metrics[f'test/{name}']):.4f}"
            for name in ("accuracy", "loss")
            if f"test/{name}" in trainer.callback_metrics
        ]
        self._draw(trainer, "\n".join(filter(None, [self.title, ", ".join(found)])))

    def _draw(self, trainer: pl.Trainer, title: str) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        if self.folder is not None and self.curves and self.rows:
            draw_curves(self.rows, title).savefig(self.folder / "curves.png", dpi=120)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._seconds, self._start = self.seconds, None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": [dict(row) for row in self.rows],
            "images": self._images,
            "seconds": self.seconds,
            "validated": dict(self._validated),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._images, self._seconds = state_dict["images"], state_dict["seconds"]
        self._validated = dict(state_dict["validated"])


def _write(rows: list[Row], path: Path) -> None:
    """Writes rows as CSV; a reader sees the old file or the new one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text.getvalue())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _line(row: Row, rounds: int | None) -> str:
    """Returns a row in words."""
    of = f"/{rounds}" if rounds is not None and rounds > 0 else ""
    words = [f"round {row['round']}{of}: train loss {row['train_loss']:.4f}"]
    if row["val_loss"] is not None:
        words.append(f"val loss {row['val_loss']:.4f}")
    if row["val_accuracy"] is not None:
        words.append(f"val accuracy {row['val_accuracy']:.4f}")
    words.append(f"{row['images']:,} images in {row['seconds']:.1f} s")
    sent = sum(row[name] for name in COLUMNS if name.endswith("_bytes"))
    if sent:
        words.append(filesize.decimal(sent))
    return ", ".join(words)
