"""Symbolic tracing: a network as a list of operations, each with the layer it is in."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

from torch import fx, nn

# What a tensor tells of itself: plain numbers, never samples.
_NUMBER_METHODS = {"size", "dim", "numel", "stride"}
_NUMBER_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}


class LayerTracer(fx.Tracer):
    """A `torch.fx` tracer that remembers which layer it could not see through."""

    stopped_in: str = ""

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Traces one layer, and notes the innermost one that fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stopped_in = self.stopped_in or self.path_of_module(m)
            raise


class Trace:
    """The operations of a network in one mode, and what each of them uses.

    Args:
        network: The network. Tensors that it makes in passing become attributes of it
            (`_tensor_constant0`): pass a copy.
        training: Whether to trace it in train mode: `self.training` becomes a constant
            of a trace, as in `F.dropout(x, training=self.training)`.

    Attributes:
        nodes: The operations in order, without the output.
        output: The output.
        ends: The position of the last operation inside each layer, by its path.
        parameters: The parameters that each operation uses, and its layer's buffers:
            identity and path.
        numbers: The operations that yield plain numbers (sizes), never samples.
        weighted: The operations whose results have passed through parameters.

    Raises:
        ValueError: If `torch.fx` cannot trace the network; says what stopped it.
    """

    def __init__(self, network: nn.Module, training: bool) -> None:
        graph = _trace(network, training)
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.output = next(n for n in reversed(graph.nodes) if n.op == "output")
        self.ends: dict[str, int] = {}
        self.parameters: dict[fx.Node, dict[int, str]] = {}
        self.numbers: set[fx.Node] = set()
        self.weighted: set[fx.Node] = set()
        for position, node in enumerate(self.nodes):
            for path in accumulate(layer_of(node).split("."), "{}.{}".format):
                self.ends[path] = position
            self.parameters[node] = _parameters(network, node)
            if _is_number(node, self.numbers):
                self.numbers.add(node)
            if self.parameters[node] or self.weighted & set(node.all_input_nodes):
                self.weighted.add(node)


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


def _trace(network: nn.Module, training: bool) -> fx.Graph:
    modes = {module: module.training for module in network.modules()}
    tracer = LayerTracer()
    try:
        return tracer.trace(network.train(training))
    except Exception as error:
        inside = f" in its layer `{tracer.stopped_in}`" if tracer.stopped_in else ""
        raise ValueError(
            "Expected argument `network` to be a network that torch.fx can trace, but "
            f"tracing {type(network).__name__} stopped{inside}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _parameters(network: nn.Module, node: fx.Node) -> dict[int, str]:
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


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Tells whether an operation yields plain numbers, given the earlier that do."""
    if node.op == "call_method" and node.target in _NUMBER_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _NUMBER_ATTRIBUTES
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and numbers.issuperset(inputs)
