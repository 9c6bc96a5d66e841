"""Partitioners: by name, as a class, a partial or an instance."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

    # A name, a class, a partial, or an instance that has no data set yet.
    PartitionerLike: TypeAlias = str | Callable[..., Partitioner] | Partitioner


def new_partitioner(given: PartitionerLike | None, num_clients: int) -> Partitioner:
    """Returns a partitioner that has no data set yet.

    Args:
        given: A class of `flwr_datasets.partitioner` or its name (`"iid"`,
            `"IidPartitioner"`), a partial of one, or an instance, which is copied;
            `None`: IID.
        num_clients: Passed on as `num_partitions` if the partitioner takes it.

    Raises:
        ValueError: If there is no such partitioner, its options are out of range, or
            it divides features instead of samples.
    """
    from flwr_datasets import partitioner as flwr

    if given is None:
        given = flwr.IidPartitioner
    if isinstance(given, str):
        given = _class_of(given)
    if isinstance(given, flwr.Partitioner):
        if given.is_dataset_assigned():
            raise ValueError(
                f"Expected `data.partitioner` to have no data set yet, but got a "
                f"{type(given).__name__} that has one. Build a new one."
            )
        made = copy.deepcopy(given)
    elif callable(given):
        made = _built(given, num_clients)
    else:
        raise ValueError(
            "Expected `data.partitioner` to be a partitioner of flwr-datasets, a "
            f"partial of one, or its name, but got an object of type "
            f"{type(given).__name__}."
        )
    if isinstance(made, flwr.VerticalEvenPartitioner | flwr.VerticalSizePartitioner):
        raise ValueError(
            "Expected `data.partitioner` to divide samples among clients, but got "
            f"{type(made).__name__}, which divides features. Use topology=vertical."
        )
    return made


def may_leave_samples_out(partitioner: Partitioner) -> bool:
    """Returns whether a partitioner may be told to leave samples out."""
    from flwr_datasets import partitioner as flwr

    told = (
        flwr.DistributionPartitioner,
        flwr.GroupedNaturalIdPartitioner,
        flwr.InnerDirichletPartitioner,
        flwr.ShardPartitioner,
        flwr.SizePartitioner,
    )
    return isinstance(partitioner, told)


def _class_of(name: str) -> Callable[..., Partitioner]:
    """Returns the partitioner of a name: `natural_id`, `NaturalIdPartitioner`."""
    from flwr_datasets import partitioner as flwr

    classes = {_short(own): getattr(flwr, own) for own in flwr.__all__}
    del classes[""]  # the base class
    if _short(name) not in classes:
        raise ValueError(
            "Expected `data.partitioner` to be the name of a partitioner of "
            f"flwr-datasets ({', '.join(sorted(classes))}), but got {name!r}."
        )
    made: Callable[..., Partitioner] = classes[_short(name)]
    return made


def _short(name: str) -> str:
    return name.lower().replace("_", "").removesuffix("partitioner")


def _built(make: Any, num_clients: int) -> Partitioner:
    """Builds a partitioner; options that are tables become arrays."""
    options = dict(getattr(make, "keywords", {}))
    for name, value in options.items():  # not every partitioner checks its own
        if name.startswith("num_") and isinstance(value, int) and value < 1:
            raise ValueError(
                f"Expected argument `{name}` to be a positive integer, but got {value}."
            )
    given: dict[str, Any] = {
        name: np.asarray(value)
        for name, value in options.items()
        if isinstance(value, list) and value and isinstance(value[0], list)
    }
    if "num_partitions" in _parameters(make):
        given["num_partitions"] = num_clients
    try:
        made: Partitioner = make(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected argument `partitioner` to have valid options, but got {options}"
            f": {error}"
        ) from error
    return made


def _parameters(make: Any) -> list[str]:
    """Returns what a class, a function or a partial takes by name."""
    parameters = inspect.signature(make).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return ["num_partitions"]
    return [p.name for p in parameters]
