"""The plot of a comparison: accuracy by round, samples and bytes, or else bars."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from split_lightning.comparison.curve import (
    Position,
    by_bytes,
    by_round,
    by_samples,
    by_virtual_seconds,
    curve,
)
from split_lightning.comparison.group import RunGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW = 10  # colours that can be told apart; more curves are coloured by rank
_WIDEST = 48  # characters of a label before it is wrapped
_LINE = 0.19  # inches
_TALL = 30  # lines of a legend before it has two columns
_MOST_ROWS = 6
_LOG_SPAN = 30  # curves whose bytes end further apart share a logarithmic axis
_MARKERS = "os^DvPX"  # help to tell near colours apart
_PANELS: dict[str, tuple[Position, str, str]] = {  # title: position, axis, unit
    "By round": (by_round, "round", ""),
    "By samples": (by_samples, "images trained on", ""),
    "By bytes": (by_bytes, "bytes that travelled", "B"),
    "By virtual time": (by_virtual_seconds, "virtual seconds", "s"),
}

Labelled: TypeAlias = list[tuple[RunGroup, str]]
Colors: TypeAlias = Mapping[str, Any]
Panel: TypeAlias = Callable[["Axes", Labelled, Colors], None]


def row_setting(groups: Sequence[RunGroup], keys: Sequence[str]) -> str | None:
    """Returns the setting that has a row of the plot for each of its values.

    Up to ten curves share one row; where there are more, it is the setting of the
    fewest values, up to six, if there is another one that tells the curves apart.

    Args:
        groups: The runs.
        keys: The settings in which they differ.
    """
    counts = {key: len({group.shown(key) for group in groups}) for key in keys}
    several = {key: count for key, count in counts.items() if count > 1}
    few = [key for key, count in several.items() if count <= _MOST_ROWS]
    if len(groups) <= _FEW or len(several) < 2 or not few:
        return None
    return min(few, key=counts.__getitem__)


def draw_groups(
    groups: Sequence[RunGroup], labels: Sequence[str], rows: str | None = None
) -> Figure | None:
    """Returns a plot of runs, or `None` if none has anything to plot.

    Runs with a `history.csv` get a curve of mean validation accuracy by round, by
    samples, and by bytes if anything travelled, with a band of one standard deviation
    on each side; where finished runs have none, all get bars of test accuracy.

    Args:
        groups: The runs.
        labels: What the legend says of each; those of one label share a colour.
        rows: The setting that has a row of panels for each of its values, or `None`.
    """
    from matplotlib.figure import Figure

    labelled = [
        (g, _legend_text(g, label)) for g, label in zip(groups, labels, strict=True)
    ]
    panels = _panels(labelled)
    if not panels:
        return None
    names = list(dict.fromkeys([*_ranked(labelled), *(text for _, text in labelled)]))
    values = dict.fromkeys(group.shown(rows) if rows else "" for group in groups)
    lines = sum(name.count("\n") + 1 for name in names)
    columns = 2 if lines > _TALL * len(values) else 1
    height = max(3.4 * len(values), 4.2, _LINE * lines / columns + 1)
    size = (5.2 * len(panels) + 2.8 * columns, height)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(values), len(panels), squeeze=False)
    colors = {name: _color(index, len(names)) for index, name in enumerate(names)}
    for value, row in zip(values, grid, strict=True):
        inside = [pair for pair in labelled if not rows or pair[0].shown(rows) == value]
        for (title, draw), axes in zip(panels.items(), row, strict=True):
            draw(axes, inside, colors)
            axes.set_title(f"{value}: {title.lower()}" if value else title)
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
    _draw_legend(figure, columns, names)
    return figure


def _panels(labelled: Labelled) -> dict[str, Panel]:
    """Returns what there is to draw: a column of panels for each."""
    groups = [group for group, _ in labelled]
    panels: dict[str, Panel] = {
        title: partial(_draw_curves, title=title)
        for title, (position, _, _) in _PANELS.items()
        if any(curve(group, position) for group in groups)
    }
    if any(_accuracy(g) is not None and not curve(g, by_round) for g in groups):
        panels["At the end"] = _draw_bars
    return panels


def _draw_curves(axes: Axes, inside: Labelled, colors: Colors, title: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    position, name, unit = _PANELS[title]
    rank = list(colors).index
    several = len(colors) > _FEW
    ends: list[float] = []
    for group, label in sorted(inside, key=lambda pair: rank(pair[1])):
        if points := curve(group, position):
            x, y, spread = map(list, zip(*points, strict=True))
            ends.append(x[-1])
            axes.plot(
                x,
                y,
                color=colors[label],
                linestyle="--" if group.status == "failed" else "-",
                linewidth=1.1 if several else 1.6,
                marker=_marker(rank(label) if several else 0, len(points)),
                markersize=4 if several else 3,
                label=label,
            )
            if any(spread):
                low = [mean - s for mean, s in zip(y, spread, strict=True)]
                high = [mean + s for mean, s in zip(y, spread, strict=True)]
                axes.fill_between(
                    x, low, high, color=colors[label], alpha=0.12, linewidth=0
                )
    axes.set(xlabel=name, ylabel="validation accuracy")
    spreads = position in (by_bytes, by_virtual_seconds)
    if spreads and max(ends) > _LOG_SPAN * min(ends):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if position is not by_round:
        axes.xaxis.set_major_formatter(EngFormatter(unit=unit))


def _draw_bars(axes: Axes, inside: Labelled, colors: Colors) -> None:
    bars = [pair for pair in inside if _accuracy(pair[0]) is not None]
    values = [_accuracy(group) or 0.0 for group, _ in bars]
    spread = [group.deviations()["test_accuracy"] or 0.0 for group, _ in bars]
    errors = spread if any(spread) else None
    drawn = axes.barh(range(len(bars)), values, xerr=errors, color=_color(0, 1))
    axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), [label for _, label in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="test accuracy")


def _draw_legend(figure: Figure, columns: int, names: Sequence[str]) -> None:
    """Draws one legend for all panels, beside them, the best first."""
    lines = {
        line.get_label(): line for axes in figure.axes for line in axes.get_lines()
    }
    handles = [lines[name] for name in names if name in lines]
    if handles:
        figure.legend(
            handles=handles, loc="outside right upper", ncols=columns, fontsize=8
        )


def _ranked(labelled: Labelled) -> list[str]:
    """Returns the labels of all curves by their mean last accuracy, the best first."""
    last: dict[str, list[float]] = {}
    for group, label in labelled:
        if points := curve(group, by_round):
            last.setdefault(label, []).append(points[-1].y)
    return sorted(last, key=lambda label: -sum(last[label]) / len(last[label]))


def _color(index: int, count: int) -> Any:
    from matplotlib import colormaps

    if count <= _FEW:
        return colormaps["tab10"](index)
    return colormaps["turbo"](0.05 + 0.9 * index / (count - 1))


def _marker(index: int, num_points: int) -> str | None:
    """Returns the marker of a curve; many points would hide the line."""
    return _MARKERS[index % len(_MARKERS)] if num_points <= 20 else None


def _accuracy(group: RunGroup) -> float | None:
    return group.means()["test_accuracy"]


def _legend_text(group: RunGroup, label: str) -> str:
    status = "" if group.status == "finished" else f" ({group.status})"
    return "\n".join(textwrap.wrap(label + status, _WIDEST)) or label
