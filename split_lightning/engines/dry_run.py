"""A dry run: the messages of steps, with their sizes, and no numbers computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from split_lightning.channel import Channel
from split_lightning.engines.engine import Engine
from split_lightning.engines.meta import MetaParty
from split_lightning.step import Batch, Member, Route, split_step
from split_lightning.system.work import Measured, measure


def measure_segments(engine: Engine, example: Tensor) -> list[Measured]:
    """Measures each segment of an engine's network.

    Args:
        engine: The engine.
        example: One sample `(1, ...)`, as the network gets it.
    """
    found: dict[int, Measured] = {}
    placement = engine.placement
    alike = {placement.layout_number(k): k for k in range(placement.num_clients)}
    for client in alike.values():
        depths: list[list[int]] = [[] for _ in range(engine.num_depths)]
        for number, name in enumerate(placement.of(client)):
            if name is not None:
                depths[engine.stores[number].depth].append(number)
        modules = [
            [engine.stores[number].seats[0].module for number in own] for own in depths
        ]
        for numbers, measured in zip(depths, measure(modules, example), strict=True):
            found |= zip(numbers, measured, strict=True)
    return [found[number] for number in range(len(engine.stores))]


def dry_step(
    engine: Engine,
    measured: Sequence[Measured],
    samples: Mapping[int, int],
    channel: Channel,
) -> None:
    """Sends the messages of a training step of some clients, without numbers.

    Args:
        engine: The engine of these parties.
        measured: What each segment sends.
        samples: Number of samples of each client.
        channel: Delivers the messages.
    """
    outputs = {
        id(seat.module): own.outputs
        for store, own in zip(engine.stores, measured, strict=True)
        for seat in store.seats
    }
    new_party = partial(MetaParty, lambda module: outputs[id(module)])
    parties: dict[str, Any] = {}
    members: list[list[Member]] = [[] for _ in range(engine.num_depths)]
    for position, client in enumerate(samples):
        for number, name in enumerate(engine.placement.of(client)):
            if name is not None:
                store = engine.stores[number]
                party = parties.setdefault(name, new_party(name, {}))
                party.segments[store.depth] = store.seats[0]
                members[store.depth].append(Member(position, name, number))
    route = Route(
        [engine.visits(own, parties) for own in members],
        [engine.way_of_labels(client) for client in samples],
    )
    batches = [
        Batch(
            torch.empty(count, device="meta"),
            torch.empty(count, dtype=torch.int64, device="meta"),
        )
        for count in samples.values()
    ]
    split_step(0, batches, route, channel)
