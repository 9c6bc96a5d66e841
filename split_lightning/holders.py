"""Holders: a client that is a group of parties, each with a part of its samples."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from split_lightning.batch_norm import Normalisation
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.kinds import Stop
from split_lightning.models.segment import Segment
from split_lightning.models.vertical import Holders


def fan_in_of(holders: Holders) -> list[int]:
    """Returns how many values each holder sends at the first cut; none for one.

    The second value says which samples it has.

    >>> fan_in_of(Holders())
    []
    """
    if holders.parts is None:
        return []
    return [1 if holders.missing is None else 2] * holders.number


def stretches_of_holders(
    route: Sequence[Stop], label_holder: int = 0
) -> list[list[int]]:
    """Returns for each holder which stretches of the client's segment it computes.

    Args:
        route: Who computes what.
        label_holder: Who has the labels, and computes what is behind the last cut where
            they stay with the client.

    >>> lower = Stop("client", "client", 0, is_cut=True, num_holders=3)
    >>> head = Stop("client", "client", 3, is_cut=False)
    >>> stretches_of_holders([lower, head], label_holder=1)
    [[0], [1, 3], [2]]
    """
    first, *others = (stop for stop in route if stop.party == "client")
    found = [[stretch] for stretch in first.stretches]
    for stop in others:
        found[label_holder] += stop.stretches
    return found


def parameters_by_holder(
    segments: Sequence[nn.Module], stretches: Sequence[Sequence[int]]
) -> list[list[nn.Parameter]]:
    """Returns the parameters of each of a client's holders.

    Args:
        segments: What the client holds: one segment, if it is a group of holders.
        stretches: For each holder which stretches of it are its own.
    """
    if len(stretches) == 1:
        return [[p for segment in segments for p in segment.parameters()]]
    (segment,) = segments
    assert isinstance(segment, Segment)
    return [segment.parameters_of(*own) for own in stretches]


def require_parts(
    holders: Holders,
    trainer: pl.Trainer,
    data: pl.LightningDataModule | None,
    batch_norm: Normalisation,
) -> None:
    """Stops where something does not go with a network for holders of parts.

    Raises:
        MisconfigurationException: Says what to change.
    """
    if holders.missing is not None and batch_norm == "joint":
        raise MisconfigurationException(
            "Expected argument `batch_norm` to be 'own' where holders lack samples "
            f"(missing={holders.missing!r}): those of a client are not there with the "
            "same samples. Got 'joint' (in a configuration "
            "`protocol.module.batch_norm`)."
        )
    if not isinstance(data, SplitDataModule):
        return
    lacking = data.missing_parts
    if holders.parts is not None and data.augmentation is not None:
        raise MisconfigurationException(
            f"{type(data.augmentation).__name__} changes whole images, and here nobody "
            "has one: it would move pixels from one holder to another. Leave the "
            "augmentation out (`data/augmentation=none`)."
        )
    if lacking.is_trivial:
        return
    if holders.missing is None:
        raise MisconfigurationException(
            f"With {lacking!r} holders lack samples, and the network has no rule for "
            "that. Give `VerticalNetwork` or `vertical_network` one (`missing='zeros'` "
            "or 'skip'; in a configuration `topology.missing`), or leave it out."
        )
    if repr(lacking.parts) != repr(holders.parts):
        raise MisconfigurationException(
            f"Holders lack samples by {lacking.parts!r}, and the network is one for "
            f"{holders.parts!r}. Give both the same `parts`."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"{trainer.world_size} processes share out each batch, and a holder that "
            "lacks all of one process's samples would have no gradient there. Use one "
            "device: Trainer(devices=1, strategy='auto')."
        )
