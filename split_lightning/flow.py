"""The flow of a step: what its clients, or some of them as one batch, have so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from split_lightning.channel import Activations, Ends
from split_lightning.joint_step import Several, apart


class Bundle(NamedTuple):
    """What some clients of a step have at a place on their routes, as one batch.

    Attributes:
        members: Their places in the step's batch, in ascending order.
        values: The activations of all their samples.
    """

    members: tuple[int, ...]
    values: Activations


class Crossed(NamedTuple):
    """What crossed a cut at once.

    Attributes:
        cut: Which cut.
        ends: Between whom.
        members: The clients' places in the step's batch.
        activations: What was sent.
        smashed: What arrived: detached leaves.
    """

    cut: int
    ends: Ends
    members: tuple[int, ...]
    activations: Several
    smashed: Several


def members_of(flow: Sequence[Bundle]) -> tuple[int, ...]:
    """Returns the clients' places in the step's batch.

    >>> members_of([Bundle((0, 2), None), Bundle((1,), None)])
    (0, 2, 1)
    """
    return tuple(place for bundle in flow for place in bundle.members)


def gathered(flow: Sequence[Bundle], sizes: Sequence[int]) -> list[Activations]:
    """Returns what clients have, in the order of the step's batch.

    Args:
        flow: What they have.
        sizes: Number of samples of each client of the step.

    Returns:
        What is theirs as one batch, or each client's by itself.
    """
    if len(flow) == 1:
        return [flow[0].values]
    parts: dict[int, Activations] = {}
    for members, values in flow:
        own = apart([values], [sizes[place] for place in members])
        parts |= zip(members, own, strict=True)
    return [parts[place] for place in sorted(parts)]


def bundled(members: Sequence[int], outputs: Several) -> list[Bundle]:
    """Returns what clients computed, each by itself or all at once, as bundles."""
    if len(outputs) == len(members):
        pairs = zip(members, outputs, strict=True)
        return [Bundle((place,), own) for place, own in pairs]
    (joint,) = outputs
    return [Bundle(tuple(members), joint)]
