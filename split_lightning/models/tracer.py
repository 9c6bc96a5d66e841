"""A `torch.fx` tracer that is true to the network, or says what stopped it."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn

IN_PLACE = (
    "iadd",
    "iand",
    "ifloordiv",
    "imod",
    "imul",
    "ior",
    "ipow",
    "isub",
    "itruediv",
    "ixor",
)


class InPlaceProxy(fx.Proxy):
    """A value of a trace for which `x += y` stays in place, as it is for a tensor."""


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def apply(self: InPlaceProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in IN_PLACE:
    setattr(InPlaceProxy, f"__{_name}__", _in_place(_name))


class Leaf(nn.Module):
    """A layer that a trace takes as one operation, whatever it does.

    What it does may depend on values, and need not be traceable.
    """


class LayerTracer(fx.Tracer):
    """Traces a network; refuses what a trace would silently lose.

    Buffers are read when the trace runs, not when it is made. Switches of autograd and
    autocast leave no operation behind, so that they cannot be traced.

    Attributes:
        stopped_in: The path of the innermost layer that could not be traced.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.stopped_in = ""
        self._modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds an operation, if it runs in the modes in which tracing began."""
        if _modes() != self._modes:
            raise RuntimeError("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tells whether a layer is one operation."""
        return isinstance(m, Leaf) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Returns what stands for the result of an operation."""
        return InPlaceProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Traces one layer, and notes the innermost one that fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stopped_in = self.stopped_in or self.path_of_module(m)
            raise


def trace_graph(network: nn.Module, training: bool) -> fx.Graph:
    """Returns the operations of a network in train or in eval mode.

    Arguments of the network's `forward` that have defaults keep them.

    Raises:
        ValueError: If `torch.fx` cannot trace the network; says what stopped it.
    """
    modes = {module: module.training for module in network.modules()}
    random_state = torch.get_rng_state()
    tracer = LayerTracer()
    try:
        graph = _traced(tracer, network.train(training))
        if not torch.equal(random_state, torch.get_rng_state()):
            raise RuntimeError("it draws random numbers of a fixed size")
        return graph
    except Exception as error:
        inside = f" in its layer `{tracer.stopped_in}`" if tracer.stopped_in else ""
        raise ValueError(
            "Expected argument `network` to be a network that torch.fx can trace, but "
            f"tracing {type(network).__name__} stopped{inside}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_rng_state(random_state)
        for module, mode in modes.items():
            module.training = mode


def _traced(tracer: LayerTracer, network: nn.Module) -> fx.Graph:
    parameters = inspect.signature(network.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if not defaults:
        return tracer.trace(network)
    graph = tracer.trace(network, concrete_args=defaults)
    # What is fixed is still an input, guarded by assertions on its value: both go.
    graph.set_codegen(fx.graph.CodeGen())
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reversed(inputs[len(parameters) - len(defaults) :]):
        for guard in [user for test in node.users for user in test.users]:
            graph.erase_node(guard)
        for test in [*node.users]:
            graph.erase_node(test)
        graph.erase_node(node)
    return graph


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
