"""A trace: the operations of a network, and what each of them uses and yields."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

from torch import fx, nn

from split_lightning.models.tracer import trace_graph

# What a tensor tells of itself: plain numbers, never samples.
_NUMBER_METHODS = {"size", "dim", "numel", "nelement", "ndimension", "stride"}
_NUMBER_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}
# Operations whose result may share memory with their first input.
_VIEW_FUNCTIONS = {
    "expand",
    "flatten",
    "movedim",
    "permute",
    "reshape",
    "squeeze",
    "swapaxes",
    "transpose",
    "unsqueeze",
    "view",
}
_VIEW_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten)


class Trace:
    """The operations of a network in one mode.

    Args:
        network: The network. Tensors that it makes in passing become attributes of it
            (`_tensor_constant0`): pass a copy.
        training: Whether to trace it in train mode: `self.training` becomes a constant
            of a trace, as in `F.dropout(x, training=self.training)`.

    Attributes:
        nodes: The operations in order, without the output.
        output: The output.
        ends: The position of the last operation inside each layer, by its path.
        state: What each operation uses that only one side may hold: the parameters,
            and a layer's buffers; identity and path.
        trained: The operations that use parameters.
        views: The operations whose results may share memory with their first input.
        numbers: The operations that yield plain numbers (sizes), never samples.
        raw: The operations whose results come from the inputs through no parameter.

    Raises:
        ValueError: If `torch.fx` cannot trace the network; says what stopped it.
    """

    def __init__(self, network: nn.Module, training: bool) -> None:
        graph = trace_graph(network, training)
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.output = next(n for n in reversed(graph.nodes) if n.op == "output")
        self.ends: dict[str, int] = {}
        self.state: dict[fx.Node, dict[int, str]] = {}
        self.trained: set[fx.Node] = set()
        self.views: set[fx.Node] = set()
        self.numbers: set[fx.Node] = set()
        self.raw: set[fx.Node] = set()
        weighted: set[fx.Node] = set()
        for position, node in enumerate(self.nodes):
            for path in accumulate(layer_of(node).split("."), "{}.{}".format):
                self.ends[path] = position
            inputs = set(node.all_input_nodes)
            self.state[node] = _state(network, node)
            if _has_parameters(network, node):
                self.trained.add(node)
            if _is_view(network, node):
                self.views.add(node)
            if _is_number(node, self.numbers):
                self.numbers.add(node)
            if node in self.trained or weighted & inputs:
                weighted.add(node)
            elif node.op == "placeholder" or self.raw & inputs - self.numbers:
                self.raw.add(node)
        self.raw -= self.numbers


def layer_of(node: fx.Node) -> str:
    """Returns the path of the innermost layer that an operation is in (root: `""`)."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def is_pick(node: fx.Node) -> bool:
    """Tells whether an operation picks one element, by its number: `x[1]`."""
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
    """Tells whether an operation's result may share memory with its first input."""
    if node.op == "call_module":
        layer = find(network, str(node.target))
        is_idle = (
            isinstance(layer, nn.modules.dropout._DropoutNd) and not layer.training
        )
        return isinstance(layer, _VIEW_LAYERS) or is_idle
    name = getattr(node.target, "__name__", node.target)
    return node.op in ("call_method", "call_function") and name in _VIEW_FUNCTIONS


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Tells whether an operation yields plain numbers, given the earlier that do."""
    if node.op == "call_method" and node.target in _NUMBER_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _NUMBER_ATTRIBUTES
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and numbers.issuperset(inputs)
