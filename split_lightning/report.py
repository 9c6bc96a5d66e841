"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table

_ROWS = {
    "test_accuracy": ("test accuracy", "{:.4f}".format),
    "test_loss": ("test loss", "{:.4f}".format),
    "uplink_bytes": ("bytes up", filesize.decimal),
    "downlink_bytes": ("bytes down", filesize.decimal),
    "handoff_bytes": ("bytes handed over", filesize.decimal),
    "images_per_second": ("images per second", "{:,.0f}".format),
}


def print_results(
    results: Mapping[str, Any], folder: Path, console: Console | None = None
) -> None:
    """Prints the figures of a run, where it is, and how to look at it.

    Args:
        results: What `results.json` holds.
        folder: The run's folder.
        console: Where to print; `None`: standard output.
    """
    console = console or Console()
    console.print(figures_table(results))
    console.print(f"run:  {folder}", soft_wrap=True, highlight=False)
    console.print(
        f"look: tensorboard --logdir {folder}", soft_wrap=True, highlight=False
    )


def figures_table(results: Mapping[str, Any]) -> Table:
    """Returns the figures of a run that are worth a look, as a table."""
    table = Table(show_header=False)
    for key, (name, formatted) in _ROWS.items():
        if key in results:
            table.add_row(name, formatted(results[key]))
    return table
