"""What a comparison leaves: tables on the terminal and as CSV, a plot, TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from rich import box, filesize
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from split_lightning.comparison.board import write_board
from split_lightning.comparison.group import SEED, RunGroup, grouped
from split_lightning.comparison.plot import draw_groups, row_setting
from split_lightning.comparison.run_folder import RunFolder
from split_lightning.comparison.settings import differing_settings, short_names
from split_lightning.report import print_line
from split_lightning.typed_words import shell_line

_WIDEST = 1000  # characters of a line of a file
_SHORT = 6  # characters of a run's name that a legend has room for
_STYLES = {"failed": "red", "unreadable": "red", "unfinished": "yellow"}
Columns: TypeAlias = dict[str, tuple[str, Callable[[float], str]]]
ShownAs: TypeAlias = Literal["columns", "name=value", "values", "not"]
_IN_ONE: tuple[ShownAs, ...] = ("name=value", "values")


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

    Runs that differ in nothing but their seed are one row and one curve: their means,
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
    keys = differing_settings([run.settings for run in runs])
    groups = grouped(runs, keys)
    _print_table(groups, keys, _REACHED, console)
    means = [group.means() for group in groups]
    if any(row[key] for row in means for key in _TRAVELLED):
        console.print()
        _print_table(groups, keys, _TRAVELLED, console)
    output.mkdir(parents=True, exist_ok=True)
    files = [output / "comparison.csv", output / "comparison_means.csv"]
    write_csv(runs, keys, files[0])
    write_means(groups, keys, files[1])
    rows = row_setting(groups, keys)
    figure = draw_groups(groups, labels(groups, keys, rows), rows)
    if figure is not None:
        files += [output / "comparison.png", output / "comparison"]
        figure.savefig(files[2], dpi=120)
        write_board(groups, labels(groups, keys), keys, files[2], files[3])
    for name, file in zip(("table:", "means:", "plot: "), files, strict=False):
        print_line(console, f"{name} {file}")
    for board in files[3:]:
        place = board.resolve() if str(board).startswith("-") else board
        look = shell_line("tensorboard", "--logdir", str(place))
        print_line(console, f"look:  {look}")
    return files


def _print_table(
    groups: Sequence[RunGroup], keys: Sequence[str], columns: Columns, console: Console
) -> None:
    """Prints a table that a terminal has room for; a file is as wide as need be.

    No word is broken: where one column has no room for the settings, either, a table of
    them comes before the first table of figures.
    """
    table = as_table(groups, keys, columns)
    if not console.is_terminal:
        console.width = max(console.width, _measured(table, console).maximum)
    if _measured(table, console).maximum <= console.width:
        console.print(table)
        return
    for shown_as in _IN_ONE:
        table = as_table(groups, keys, columns, shown_as)
        if not columns or _measured(table, console).minimum <= console.width:
            console.print(table)
            return
    if columns is _REACHED:
        _print_table(groups, keys, {}, console)
        console.print()
    console.print(as_table(groups, keys, columns, "not"))


def _measured(table: Table, console: Console) -> Measurement:
    """Returns the widths at which no word is broken, and at which no line is."""
    options = console.options.update(max_width=_WIDEST)
    for column in table.columns:
        if column.no_wrap:  # rich would take its words apart here
            cells = [column.header, *column.cells]
            widths = [Measurement.get(console, options, c).maximum for c in cells]
            column.min_width = max(widths)
    return table.__rich_measure__(console, options)


def as_table(
    groups: Sequence[RunGroup],
    keys: Sequence[str],
    columns: Columns = _REACHED,
    shown_as: ShownAs = "columns",
) -> Table:
    """Returns a table with a row for each group; the best by validation is bold.

    Args:
        groups: The runs, in groups.
        keys: The settings that are shown.
        columns: The figures that are shown, where there are any.
        shown_as: Whether settings are `columns`; or share one, as `name=value` or, with
            their names in its head, as `values`, without a column of the status if all
            runs are finished; or are `not` shown, nor the status.
    """
    means = [group.means() for group in groups]
    zero = 0 if columns is _TRAVELLED else None  # what never travelled has no column
    used = [k for k in columns if any(row[k] not in (None, zero) for row in means)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    names = list(short_names(keys).values())
    heads = {"name=value": ["settings"], "values": [" ".join(names)], "not": []}
    for name in ("run", *heads.get(shown_as, names)):
        table.add_column(name, overflow="fold")
    for key in used:
        table.add_column(columns[key][0], justify="right", no_wrap=True)
    all_finished = all(group.status == "finished" for group in groups)
    with_status = shown_as != "not" and not (shown_as == "values" and all_finished)
    if with_status:
        table.add_column("status", no_wrap=True)
    reached = [row["val_accuracy"] for row in means]
    best = max((value for value in reached if value is not None), default=None)
    for group, row in zip(groups, means, strict=True):
        is_best = best is not None and row["val_accuracy"] == best and len(groups) > 1
        settings = [group.shown(key) for key in keys]
        if shown_as == "name=value":
            settings = [" ".join(_choices(group, keys))]
        elif shown_as == "values":
            settings = [" ".join(value or "-" for value in settings)]
        elif shown_as == "not":
            settings = []
        style = _STYLES.get(group.status, "")
        status = [Text(_status(group), style=style)] if with_status else []
        table.add_row(
            *map(Text, (group.name, *settings)),
            *(_formatted(group, key, columns[key][1]) for key in used),
            *status,
            style="bold" if is_best else None,
        )
    return table


def _formatted(group: RunGroup, key: str, formatted: Callable[[float], str]) -> str:
    """Returns a mean, and the deviation of an accuracy if there is one."""
    mean, deviation = group.means()[key], group.deviations()[key]
    if mean is None:
        return ""
    if deviation is None or key not in _WITH_DEVIATION:
        return formatted(mean)
    return f"{formatted(mean)} ±{formatted(deviation)}"


def _status(group: RunGroup) -> str:
    rounds = min(len(run.history) for run in group.runs)
    if group.status != "unfinished" or not rounds:
        return group.status
    return f"unfinished:\n{rounds} rounds"


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


def write_means(groups: Sequence[RunGroup], keys: Sequence[str], path: Path) -> None:
    """Writes a row for each group: settings, means and standard deviations.

    Args:
        groups: The runs, in groups.
        keys: The settings that become columns; the seed's has those of all runs.
        path: The file to write.
    """
    figures = list(groups[0].means()) if groups else []
    spread = [f"{key}_std" for key in figures]
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["runs", "num_runs", "status", *keys, *figures, *spread])
        for group in groups:
            names = " ".join(run.name for run in group.runs)
            about = [names, len(group.runs), group.status]
            values = [
                group.shown(key) if key == SEED else _plain(group.runs[0], key)
                for key in keys
            ]
            means, deviations = group.means(), group.deviations()
            rows.writerow([*about, *values, *means.values(), *deviations.values()])


def labels(
    groups: Sequence[RunGroup], keys: Sequence[str], rows: str | None = None
) -> list[str]:
    """Returns what tells each group from the others: settings, a single run's name.

    Args:
        groups: The runs, in groups.
        keys: The settings in which they differ.
        rows: The setting that the place of a curve tells, so that its label need not;
            curves at several places then share a label, which has no name of a run.
    """
    if len({group.shown(SEED) for group in groups}) == 1:
        keys = [key for key in keys if key != SEED]
    found = [", ".join(_choices(g, [k for k in keys if k != rows])) for g in groups]
    places = [
        (g.shown(rows) if rows else "", f) for g, f in zip(groups, found, strict=True)
    ]
    named = [
        len(group.runs) == 1 and len(group.name) <= _SHORT and not rows
        for group in groups
    ]
    return [
        f"{group.name}: {place[1]}".removesuffix(": ")
        if is_named or not place[1] or places.count(place) > 1
        else place[1]
        for group, place, is_named in zip(groups, places, named, strict=True)
    ]


def _choices(group: RunGroup, keys: Sequence[str]) -> list[str]:
    """Returns the settings that a group has, as `name=value`."""
    names = short_names(keys).items()
    there = [(key, name) for key, name in names if key in group.settings]
    return [f"{name}={group.shown(key)}" for key, name in there]
