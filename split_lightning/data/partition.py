"""Partition: which client has which samples."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from split_lightning.data.partitioners import may_leave_samples_out

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def partition(
    labels: Tensor,
    partitioner: Partitioner,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[Tensor]:
    """Partitions samples among clients.

    Args:
        labels: The samples' labels, of shape `(N,)`. Partitioners that cut the samples
            in order (IID, quantity skew) take them in this order: shuffle first.
        partitioner: One of `flwr_datasets.partitioner`, new, whose `partition_by` (if
            it has one) is `"label"` or a column.
        columns: Further values of each sample, by name.

    Returns:
        For each client the positions of its samples in `labels`, in ascending order.
        Every sample belongs to exactly one client; to none if the partitioner was told
        to deal fewer out (a warning counts those).

    Raises:
        ValueError: If the partitioner cannot deal these samples out, leaves a client
            without samples, or would lose samples or give them out twice.

    >>> from flwr_datasets.partitioner import IidPartitioner
    >>> partition(torch.tensor([0, 1, 0, 1, 0]), IidPartitioner(num_partitions=2))
    [tensor([0, 1, 2]), tensor([3, 4])]
    """
    from split_lightning.data.rows import Rows

    name = type(partitioner).__name__
    given = {"label": labels.tolist(), **(columns or {})}
    by = getattr(partitioner, "_partition_by", None)
    if by is not None and by not in given:
        raise ValueError(
            f"Expected `partition_by` of {name} (`data.partitioner`) to be one of "
            f"{', '.join(given)}, but got {by!r}. (`data.source` returns columns as "
            "the third field of `Images`.)"
        )
    samples = Rows.from_dict({**given, "index": list(range(len(labels)))})
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            # Retries, unused classes, progress bars: problems are errors below.
            warnings.simplefilter("ignore")
            partitioner.dataset = samples
            num_clients = partitioner.num_partitions
            if num_clients > len(labels):
                raise ValueError(f"there are {num_clients} clients.")
            parts = [
                _positions(partitioner.load_partition(client_id))
                for client_id in range(num_clients)
            ]
    except Exception as error:  # partitioners raise almost anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"{name} cannot deal {len(labels)} samples out: {kind}{error}"
        ) from error
    _verify(parts, labels, name, may_leave_samples_out(partitioner))
    return parts


def label_counts(labels: Tensor, parts: list[Tensor], num_classes: int) -> Tensor:
    """Returns how many samples of each class each client has.

    Args:
        labels: The samples' labels, of shape `(N,)`.
        parts: For each client the positions of its samples.
        num_classes: Number of classes.

    Returns:
        Counts, int64 of shape `(num_clients, num_classes)`.

    >>> parts = [torch.tensor([0, 2]), torch.tensor([1])]
    >>> label_counts(torch.tensor([0, 1, 0]), parts, num_classes=2)
    tensor([[2, 0],
            [0, 1]])
    """
    return torch.stack(
        [torch.bincount(labels[part], minlength=num_classes) for part in parts]
    )


def _positions(samples: Any) -> Tensor:
    """Returns the positions of a client's samples, in ascending order."""
    from split_lightning.data.rows import Rows

    index = samples.index if isinstance(samples, Rows) else samples["index"][:]
    return torch.as_tensor(index, dtype=torch.int64).sort()[0]


def _verify(
    parts: list[Tensor], labels: Tensor, name: str, may_leave_out: bool
) -> None:
    """Checks that each sample belongs to exactly one client, and no client has none."""
    empty = [client_id for client_id, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise ValueError(
            f"{name} leaves client {empty[0]} without samples ({len(empty)} of "
            f"{len(parts)} clients): use fewer clients or a milder skew."
        )
    owners = torch.bincount(torch.cat(parts), minlength=len(labels))
    if (owners == 1).all():
        return
    lost = labels[owners == 0]
    if may_leave_out and (owners <= 1).all():
        warnings.warn(
            f"{name} leaves {len(lost):,} of {len(labels):,} training samples out: no "
            "client has them.",
            stacklevel=2,
        )
        return
    raise ValueError(
        f"Every sample must belong to exactly one client, but {name} gives "
        f"{int((owners > 1).sum())} samples out more than once and loses {len(lost)} "
        f"(of classes {sorted(set(lost.tolist()))}). Let each class, and each shard, "
        "have a client: more classes or shards per client, or more clients."
    )
