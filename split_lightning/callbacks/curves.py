"""The curves of a run: losses, accuracy and bytes over the rounds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_BYTES = {
    "uplink_bytes": "up: to the server",
    "downlink_bytes": "down: to the clients",
    "handoff_bytes": "hand-offs: client segments",
    "averaging_bytes": "for averaging: client segments",
    "server_averaging_bytes": "between servers: their segments",
    "hop_bytes": "between servers: smashed data and gradients",
    "layer_bytes": "between clients and servers: layers",
}


def draw_curves(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Returns charts of a run's history, of all that was measured.

    Args:
        rows: One a round, as `History` keeps them; at least one.
        title: The title above the charts.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [_draw_losses]
    if any(row["val_accuracy"] is not None for row in rows):
        panels.append(_draw_accuracy)
    if any(row.get(name) for row in rows for name in _BYTES):
        panels.append(_draw_bytes)
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    wide = 55 * len(panels)  # characters
    lines = [textwrap.fill(line, wide) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=11)
    for number, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        draw(axes, rows)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.grid(alpha=0.3)
        if len(rows) == 1:  # else matplotlib would make a range of one round
            axes.set_xticks([rows[0]["round"]])
    return figure


def _draw_losses(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    _draw(axes, rows, "train_loss", "training")
    _draw(axes, rows, "val_loss", "validation")
    axes.set_title("loss")
    axes.legend(frameon=False)


def _draw_accuracy(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    _draw(axes, rows, "val_accuracy", "validation", color="C1")
    known = [row for row in rows if row["val_accuracy"] is not None]
    best = max(known, key=lambda row: row["val_accuracy"])
    axes.plot(best["round"], best["val_accuracy"], "o", color="C3", zorder=3)
    axes.set_title(
        "validation accuracy\n"
        f"best: {best['val_accuracy']:.4f} in round {best['round']}"
    )


def _draw_bytes(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    most = max(row.get(name) or 0 for row in rows for name in _BYTES)
    power = min(int(math.log10(most)) // 3, len(_UNITS) - 1)
    for name, label in _BYTES.items():
        if not any(row.get(name) for row in rows):
            continue
        wide = name == "uplink_bytes"  # often nearly that down: one on the other
        look = {"linewidth": 5.0 if wide else 1.5, "alpha": 0.4 if wide else 1.0}
        _draw(axes, rows, name, label, scale=1000.0**power, **look)
    axes.set_ylim(0, 1.4 * most / 1000.0**power)  # room for the legend
    axes.set_title(f"bytes since the start ({_UNITS[power]})")
    axes.legend(frameon=False, loc="upper left")


def _draw(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    column: str,
    label: str,
    scale: float = 1.0,
    **style: Any,
) -> None:
    """Draws a column over the rounds, where it was measured."""
    known = [row for row in rows if row[column] is not None]
    if known:
        marker = "o" if len(known) <= 30 else ""  # many would hide the line
        rounds = [row["round"] for row in known]
        values = [row[column] / scale for row in known]
        axes.plot(rounds, values, label=label, marker=marker, markersize=3.5, **style)
