"""The route of a batch: which party computes which stretch of the network."""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple, TypeAlias

Party: TypeAlias = Literal["client", "server"]


class Stage(NamedTuple):
    """A stretch of the network, from one cut to the next, at the party that holds it.

    Attributes:
        party: Who computes it.
        stretch: Which stretch of the party's segment it is, from 0.
        is_cut: Whether what is behind it is another party's.
    """

    party: Party
    stretch: int
    is_cut: bool = True

    @property
    def name(self) -> str:
        """A name of its own: `client`, `server`, `client_2`."""
        return self.party if not self.stretch else f"{self.party}_{self.stretch + 1}"


def route_of(num_cuts: int, labels: Party) -> tuple[Stage, ...]:
    """Returns who computes what, in the order of the network.

    A client computes up to the first cut, servers from there on; behind the last cut
    computes whoever has the labels, and with them the loss.

    Args:
        num_cuts: Number of cuts.
        labels: Who has the labels in training: the `server`, to which clients send
            them, or the `client` alone.

    Raises:
        ValueError: If there are too few cuts for a server between two of them.

    >>> [stage.name for stage in route_of(2, "client")]
    ['client', 'server', 'client_2']
    """
    if labels == "client" and num_cuts < 2:
        raise ValueError(
            "Expected argument `cut_layer` to name at least two layers where labels "
            "stay with the clients: the server's part is what is between the first and "
            f"the last; but got {num_cuts}."
        )
    between: list[Party] = ["server"] * (num_cuts - 1)
    passed: Counter[Party] = Counter()
    stages = []
    for party in ("client", *between, labels):
        stages.append(Stage(party, passed[party]))
        passed[party] += 1
    return tuple(stages)
