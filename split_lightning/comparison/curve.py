"""The curve of a group of runs: mean validation accuracy by round, samples, bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from split_lightning.comparison.group import RunGroup
from split_lightning.comparison.run_folder import Figures, total_bytes

Position: TypeAlias = Callable[[Figures], float | None]


class Point(NamedTuple):
    """A point of a curve, with its standard deviation; 0 where there is none."""

    x: float
    y: float
    deviation: float


def by_round(row: Figures) -> float | None:
    """Returns the round."""
    return row.get("round")


def by_samples(row: Figures) -> float | None:
    """Returns the number of images trained on so far."""
    return row.get("images")


def by_bytes(row: Figures) -> float | None:
    """Returns the number of bytes that have travelled so far."""
    return total_bytes(row)


def by_virtual_seconds(row: Figures) -> float | None:
    """Returns the virtual seconds so far."""
    return row.get("virtual_seconds")


def curve(group: RunGroup, position: Position) -> list[Point]:
    """Returns mean validation accuracies; rounds that were not validated have none.

    Args:
        group: The runs.
        position: Where a round lies: `by_round`, `by_samples`, `by_bytes` or
            `by_virtual_seconds`. If that is
            0 throughout, as bytes are where nothing travels, there is no curve.
    """
    points = [
        Point(x, y, deviations.get("val_accuracy") or 0.0)
        for means, deviations in group.history()
        if (x := position(means)) is not None
        and (y := means.get("val_accuracy")) is not None
    ]
    return points if any(point.x for point in points) else []
