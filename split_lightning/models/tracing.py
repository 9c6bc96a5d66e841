"""Tracing: a network's operations, with the layers that are one operation each."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple, cast

from torch import fx, nn

from split_lightning.models.proxies import true_to_tensors
from split_lightning.models.side_effects import Watch
from split_lightning.models.tracer import LayerTracer
from split_lightning.random_state import random_state, set_random_state

_logger = logging.getLogger(__name__)


class Traced(NamedTuple):
    """What a network does.

    Attributes:
        network: A copy of the network, which the graphs are of.
        graphs: The operations in train mode (`True`) and in eval mode.
        whole: The layers that are one operation: path and reason.
    """

    network: nn.Module
    graphs: dict[bool, fx.Graph]
    whole: dict[str, str]


def traced(network: nn.Module) -> Traced:
    """Returns the operations of a network, which is left as it is.

    A layer that `torch.fx` cannot trace, or that changes something in its forward that
    a trace would not change (attributes, buffers, random numbers of Python), becomes
    one operation: it runs as it is.

    Arguments of the network's `forward` that have defaults keep them, unless all have
    one: then the first is the input.

    Raises:
        ValueError: If the network is one layer of torch, or its own `forward` is such a
            layer; names the line.
    """
    network = uncompiled(network)
    is_of_torch = type(network).__module__.startswith("torch.nn.")
    if is_of_torch and not any(True for _ in network.children()):
        raise ValueError(
            "Expected argument `network` to have layers, to be cut between them, but "
            f"got {type(network).__name__}, which is one layer."
        )
    whole = dict[str, str]()
    while True:
        found, own = dict(whole), copy.deepcopy(network)
        graphs, changes = _graphs(own, found)
        if found == whole and changes:
            own = copy.deepcopy(network)
            again, _ = _graphs(own, found, by_layer=True)  # the layers that change
            # What changes once for all is of no layer: a cache may, but not a switch.
            if found == whole and _text(again) != _text(graphs):
                found[""] = f"it changes {', '.join(dict.fromkeys(changes))}"
        if "" in found:
            raise ValueError(_message(network, found[""]))
        if found == whole:
            return Traced(own, graphs, whole)
        whole = found


def uncompiled(network: nn.Module) -> nn.Module:
    """Returns the network that `torch.compile` has wrapped, or the network itself."""
    if type(network).__name__ != "OptimizedModule":  # importing its class is slow
        return network
    _logger.warning(
        "The segments of %s are not compiled: `torch.compile` was for all of it.",
        type(network._orig_mod).__name__,
    )
    return cast(nn.Module, network._orig_mod)


def _graphs(
    network: nn.Module, whole: dict[str, str], by_layer: bool = False
) -> tuple[dict[bool, fx.Graph], list[str]]:
    """Returns the operations in both modes, and the names of what has changed.

    Adds to the layers that are one operation, those that change something included if
    this is to be found by layer. What is returned is of use only if none was added.
    """
    modes = {module: module.training for module in network.modules()}
    state = random_state()
    graphs, changes, watch = dict[bool, fx.Graph](), list[str](), Watch(network)
    try:
        for training in (True, False):
            network.train(training)
            watch.changes()  # the mode
            tracer = LayerTracer(network, whole, watch if by_layer else None)
            with true_to_tensors(tracer):
                graphs[training] = tracer.trace(network)
            changes += watch.changes()
    except Exception as error:
        if "" not in whole:
            whole[""] = f"{type(error).__name__}: {error}"
    finally:
        for module, mode in modes.items():
            module.training = mode
        set_random_state(state)
    return graphs, changes


def _text(graphs: dict[bool, fx.Graph]) -> list[str]:
    return [str(graph) for graph in graphs.values()]


def _message(network: nn.Module, reason: str) -> str:
    return (
        f"Expected argument `network` to have a `forward` that torch.fx can trace, but "
        f"that of {type(network).__name__} cannot be: {reason}. Move what the message "
        "names into a layer of its own (an `nn.Module` that `forward` calls): such a "
        "layer runs as it is, as one operation."
    )
