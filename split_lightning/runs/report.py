"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table

from split_lightning.typed_words import shell_line

_WIDEST = 1000  # characters of a line of a file
_ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "test_accuracy": ("test accuracy", "{:.4f}".format),
    "test_loss": ("test loss", "{:.4f}".format),
    "networks": ("both are the mean of", "{:,} networks".format),
    "val_accuracy": ("validation accuracy", "{:.4f}".format),
    "rounds": ("rounds", "{:,}".format),
    "uplink_bytes": ("bytes up", filesize.decimal),
    "downlink_bytes": ("bytes down", filesize.decimal),
    "handoff_bytes": ("bytes of hand-offs", filesize.decimal),
    "handoffs": ("hand-offs", "{:,}".format),
    "averaging_bytes": ("bytes for averaging", filesize.decimal),
    "server_averaging_bytes": ("bytes between servers", filesize.decimal),
    "hop_bytes": ("bytes from hop to hop", filesize.decimal),
    "layer_bytes": ("bytes of layers that moved", filesize.decimal),
    "images_per_second": ("images per second", "{:,.0f}".format),
    "virtual_seconds": ("virtual seconds", "{:,.1f}".format),
    "seconds": ("time", lambda value: str(timedelta(seconds=round(value)))),
}
# Shown where there is a cut, and where there was some.
_TRAFFIC = ("uplink_bytes", "downlink_bytes", "handoff_bytes", "handoffs")
_AVERAGING = ("averaging_bytes", "server_averaging_bytes", "hop_bytes", "layer_bytes")


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
    print_line(console, f"run:  {folder}")
    look = folder / "curves.png"
    if any(folder.rglob("events.out.tfevents.*")):
        look_with = shell_line("tensorboard", "--logdir", str(folder))
        print_line(console, f"look: {look_with}")
    elif look.exists():
        print_line(console, f"look: {look}")


def print_line(console: Console, text: str) -> None:
    """Prints a line as it is, however long: brackets and colons in it mean nothing."""
    console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)


def widen(console: Console, tables: Iterable[Table]) -> None:
    """Makes the lines of a file as long as tables need; a terminal keeps its width."""
    if not console.is_terminal:
        console.width = max(console.width, *(full_width(t, console) for t in tables))


def full_width(table: Table, console: Console) -> int:
    """Returns the number of characters of a table's lines where nothing is folded."""
    options = console.options.update(max_width=_WIDEST)
    return table.__rich_measure__(console, options).maximum


def figures_table(results: Mapping[str, Any]) -> Table:
    """Returns the main figures of a run as a table."""
    table = Table(show_header=False)
    for name, value in _rows(results):
        table.add_row(name, value)
    return table


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what was measured and its value, in words."""
    is_split = results.get("uplink_bytes")
    hidden = [] if is_split else list(_TRAFFIC)
    hidden += [key for key in _AVERAGING if not results.get(key)]
    if results.get("networks", 1) == 1:  # there is no mean
        hidden.append("networks")
    for key, (name, formatted) in _ROWS.items():
        if key in results and key not in hidden:
            yield name, formatted(results[key])
        if key == "val_accuracy" and "best_round" in results:
            best = f"{results['best_val_accuracy']:.4f} in round"
            yield "best validation", f"{best} {results['best_round']}"
