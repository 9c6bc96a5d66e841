"""A trace: the operations of a network, and what each of them uses and yields."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from split_lightning.models.proxies import IN_PLACE, MAKERS

# Attributes of a tensor: plain numbers, never samples.
_NUMBER_METHODS = {"size", "dim", "numel", "nelement", "ndimension", "stride"}
_NUMBER_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}
# Operations whose result may share memory with their first input.
_VIEW_FUNCTIONS = {
    "chunk",
    "contiguous",
    "expand",
    "flatten",
    "getitem",
    "movedim",
    "narrow",
    "permute",
    "reshape",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
}
_TUPLE_FUNCTIONS = {"chunk", "split", "tensor_split", "unbind"}
_VIEW_LAYERS = (nn.Flatten, nn.Unflatten)


class Trace:
    """The operations of a network in one mode.

    Args:
        network: The network that the operations are of.
        training: Whether they are those of train mode.
        graph: The operations.
        whole: The layers that are one operation: path and reason.
        takes_raw: Whether it takes raw samples, which may not cross a cut; else what
            it takes has crossed one already, and may cross again.

    Attributes:
        nodes: The operations in order, without the output.
        output: The output.
        ends: The position of the last operation inside each layer, by its path.
        state: What each operation uses that only one side may hold: the parameters,
            and a layer's buffers; identity and path.
        trained: The operations that use parameters.
        views: The operations whose results may share memory with their first input.
        tuples: The operations that yield a tuple, as far as that is known.
        numbers: The operations that yield plain numbers (sizes), never samples.
        changes: What each in-place operation changes. Its result is the same tensor,
            and goes by that name; so does what an operation returns as it is.
    """

    def __init__(
        self,
        network: nn.Module,
        training: bool,
        graph: fx.Graph,
        whole: Mapping[str, str],
        takes_raw: bool = True,
    ) -> None:
        self.graph, self.takes_raw = graph, takes_raw
        self._network, self._whole = network, whole
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.output = next(n for n in reversed(graph.nodes) if n.op == "output")
        self.ends: dict[str, int] = {}
        self.state: dict[fx.Node, dict[int, str]] = {}
        self.trained: set[fx.Node] = set()
        self.views: set[fx.Node] = set()
        self.tuples: set[fx.Node] = set()
        self.numbers: set[fx.Node] = set()
        self.changes: dict[fx.Node, fx.Node] = {}
        for position, node in enumerate(self.nodes):
            for path in accumulate(layer_of(node).split("."), "{}.{}".format):
                self.ends[path] = position
            self.state[node] = _state(network, node)
            if _has_parameters(network, node):
                self.trained.add(node)
            if _is_view(network, node):
                self.views.add(node)
            if _is_tuple(network, node):
                self.tuples.add(node)
            if _is_number(node, self.numbers):
                self.numbers.add(node)
            elif _is_in_place(network, node):
                self.changes[node] = node.all_input_nodes[0]
            if node in self.changes or _is_idle(network, node, training):
                # One tensor: under two names it would cross a cut as two.
                node.replace_all_uses_with(node.all_input_nodes[0])
        written = {self.chain_of(node)[-1].target for node in self.changes.values()}
        for node in self.nodes:
            if node.op == "get_attr" and node.target in written:
                path = str(node.target)  # a buffer that both sides read would differ
                self.state[node] = {id(find(network, path)): path}

    def chain_of(self, node: fx.Node) -> list[fx.Node]:
        """Returns a view and what it is a view of, up to what is none."""
        chain = [node]
        while chain[-1] in self.views:
            chain.append(chain[-1].all_input_nodes[0])
        return chain

    def operation_around(self, path: str) -> str | None:
        """Says which operation a layer is part of, if it is one; else `None`."""
        calls = {str(node.target) for node in self.nodes if node.op == "call_module"}
        above = accumulate(path.split("."), "{}.{}".format)
        for layer in filter(calls.__contains__, above):
            kind = type(self._network.get_submodule(layer)).__name__
            reason = f": {self._whole[layer]}" if layer in self._whole else ""
            return (
                f"would cut through `{layer}` ({kind}), which is one operation{reason}"
            )
        return None


def layer_of(node: fx.Node) -> str:
    """Returns the path of the innermost layer that an operation is in (root: `""`)."""
    if node.target is checkpoint and isinstance(node.args[0], fx.Node):
        return str(node.args[0].target)  # which runs in it
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def is_pick(node: fx.Node) -> bool:
    """Returns whether an operation picks one element, by its number: `x[1]`."""
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and isinstance(node.args[1], int)
    )


def find(network: nn.Module, path: str) -> Any:
    """Returns the layer, parameter or buffer at a path."""
    *parents, name = path.split(".")
    return getattr(network.get_submodule(".".join(parents)), name)


def _state(network: nn.Module, node: fx.Node) -> dict[int, str]:
    """Returns what an operation uses that only one side may hold.

    A buffer that is read by itself (a table of positions) may stand on both sides; a
    layer's buffers (a running mean) may not.
    """
    if node.op not in ("call_module", "get_attr"):
        return {}
    path = str(node.target)
    value = find(network, path)
    if isinstance(value, nn.Module):
        named = [*value.named_parameters(), *value.named_buffers()]
        return {id(tensor): f"{path}.{name}" for name, tensor in named}
    return {id(value): path} if isinstance(value, nn.Parameter) else {}


def _has_parameters(network: nn.Module, node: fx.Node) -> bool:
    if node.op not in ("call_module", "get_attr"):
        return False
    value = find(network, str(node.target))
    if isinstance(value, nn.Module):
        return next(value.parameters(), None) is not None
    return isinstance(value, nn.Parameter)


def _is_view(network: nn.Module, node: fx.Node) -> bool:
    """Returns whether an operation's result may share memory with its first input."""
    if node.op == "call_module":
        return isinstance(find(network, str(node.target)), _VIEW_LAYERS)
    name = getattr(node.target, "__name__", node.target)
    return node.op in ("call_method", "call_function") and name in _VIEW_FUNCTIONS


def _is_tuple(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        layer = find(network, str(node.target))
        return isinstance(layer, nn.RNNBase | nn.MultiheadAttention)
    name = getattr(node.target, "__name__", node.target)
    return node.op in ("call_method", "call_function") and name in _TUPLE_FUNCTIONS


def _is_idle(network: nn.Module, node: fx.Node, training: bool) -> bool:
    """Returns whether an operation returns its first input unchanged."""
    if node.op == "call_module":
        layer = find(network, str(node.target))
        drops = isinstance(layer, nn.modules.dropout._DropoutNd)
        return isinstance(layer, nn.Identity) or (drops and not training)
    name = getattr(node.target, "__name__", "")
    is_dropout = node.op == "call_function" and "drop" in name
    return is_dropout and _option(node, "training") is False


def _is_in_place(network: nn.Module, node: fx.Node) -> bool:
    """Returns whether an operation returns its first input, changed."""
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        layer = find(network, str(node.target))
        of_torch = type(layer).__module__.startswith("torch.nn")
        return of_torch and getattr(layer, "inplace", False) is True
    if node.op == "call_method":
        return _ends_in_one_underscore(str(node.target))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if name in IN_PLACE and node.target is getattr(operator, name):
        return True  # `x += y` and its like
    return _ends_in_one_underscore(name) or _option(node, "inplace") is True


def _ends_in_one_underscore(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _option(node: fx.Node, name: str) -> Any:
    """Returns what a function is called with, by name, or `None`."""
    assert callable(node.target)
    try:
        signature = inspect.signature(node.target)
        return signature.bind(*node.args, **node.kwargs).arguments.get(name)
    except (TypeError, ValueError):  # builtins: their in-place names end in `_`
        return node.kwargs.get(name)


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Returns whether an operation yields plain numbers, given the earlier that do."""
    if node.op == "call_method" and node.target in _NUMBER_METHODS:
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr and node.args[1] in _NUMBER_ATTRIBUTES:
        return True
    if node.target in MAKERS and node.target is not torch.finfo:
        return False  # tensors, made of numbers
    inputs = node.all_input_nodes
    return bool(inputs) and numbers.issuperset(inputs)
