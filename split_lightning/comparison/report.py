"""What a comparison leaves: a table on the terminal, a CSV file, a plot."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box, filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from split_lightning.comparison.plot import draw_runs
from split_lightning.comparison.run_folder import RunFolder
from split_lightning.comparison.settings import differing_settings, short_names, shown

_WIDEST = 1000  # characters of a line of a file
_SHORT = 6  # characters of a run's name that a legend has room for
_STYLES = {"failed": "red", "unreadable": "red", "unfinished": "yellow"}
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "test_accuracy": ("test\nacc.", "{:.4f}".format),
    "test_loss": ("test\nloss", "{:.4f}".format),
    "val_accuracy": ("val.\nacc.", "{:.4f}".format),
    "bytes": ("bytes", lambda value: filesize.decimal(int(value))),
    "seconds": ("time\n(s)", "{:,.0f}".format),
}


def compare(
    runs: Sequence[RunFolder], output: Path, console: Console | None = None
) -> list[Path]:
    """Prints a table of runs, and writes `comparison.csv` and `comparison.png`.

    Args:
        runs: From `find_runs`.
        output: The folder for the files.
        console: Where to print; `None`: standard output.

    Returns:
        The files that were written; no plot where no run has anything to plot.
    """
    console = console or Console()
    keys = differing_settings([run.settings for run in runs])
    console.print(_fitting_table(runs, keys, console))
    output.mkdir(parents=True, exist_ok=True)
    rows, plot = output / "comparison.csv", output / "comparison.png"
    write_csv(runs, keys, rows)
    figure = draw_runs(runs, labels(runs, keys))
    files = [rows]
    if figure is not None:
        figure.savefig(plot, dpi=120)
        files.append(plot)
    for name, file in zip(("table:", "plot: "), files, strict=False):
        console.print(f"{name} {file}", soft_wrap=True, highlight=False)
    return files


def _fitting_table(
    runs: Sequence[RunFolder], keys: Sequence[str], console: Console
) -> Table:
    """Returns a table that a terminal has room for; a file is as wide as need be."""
    table = as_table(runs, keys)
    widest = console.options.update(max_width=_WIDEST)
    width = table.__rich_measure__(console, widest).maximum
    if not console.is_terminal:
        console.width = max(console.width, width)
    return table if width <= console.width else as_table(runs, keys, in_one=True)


def as_table(
    runs: Sequence[RunFolder], keys: Sequence[str], in_one: bool = False
) -> Table:
    """Returns a table with a row for each run; the best by validation is bold.

    Args:
        runs: The runs.
        keys: The settings that are shown, a column each.
        in_one: Whether they share one column instead, as `name=value`.
    """
    figures = [run.figures() for run in runs]
    used = [key for key in _FIGURES if any(row[key] is not None for row in figures)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("run", *(["settings"] if in_one else short_names(keys).values())):
        table.add_column(name, overflow="fold")
    for key in used:
        table.add_column(_FIGURES[key][0], justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    reached = [row["val_accuracy"] for row in figures]
    best = max((value for value in reached if value is not None), default=None)
    for run, row in zip(runs, figures, strict=True):
        values = [(row[key], _FIGURES[key][1]) for key in used]
        is_best = best is not None and row["val_accuracy"] == best and len(runs) > 1
        settings = [shown(run.settings, key) for key in keys]
        if in_one:
            settings = [" ".join(_choices(run, keys))]
        table.add_row(
            *map(Text, (run.name, *settings)),
            *("" if value is None else formatted(value) for value, formatted in values),
            Text(_status(run), style=_STYLES.get(run.status, "")),
            style="bold" if is_best else None,
        )
    return table


def _status(run: RunFolder) -> str:
    if run.status != "unfinished" or not run.history:
        return run.status
    return f"unfinished:\n{len(run.history)} rounds"


def write_csv(runs: Sequence[RunFolder], keys: Sequence[str], path: Path) -> None:
    """Writes a row for each run: what was typed, settings, figures, status, error.

    Args:
        runs: The runs.
        keys: The settings that become columns, beside the figures.
        path: The file to write.
    """
    columns = list(RunFolder.figures(runs[0])) if runs else []
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["run", "status", "overrides", *keys, *columns, "error", "folder"]
        )
        for run in runs:
            values = [_plain(run, key) for key in keys]
            figures = [run.figures()[column] for column in columns]
            overrides = " ".join(run.overrides)
            first, last = [run.name, run.status, overrides], [run.error, run.path]
            rows.writerow([*first, *values, *figures, *last])


def _plain(run: RunFolder, key: str) -> object:
    """Returns a setting in full; a missing one is empty, and no value is `null`."""
    value = run.settings[key].value if key in run.settings else ""
    return "null" if value is None else value


def labels(runs: Sequence[RunFolder], keys: Sequence[str]) -> list[str]:
    """Returns what tells each run from the others: a short name, and its settings."""
    found = [", ".join(_choices(run, keys)) for run in runs]
    return [
        f"{run.name}: {label}".removesuffix(": ")
        if len(run.name) <= _SHORT or not label or found.count(label) > 1
        else label
        for run, label in zip(runs, found, strict=True)
    ]


def _choices(run: RunFolder, keys: Sequence[str]) -> list[str]:
    """Returns the settings that a run has, as `name=value`."""
    names = short_names(keys).items()
    there = [(key, name) for key, name in names if key in run.settings]
    return [f"{name}={shown(run.settings, key)}" for key, name in there]
