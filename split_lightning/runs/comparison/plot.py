"""The plot of a comparison: accuracy by round, bytes and virtual time."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from split_lightning.runs.comparison.settings import is_of_group, short_names
from split_lightning.runs.comparison.table import SEED, Comparison

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES = {
    "round": "round",
    "bytes": "bytes that travelled",
    "virtual_seconds": "virtual seconds",
}
_UNITS = {"bytes": "B", "virtual_seconds": "s"}
_LOG_SPAN = 30  # curves whose bytes end further apart share a logarithmic axis
_WIDEST = 34  # characters of a line of a legend
_LINE = 0.19  # inches
_TALL = 50  # lines of a legend before it has two columns
_PALETTES = {"tab10": 10, "tab20": 20}  # colours that can be told apart
_MOST_MARKERS = 20  # points of a curve; more markers would hide it
_LABELS = ["panel", "color", "style"]
_NAME = "accuracy: validation (lines), test (stars)"
_HEADINGS = {"color": "protocol", "style": "other settings"}


def draw(compared: Comparison) -> Figure | None:
    """Returns a plot of runs, or `None` if none has an accuracy.

    There is a row of panels for each data set and partition, a column for each axis,
    and a colour for each protocol; other settings have line styles. Curves are mean
    validation accuracies, in a band of one standard deviation where there are several
    seeds. Stars are test accuracies at the end. Clients with networks of their own have
    no curve: each validates on its own labels only.
    """
    import seaborn as sns
    from matplotlib.figure import Figure

    lines, stars = _lines(compared), _stars(compared)
    labels = _labels(compared, {*lines["group"], *stars["group"]})
    lines, stars = (frame.join(labels, on="group") for frame in (lines, stars))
    there = {x: [f[x] for f in (lines, stars) if f[x].gt(0).any()] for x in _AXES}
    axes_names = [x for x, frames in there.items() if frames]
    if not axes_names:
        return None
    panels = list(dict.fromkeys(labels["panel"]))
    colors, styles = _ranked(labels, stars, lines), list(dict.fromkeys(labels["style"]))
    kind = next((k for k, size in _PALETTES.items() if len(colors) <= size), "husl")
    palette = sns.color_palette(kind, len(colors))
    look: dict[str, Any] = {
        "hue": "color",
        "hue_order": colors,
        "palette": palette,
        "y": "accuracy",
    }
    if len(styles) > 1:
        look |= {"style": "style", "style_order": styles}
    elif len(colors) > 1:  # markers help to tell near colours apart
        look |= {"style": "color", "style_order": colors, "dashes": False}
    if lines["round"].nunique() <= _MOST_MARKERS:
        look["markers" if "style" in look else "marker"] = True
    if look.get("marker"):
        look["marker"] = "o"
    words = "\n".join([*colors, *(styles if len(styles) > 1 else [])])
    columns = 1 + words.count("\n") // _TALL
    legend = _LINE * (words.count("\n") // columns + 4)
    width, height = 5.4 * len(axes_names), max(4.0, 3.4 * len(panels), legend)
    size = (width + 3.2 * columns, height)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        len(panels), len(axes_names), squeeze=False, sharex="col", sharey=True
    )
    for panel, row in zip(panels, grid, strict=True):
        for x, axes in zip(axes_names, row, strict=True):
            _draw_panel(axes, x, lines, stars, panel, look)
            axes.set(title=_title(compared, labels, panel), xlabel=_AXES[x])
            axes.set_ylabel("")
            axes.xaxis.set_tick_params(labelbottom=True)
    for x, axes in zip(axes_names, grid[0], strict=True):
        _scale(axes, x, there[x])
    figure.supylabel(_NAME, fontsize=10)
    _draw_legend(figure, grid, columns)
    return figure


def band(values: pd.Series) -> tuple[float, float]:
    """Returns mean minus and plus one standard deviation, within [0, 1]."""
    mean, spread = values.mean(), values.std()
    return max(mean - spread, 0.0), min(mean + spread, 1.0)


def _labels(compared: Comparison, drawn: set[int]) -> pd.DataFrame:
    """Returns for each group that is drawn its panel, colour and style."""
    shown = compared.shown.loc[sorted(drawn)]
    names = short_names(compared.keys)
    keys = [key for key in compared.keys if key != SEED]
    panel = [key for key in keys if is_of_group(key, "data")]
    rest = [key for key in keys if key not in panel]
    protocol = next((key for key in rest if is_of_group(key, "protocol")), None)
    style = [key for key in rest if key != protocol] if protocol else []
    color = [protocol] if protocol else rest
    labels = shown.apply(
        lambda row: {
            "panel": ", ".join(filter(None, (row[key] for key in panel))),
            "color": row[protocol] if protocol else _named(row, color, names),
            "style": _named(row, style, names),
        },
        axis=1,
        result_type="expand",
    )
    if labels.empty:
        labels = shown.reindex(columns=_LABELS, fill_value="")
    status = compared.groups["status"].loc[shown.index]
    ended = status.where(status != "finished", "").radd(" (").add(")")
    is_alike = labels.duplicated(keep=False)
    last = "style" if protocol else "color"
    named = (compared.names().loc[shown.index] + ": " + labels[last]).str.removesuffix(
        ": "
    )
    labels[last] = labels[last].where(~is_alike, named)
    labels[last] = (labels[last] + ended.where(status != "finished", "")).str.strip()
    return labels.map(lambda text: textwrap.fill(text, _WIDEST))


def _named(row: pd.Series, keys: list[str], names: dict[str, str]) -> str:
    return ", ".join(f"{names[key]}={row[key]}" for key in keys if row[key])


def _lines(compared: Comparison) -> pd.DataFrame:
    """Returns the validation accuracies of each round that all runs of a group did.

    An axis has the group's mean, so that a mean over seeds is one at the same place.
    """
    rounds, groups = compared.rounds, compared.groups
    rounds = rounds.reindex(columns=["group", "val_accuracy", *_AXES])
    own = groups["networks"].gt(1)
    rounds = rounds[~rounds["group"].map(own).astype(bool)]
    rounds = rounds.dropna(subset="val_accuracy").rename(
        columns={"val_accuracy": "accuracy"}
    )
    together = rounds.groupby(["group", "round"])
    is_complete = together["accuracy"].transform("count") == rounds["group"].map(
        groups["num_runs"]
    )
    for x in ("bytes", "virtual_seconds"):
        rounds[x] = together[x].transform("mean")
    return rounds[is_complete].reset_index(drop=True)


def _stars(compared: Comparison) -> pd.DataFrame:
    """Returns each group's mean test accuracy, at its end."""
    columns = {"rounds_done": "round", "test_accuracy": "accuracy"}
    stars = compared.groups.rename(columns=columns)[["accuracy", *_AXES]]
    return stars.dropna(subset="accuracy").rename_axis("group").reset_index()


def _ranked(
    labels: pd.DataFrame, stars: pd.DataFrame, lines: pd.DataFrame
) -> list[str]:
    """Returns the colours' labels, the one of the best last accuracy first."""
    last = lines.groupby("group")["accuracy"].last()
    reached = stars.set_index("group")["accuracy"].combine_first(last)
    by_color = reached.reindex(labels.index).groupby(labels["color"]).mean()
    return list(by_color.sort_values(ascending=False, kind="stable").index)


def _draw_panel(
    axes: Axes,
    x: str,
    lines: pd.DataFrame,
    stars: pd.DataFrame,
    panel: str,
    look: dict[str, Any],
) -> None:
    import seaborn as sns

    inside = lines[(lines["panel"] == panel) & lines[x].gt(0)]
    if len(inside):
        sns.lineplot(inside, x=x, ax=axes, errorbar=band, markersize=5, **look)
    ends = stars[(stars["panel"] == panel) & stars[x].gt(0)]
    colors = dict(zip(look["hue_order"], look["palette"], strict=True))
    axes.scatter(
        ends[x],
        ends["accuracy"],
        color=[colors[label] for label in ends["color"]],
        marker="*",
        s=130,
        edgecolor="white",
        zorder=3,
    )
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _title(compared: Comparison, labels: pd.DataFrame, panel: str) -> str:
    """Returns the partition, and over how many runs the means are."""
    sizes = compared.groups["num_runs"].loc[labels.index[labels["panel"] == panel]]
    least, most = sizes.min(), sizes.max()
    count = f"n = {most}" if least == most else f"n = {least} to {most}"
    runs = f"{count} run{'s' if most > 1 else ''} each"
    return ", ".join(filter(None, [compared.common, panel, runs]))


def _scale(axes: Axes, x: str, frames: list[pd.DataFrame]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ends = [value for values in frames for value in values[values > 0]]
    if x == "round":
        locator = MaxNLocator(nbins=8, integer=True, min_n_ticks=1)
        axes.xaxis.set_major_locator(locator)
        if max(ends) == min(ends):  # else matplotlib would make a range of one round
            axes.set_xlim(ends[0] - 1, ends[0] + 1)
        return
    if max(ends) > _LOG_SPAN * min(ends):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(unit=_UNITS[x]))


def _draw_legend(figure: Figure, grid: Any, columns: int) -> None:
    """Draws one legend for all panels, beside them."""
    entries: dict[str, Any] = {}
    for axes in grid.flat:
        handles, names = axes.get_legend_handles_labels()
        entries |= {_HEADINGS.get(n, n): h for n, h in zip(names, handles, strict=True)}
        if axes.get_legend():
            axes.get_legend().remove()
    entries = {name: handle for name, handle in entries.items() if name.strip()}
    if len(entries) > 1:
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside right upper",
            ncols=columns,
            fontsize=8,
        )
