"""The test of a finished run, again: from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from split_lightning.artifacts import make_folder, save_results
from split_lightning.building import choose_threads
from split_lightning.callbacks.confusion_matrix import (
    ClassFigures,
    ConfusionMatrix,
    by_class,
)
from split_lightning.callbacks.round_progress_bar import RoundProgressBar
from split_lightning.report import figures_table, print_line
from split_lightning.run_command import TRAINER_KEYS
from split_lightning.runs import choose_network, rebuild_module, restore
from split_lightning.support import require_one_device

_MOST_ROWS = 20


def evaluate(
    cfg: DictConfig,
    run: str | Path,
    checkpoint: str | None = None,
    client: int | None = None,
) -> tuple[dict[str, Any], ClassFigures]:
    """Tests the network of a run as training did; writes what it finds.

    Args:
        cfg: The run's configuration, as it is or changed. `output_dir` is where
            `results.json` and the tables and pictures of `ConfusionMatrix` go.
        run: The run's folder.
        checkpoint: `best` or `last`, or a checkpoint's file; `None`: the final weights.
        client: Whose network to test, where clients have networks of their own;
            `None`: all, for the mean over them.

    Returns:
        The results, and each class's figures.

    Raises:
        ValueError: If the folder lacks something, or what it has does not fit.
    """
    folder = make_folder(cfg.output_dir)
    confusion = ConfusionMatrix(folder)
    trainer = _trainer(cfg, confusion)
    data = instantiate(cfg.datamodule, _convert_="all")
    module = rebuild_module(cfg)
    # In the precision of the run first: weights of 64 bits are not to be rounded.
    trainer.precision_plugin.convert_module(module)
    restore(module, run, checkpoint)
    if client is not None:
        choose_network(module, client)
    data.setup("test")
    choose_threads(cfg, module, data)
    trainer.test(module, datamodule=data, verbose=False)
    assert confusion.figures is not None
    results = {
        key.replace("/", "_"): value.item()
        for key, value in trainer.callback_metrics.items()
    }
    networks = confusion.figures.networks
    results["images"] = int(confusion.figures.confusion.sum()) // networks
    results["networks"] = networks
    origin = {"run": str(run), "weights": checkpoint or "final"}
    if client is not None:
        origin["client"] = str(client)
    save_results({**origin, **results}, folder / "results.json")
    return results, confusion.figures


def _trainer(cfg: DictConfig, confusion: ConfusionMatrix) -> pl.Trainer:
    if cfg.trainer.get("limit_test_batches") == 0:
        raise ValueError(
            "Expected `trainer.limit_test_batches` to leave something to test, but "
            "got 0."
        )
    chosen = {key: cfg.trainer[key] for key in TRAINER_KEYS if key in cfg.trainer}
    callbacks: list[pl.Callback] = [confusion]
    if chosen.get("enable_progress_bar"):
        callbacks.append(RoundProgressBar())
    trainer: pl.Trainer = instantiate(
        {"_target_": cfg.trainer["_target_"], **chosen},
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        _convert_="all",
    )
    require_one_device(trainer)
    return trainer


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
