"""`Stage`: segments that one party, or holders side by side, compute at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class Stage(nn.Module):
    """Segments from one cut to the next, as one module.

    Args:
        depths: For each depth in the network, in order, the segments there. Those of
            one depth compute side by side, each from the same inputs.
    """

    def __init__(self, depths: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(own for depth in depths for own in depth)
        self._widths = [len(depth) for depth in depths]

    def forward(self, *inputs: Any) -> Any:
        """Returns what the segments of the last depth return, in a tuple if several."""
        results: Any = inputs
        segments = iter(self.segments)
        for width in self._widths:
            values = results if isinstance(results, tuple) else (results,)
            found = [next(segments)(*values) for _ in range(width)]
            results = found[0] if width == 1 else tuple(_flat(found))
        return results


def stage_of(depths: Sequence[Sequence[nn.Module]]) -> nn.Module:
    """Returns a stage; of a single segment the segment itself."""
    if len(depths) == 1 and len(depths[0]) == 1:
        return depths[0][0]
    return Stage(depths)


def _flat(several: Sequence[Any]) -> list[Any]:
    tuples = [own if isinstance(own, tuple) else (own,) for own in several]
    return [value for own in tuples for value in own]
