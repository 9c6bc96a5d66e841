"""Fitness: whether a network and data fit each other, before any training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from split_lightning.data.datamodule import SplitDataModule
from split_lightning.message import as_values
from split_lightning.protocols.least_batch import LeastBatch
from split_lightning.random_state import unchanged_random_state
from split_lightning.user_code import described

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule


def check_network(module: SplitLightningModule, data: SplitDataModule) -> None:
    """Stops where the network does not take the data, or returns other than logits.

    Raises:
        ValueError: Says what it was given, and what it returned.
    """
    inputs, num_classes = data.extremes(), len(data.classes)
    stages = copy.deepcopy(list(module.stages().values()))
    logits = module.task.logits(_run(stages, module, inputs))
    if not isinstance(logits, Tensor):
        raise ValueError(
            "Expected the network (`model.network`) to return one tensor of logits, "
            f"but got an object of type {type(logits).__name__}."
        )
    if logits.shape != (2, num_classes):
        raise ValueError(
            f"Expected the network (`model.network`) to return {num_classes} logits, "
            f"as many as `data` has classes, but got {tuple(logits.shape[1:])}."
        )


def set_least_batch(
    module: SplitLightningModule, data: SplitDataModule, world_size: int
) -> LeastBatch:
    """Sets the smallest batch of a data module by the network.

    Args:
        module: The module.
        data: The data, partitioned.
        world_size: Number of processes that share a batch out.

    Raises:
        ValueError: If a client has too few samples, or `batch_size` is too small.
    """
    data.least = _least_batch(module, data.extremes(), world_size)
    _require_enough(data)
    return data.least


def _least_batch(
    module: SplitLightningModule, inputs: Tensor, world_size: int
) -> LeastBatch:
    """Returns how many samples BatchNorm needs to see more than one value."""
    single = _single_valued(module, inputs)
    if not single:
        return LeastBatch()
    needed = 2 * world_size
    engine = module.engine
    at_clients = [
        layer
        for store in engine.stores
        for seat in store.seats
        if seat.role == "client"
        for layer in seat.module.modules()
        if layer in single
    ]
    own = needed if at_clients and not engine.joint_norm else 1
    layer = (at_clients or single)[0]
    names = {id(own): name for name, own in module.named_modules()}
    path = names.get(id(layer), "").partition(".")[2].partition(".")[2]
    return LeastBatch(needed, own, path or type(layer).__name__)


def _single_valued(module: SplitLightningModule, inputs: Tensor) -> list[nn.Module]:
    """Returns the BatchNorm layers that see one value per channel for a sample."""
    found: list[nn.Module] = []

    def note(layer: nn.Module, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0].numel() <= len(inputs) * args[0].shape[1]:
            found.append(layer)

    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    if not norms:
        return []
    placement = module.engine.placement
    clients = {placement.layout_number(k): k for k in range(placement.num_clients)}
    for client_id in clients.values():
        copies: dict[int, Any] = {}
        stages = copy.deepcopy(list(module.stages(client_id).values()), copies)
        for layer in norms:
            if id(layer) in copies:
                hook = partial(note, layer)
                copies[id(layer)].register_forward_pre_hook(hook)
        _run(stages, module, inputs)
    return found


def _run(
    stages: Iterable[nn.Module], module: SplitLightningModule, inputs: Tensor
) -> Any:
    """Returns what stages compute in eval mode; a pass may change these copies.

    Raises:
        ValueError: If they do not take the inputs.
    """
    values: Any = module.fed(inputs)
    try:
        with torch.no_grad(), unchanged_random_state():
            for stage in stages:
                values = stage.eval()(*as_values(values))
    except Exception as error:  # a network may raise anything
        raise _unfit(inputs, error) from error
    return values


def _require_enough(data: SplitDataModule) -> None:
    """Stops where batches cannot be made large enough."""
    least, protocol, batch_size = data.least, data.protocol, data.batch_size
    if least.is_trivial:
        return
    sizes = [len(part) for part in data.partition()]
    why = (
        f"BatchNorm (`{least.layer}`) normalises one value per channel of a sample, "
        "and cannot train on one alone"
    )
    are_drawn = protocol.draws_samples
    for_each = not protocol.together or least.own > 1
    if (for_each or are_drawn) and batch_size < least.total:
        raise ValueError(
            f"Expected argument `batch_size` to be at least {least.total}, since "
            f"{why}; but got {batch_size}. Use larger batches or GroupNorm."
        )
    small = [k for k, size in enumerate(sizes) if size < least.total]
    if (for_each and small) or sum(sizes) < least.total:
        client_id = small[0]
        raise ValueError(
            f"Expected each client to train on at least {least.total} samples, since "
            f"{why}; but client {client_id} has {sizes[client_id]} ({len(small)} of "
            f"{len(sizes)} clients have too few). Use fewer clients, a milder skew "
            "(`min_partition_size` of `data.partitioner`), a smaller `val_share`, or "
            "GroupNorm."
        )


def _unfit(inputs: Tensor, error: Exception) -> ValueError:
    shape = tuple(inputs.shape[1:])
    kind = "samples" if inputs.is_floating_point() else "ids (int64)"
    remedies = {
        (1, False): " Integers (N, L) are ids: return a table of numbers as floats.",
        (2, True): " Give images a channel axis: `inputs.unsqueeze(1)`.",
    }
    remedy = remedies.get((len(shape), inputs.is_floating_point()), "")
    return ValueError(
        f"Expected the network (`model`) to take {kind} of shape {shape}, as `data` "
        f"has them, but: {described(error)}{remedy}"
    )
