"""The plot of cuts: the client's work against the link, and each cost by cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from split_lightning.models.cut_cost import CutCost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GOOD, _OTHER = "C0", "0.7"
_ROW = 0.2  # inches
_BARS: dict[str, Callable[[CutCost], float]] = {
    "client's FLOPs\na sample": lambda cost: cost.client_flops,
    "bytes up and down\na sample": lambda cost: cost.link_bytes,
    "client's memory\n(bytes a sample)": lambda cost: cost.client_activation_bytes,
    "client's state\n(bytes)": lambda cost: cost.client_bytes,
}


def draw_costs(costs: Sequence[CutCost]) -> Figure:
    """Returns a plot of cuts: to the left a choice, to the right what each costs.

    To the left each cut is a point, the client's FLOPs against the bytes that cross,
    both a sample, on logarithmic axes: a slow device asks for the left, a slow link for
    the bottom. To the right are bars for each cut. Cuts that none dominates are
    coloured, and named.

    Args:
        costs: From `cut_costs`.
    """
    from matplotlib.figure import Figure

    height = max(4.6, _ROW * len(costs) + 1.2)
    figure = Figure(figsize=(15, height), layout="constrained")
    widths = {"width_ratios": (5, *(2 for _ in _BARS))}
    choice, *panels = figure.subplots(1, 1 + len(_BARS), gridspec_kw=widths)
    good = [not cost.is_dominated(costs) for cost in costs]
    _draw_choice(choice, costs, good)
    for (title, value), axes in zip(_BARS.items(), panels, strict=True):
        _draw_bars(axes, [value(cost) for cost in costs], good)
        axes.set_title(title, fontsize=10)
    names = [cost.cut_layer for cost in costs]
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    return figure


def _draw_choice(axes: Axes, costs: Sequence[CutCost], good: Sequence[bool]) -> None:
    from matplotlib.ticker import EngFormatter

    for is_good, color in ((True, _GOOD), (False, _OTHER)):
        chosen = [c for c, own in zip(costs, good, strict=True) if own == is_good]
        axes.scatter(
            [max(cost.client_flops, 1) for cost in chosen],
            [cost.link_bytes for cost in chosen],
            color=color,
            zorder=3 if is_good else 2,
            label="no other takes less" if is_good else "another takes less",
        )
    for cost, is_good in zip(costs, good, strict=True):
        if is_good:
            axes.annotate(
                cost.cut_layer,
                (max(cost.client_flops, 1), cost.link_bytes),
                xytext=(4, 6),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="client's FLOPs per sample", ylabel="bytes up and down per sample")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _draw_bars(axes: Axes, values: Sequence[float], good: Sequence[bool]) -> None:
    colors = [_GOOD if is_good else _OTHER for is_good in good]
    bars = axes.barh(range(len(values)), values, color=colors)
    axes.bar_label(bars, [short(value) for value in values], padding=3, fontsize=8)
    axes.margins(x=0.3)  # room for the numbers
    axes.set_ylim(len(values) - 0.4, -0.6)  # the first cut on top
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def short(value: float) -> str:
    """Returns a number in three digits and a unit.

    >>> short(512), short(9_536), short(217_282_560)
    ('512', '9.54k', '217M')
    """
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"
