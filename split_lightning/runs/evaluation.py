"""The test of a trained network: its figures, in all and by class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table

from split_lightning.callbacks.confusion_matrix import (
    ClassFigures,
    ConfusionMatrix,
    by_class,
)
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.module import SplitLightningModule
from split_lightning.runs.report import figures_table, print_line

_MOST_ROWS = 20


def evaluate(
    trainer: pl.Trainer,
    module: SplitLightningModule,
    data: SplitDataModule,
    confusion: ConfusionMatrix,
) -> tuple[dict[str, Any], ClassFigures]:
    """Tests a trained network as training did.

    Args:
        trainer: Has `confusion` among its callbacks.
        module: The module, with the weights of a run.
        data: The data.
        confusion: The confusion matrix.

    Returns:
        The results, and each class's figures.
    """
    trainer.test(module, datamodule=data, verbose=False)
    assert confusion.figures is not None
    results = {
        key.replace("/", "_"): value.item()
        for key, value in trainer.callback_metrics.items()
    }
    networks = confusion.figures.networks
    results["images"] = int(confusion.figures.confusion.sum()) // networks
    results["networks"] = networks
    return results, confusion.figures


def print_evaluation(
    results: Mapping[str, Any],
    figures: ClassFigures,
    folder: Path,
    console: Console | None = None,
) -> None:
    """Prints what a test found: in all, and by class (of many, the worst)."""
    console = console or Console()
    console.print(figures_table(results))
    rows = by_class(figures)
    title = None
    if len(rows) > _MOST_ROWS:
        title = f"the {_MOST_ROWS} classes of {len(rows)} with the lowest accuracy"
        seen = [row for row in rows if row[2] != ""]
        rows = sorted(seen, key=lambda row: row[2])[:_MOST_ROWS]
    table = Table("class", title=title)
    for name in ("images", "accuracy", "precision", "F1"):
        table.add_column(name, justify="right")
    for name, images, *shares in rows:
        cells = [f"{share:.4f}" if share != "" else "-" for share in shares]
        table.add_row(name, str(images), *cells)
    console.print(table)
    print_line(console, f"see:  {folder}")
