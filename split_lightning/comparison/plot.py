"""The plot of a comparison: accuracy by round and by bytes, or else bars."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from split_lightning.comparison.run_folder import Figures, RunFolder, total_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW = 10  # colours that can be told apart; more runs are coloured by rank
_WIDEST = 48  # characters of a label before it is wrapped
_LINE = 0.19  # inches
_TALL = 30  # lines of a legend before it has two columns

Labelled = list[tuple[RunFolder, str]]


def draw_runs(runs: Sequence[RunFolder], labels: Sequence[str]) -> Figure | None:
    """Returns a plot of runs, or `None` if none has anything to plot.

    Runs with a `history.csv` get a curve of validation accuracy by round, and by bytes
    if anything travelled; where finished runs have none, all get bars of test accuracy.

    Args:
        runs: The runs.
        labels: What the legend says of each.
    """
    from matplotlib.figure import Figure

    labelled = list(zip(runs, map(_wrapped, labels), strict=True))
    curves = sorted((pair for pair in labelled if _curve(pair[0], _round)), key=_rank)
    bars = [pair for pair in labelled if _accuracy(pair[0]) is not None]
    panels: list[Callable[[Axes], None]] = []
    if curves:
        panels.append(lambda axes: _draw_by_round(axes, curves))
    if any(_curve(run, total_bytes) for run, _ in curves):
        panels.append(lambda axes: _draw_by_bytes(axes, curves))
    if any(not _curve(run, _round) for run, _ in bars):
        panels.append(lambda axes: _draw_bars(axes, bars))
    if not panels:
        return None
    lines = [label.count("\n") + 1 for _, label in curves or bars]
    columns = 2 if curves and sum(lines) > _TALL else 1
    size = (
        5.2 * len(panels) + 2.8 * columns,
        max(4.2, _LINE * sum(lines) / columns + 1),
    )
    figure = Figure(figsize=size, layout="constrained")
    for draw in panels:
        draw(figure.add_subplot(1, len(panels), len(figure.axes) + 1))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    if curves:  # the curves of the first panel stand for all
        handles = figure.axes[0].get_lines()
        figure.legend(
            handles=handles, loc="outside right upper", ncols=columns, fontsize=8
        )
    return figure


def _draw_by_round(axes: Axes, curves: Labelled) -> None:
    from matplotlib.ticker import MaxNLocator

    _draw_curves(axes, curves, _round)
    axes.set(xlabel="round", ylabel="validation accuracy", title="By round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_by_bytes(axes: Axes, curves: Labelled) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    _draw_curves(axes, curves, total_bytes)
    axes.set(xlabel="travelled: up, down and handed over", title="By bytes")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))


def _draw_curves(
    axes: Axes, curves: Labelled, position: Callable[[Figures], float | None]
) -> None:
    """Draws a curve for each run, the best first."""
    for index, (run, label) in enumerate(curves):
        points = _curve(run, position)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=_color(index, len(curves)),
            linestyle="--" if run.status == "failed" else "-",
            linewidth=1.6 if len(curves) <= _FEW else 1.1,
            marker="o" if len(points) <= 20 else None,
            markersize=3,
            label=label if run.status == "finished" else f"{label} ({run.status})",
        )


def _draw_bars(axes: Axes, bars: Labelled) -> None:
    positions = range(len(bars))
    values = [_accuracy(run) or 0.0 for run, _ in bars]
    drawn = axes.barh(positions, values, color=_color(0, 1))
    axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks(positions, [label for _, label in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="test accuracy", title="At the end")


def _color(index: int, count: int) -> Any:
    from matplotlib import colormaps

    if count <= _FEW:
        return colormaps["tab10"](index)
    return colormaps["turbo"](0.05 + 0.9 * index / (count - 1))


def _curve(
    run: RunFolder, position: Callable[[Figures], float | None]
) -> list[tuple[float, float]]:
    """Returns the points of a curve; rounds that were not validated have none."""
    points = [(position(row), row.get("val_accuracy")) for row in run.history]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    return known if any(x for x, _ in known) or position is _round else []


def _round(row: Figures) -> float | None:
    return row.get("round")


def _rank(pair: tuple[RunFolder, str]) -> float:
    """Sorts by the accuracy of the last round, the best first."""
    return -_curve(pair[0], _round)[-1][1]


def _accuracy(run: RunFolder) -> float | None:
    return run.figures()["test_accuracy"]


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, _WIDEST)) or label
