"""The files of cut costs: a table on the terminal, a CSV file and a plot."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from split_lightning.models.cut_cost import CutCost
from split_lightning.runs.cut_plot import draw_costs, short
from split_lightning.runs.report import print_line

FEW = 8  # cuts that are enough to choose from
_COLUMNS: dict[str, Callable[[CutCost], float]] = {
    "client\nparams": lambda cost: cost.client_parameters,
    "client\nstate": lambda cost: cost.client_bytes,
    "client\nFLOPs": lambda cost: cost.client_flops,
    "client\nmemory": lambda cost: cost.client_activation_bytes,
    "server\nFLOPs": lambda cost: cost.server_flops,
    "link\nup": lambda cost: cost.uplink_bytes,
    "link\ndown": lambda cost: cost.downlink_bytes,
}
_LEGEND = (
    "State is the number of bytes sent at each hand-off: parameters and buffers. FLOPs "
    "(forward and backward), memory (bytes that the client keeps for its backward "
    "pass) and link bytes are per sample in training, in fp32. Cuts marked `*` are "
    "Pareto-optimal in client FLOPs, memory, state and link bytes."
)


def layers_down_to(cut_layers: Sequence[str], depth: int | None) -> list[str]:
    """Returns the layers whose paths have at most so many parts.

    Args:
        cut_layers: Paths of layers.
        depth: Number of parts; `None`: the fewest that leave eight layers to choose
            from, if there are so many.

    >>> layers_down_to(["stem", "stage.0", "stage.0.conv", "stage"], 2)
    ['stem', 'stage.0', 'stage']
    """
    depths = {layer: layer.count(".") + 1 for layer in cut_layers}
    if depth is None:
        several = [d for d in sorted(depths.values()) if _up_to(depths, d) >= FEW]
        depth = several[0] if several else max(depths.values(), default=1)
    return [layer for layer in cut_layers if depths[layer] <= depth]


def _up_to(depths: dict[str, int], depth: int) -> int:
    return sum(own <= depth for own in depths.values())


def report_costs(
    costs: Sequence[CutCost], output: Path, console: Console | None = None
) -> list[Path]:
    """Prints a table of cuts, and writes them (`cuts.csv`) and a plot (`cuts.png`).

    Of neighbours that cost the same the table and the plot have the first.

    Args:
        costs: From `cut_costs`.
        output: The folder for the files, which must exist.
        console: Where to print; `None`: standard output.

    Returns:
        The files that were written.
    """
    console = console or Console()
    shown = _without_repeats(costs)
    console.print(costs_table(shown))
    console.print(_LEGEND, highlight=False)
    most = max((cost.uplink_bytes_per_batch for cost in costs), default=0)
    if most:
        console.print(
            f"Each batch also sends the sizes of its tensors: up to {most} bytes.",
            highlight=False,
        )
    if len(shown) < len(costs):
        console.print(
            f"Left out: {len(costs) - len(shown)} with the same costs as the cut "
            "before (cuts.csv has them).",
            highlight=False,
        )
    files = [output / "cuts.csv", output / "cuts.png"]
    write_costs(costs, files[0])
    draw_costs(shown).savefig(files[1], dpi=120)
    for name, file in zip(("table:", "plot: "), files, strict=True):
        print_line(console, f"{name} {file}")
    return files


def costs_table(costs: Sequence[CutCost]) -> Table:
    """Returns a table with a row for each cut; those that none dominates are marked."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cut layer", overflow="fold")
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for cost in costs:
        is_dominated = cost.is_dominated(costs)
        table.add_row(
            Text(cost.cut_layer),
            "" if is_dominated else "*",
            *(short(value(cost)) for value in _COLUMNS.values()),
            style=None if is_dominated else "bold",
        )
    return table


def write_costs(costs: Sequence[CutCost], path: Path) -> None:
    """Writes a row for each cut: the fields of `CutCost`, and whether it is dominated.

    Args:
        costs: The cuts.
        path: The file to write.
    """
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*CutCost._fields, "dominated"])
        rows.writerows([*cost, cost.is_dominated(costs)] for cost in costs)


def _without_repeats(costs: Sequence[CutCost]) -> list[CutCost]:
    """Returns the cuts without those that cost the same as the one before."""
    new = [b for a, b in pairwise(costs) if a[1:] != b[1:]]
    return [*costs[:1], *new]
