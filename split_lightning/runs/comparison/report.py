"""The files of a comparison: tables on the terminal and as CSV, a plot, TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from rich import box, filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from split_lightning.runs.comparison.board import write_board
from split_lightning.runs.comparison.plot import draw
from split_lightning.runs.comparison.run_folder import RunFolder
from split_lightning.runs.comparison.settings import short_names
from split_lightning.runs.comparison.table import Comparison, compared
from split_lightning.runs.report import full_width, print_line, widen
from split_lightning.typed_words import shell_line

_STYLES = {"failed": "red", "unreadable": "red", "unfinished": "yellow"}
Columns: TypeAlias = dict[str, tuple[str, Callable[[float], str]]]


def _size(value: float) -> str:
    return filesize.decimal(round(value)) if value else "0"


_REACHED: Columns = {
    "test_accuracy": ("test\nacc.", "{:.4f}".format),
    "test_loss": ("test\nloss", "{:.4f}".format),
    "val_accuracy": ("val.\nacc.", "{:.4f}".format),
    "bytes": ("bytes", _size),
    "virtual_seconds": ("virtual\ntime (s)", "{:,.1f}".format),
    "seconds": ("time\n(s)", "{:,.0f}".format),
}
_WITH_DEVIATION = ("test_accuracy", "val_accuracy")
_TRAVELLED: Columns = {
    "uplink_bytes": ("clients\nto server", _size),
    "downlink_bytes": ("server\nto clients", _size),
    "handoff_bytes": ("client\nto client", _size),
    "handoffs": ("hand-\noffs", "{:,.0f}".format),
    "averaging_bytes": ("averaging\nclients", _size),
    "server_averaging_bytes": ("averaging\nservers", _size),
    "hop_bytes": ("hop to\nhop", _size),
    "layer_bytes": ("layers,\nclient\nand server", _size),
}


def compare(
    runs: Sequence[RunFolder], output: Path, console: Console | None = None
) -> list[Path]:
    """Prints tables of runs, and writes them, a plot and files for TensorBoard.

    Runs that differ only in their seed are one row and one curve: their means,
    with the sample standard deviations. `comparison.csv` has a row for each run,
    `comparison_means.csv` one for each row of the table.

    Args:
        runs: From `find_runs`.
        output: The folder for the files.
        console: Where to print; `None`: standard output.

    Returns:
        The files that were written: the tables, the plot and the folder for
        TensorBoard; the last two only where a run has anything to plot.
    """
    console = console or Console()
    found = compared(runs)
    _print_tables(found, console)
    output.mkdir(parents=True, exist_ok=True)
    files = [output / "comparison.csv", output / "comparison_means.csv"]
    found.runs.drop(columns="group").convert_dtypes().to_csv(files[0], index=False)
    found.groups.convert_dtypes().to_csv(files[1], index=False)
    figure = draw(found)
    if figure is not None:
        files += [output / "comparison.png", output / "comparison"]
        figure.savefig(files[2], dpi=120)
        write_board(found, files[2], files[3])
    for name, file in zip(("table:", "means:", "plot: "), files, strict=False):
        print_line(console, f"{name} {file}")
    for board in files[3:]:
        place = board.resolve() if str(board).startswith("-") else board
        look = shell_line("tensorboard", "--logdir", str(place))
        print_line(console, f"look:  {look}")
    return files


def _print_tables(found: Comparison, console: Console) -> None:
    """Prints tables that a terminal has room for; a file is as wide as need be.

    Where the settings do not fit beside the figures, they are a table of their own.
    """
    groups = found.groups
    with_bytes = groups[list(_TRAVELLED)].fillna(0).any(axis=None)
    columns = [_REACHED, *([_TRAVELLED] if with_bytes else [])]
    tables = [as_table(found, figures) for figures in columns]
    widen(console, tables)
    if any(full_width(table, console) > console.width for table in tables):
        tables = [as_table(found, {})]
        tables += [as_table(found, figures, settings=False) for figures in columns]
    for number, table in enumerate(tables):
        console.print(*([""] if number else []), table, sep="\n")


def as_table(
    found: Comparison, columns: Columns = _REACHED, settings: bool = True
) -> Table:
    """Returns a table with a row for each group; the best by validation is bold.

    Args:
        found: The runs.
        columns: The figures that are shown, where there are any.
        settings: Whether the settings and the status are shown.
    """
    groups, keys = found.groups, found.keys if settings else []
    # Bytes that were never sent have no column.
    zero = 0 if columns is _TRAVELLED else None
    used = [key for key in columns if (groups[key].dropna() != zero).any()]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("run", *(short_names(found.keys)[key] for key in keys)):
        table.add_column(name, overflow="fold")
    for key in used:
        table.add_column(columns[key][0], justify="right", no_wrap=True)
    if settings:
        table.add_column("status", no_wrap=True)
    names = found.names()
    # Clients with networks of their own validate on their own labels only.
    best = groups["val_accuracy"].where(~groups["networks"].gt(1)).max()
    for number, row in groups.iterrows():
        figures = [_formatted(row, key, columns[key][1]) for key in used]
        status = Text(_status(found, number), style=_STYLES.get(row["status"], ""))
        is_best = row["val_accuracy"] == best and len(groups) > 1
        table.add_row(
            Text(names[number]),
            *map(Text, found.shown.loc[number, keys]),
            *figures,
            *([status] if settings else []),
            style="bold" if is_best else None,
        )
    return table


def _formatted(
    row: dict[str, float], key: str, formatted: Callable[[float], str]
) -> str:
    """Returns a mean, and the deviation of an accuracy if there is one."""
    if row[key] != row[key]:  # NaN
        return ""
    spread = row[f"{key}_std"]
    if key not in _WITH_DEVIATION or spread != spread:
        return formatted(row[key])
    return f"{formatted(row[key])} ±{formatted(spread)}"


def _status(found: Comparison, number: int) -> str:
    status = str(found.groups.loc[number, "status"])
    rounds = found.rounds.loc[found.rounds["group"] == number, "round"].max()
    if status != "unfinished" or rounds != rounds:
        return status
    return f"unfinished:\n{rounds:.0f} rounds"
