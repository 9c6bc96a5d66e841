"""Values of a trace, for which functions do as they do for tensors."""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

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
# Functions of torch that make tensors from sizes, which a trace does not know. Those in
# the second row draw random numbers, anew each time.
_MAKERS = [
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "finfo",
    "full",
    "linspace",
    "ones",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
]
_DRAWS = ["normal", "rand", "randint", "randn", "randperm"]
MAKERS = frozenset(getattr(torch, name) for name in (*_MAKERS, *_DRAWS))
RANDOM = frozenset(getattr(torch, name) for name in _DRAWS)


class InPlaceProxy(fx.Proxy):
    """A value of a trace for which `x += y` stays in place, as it is for a tensor.

    What it cannot record, the assignment of an attribute, it refuses.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise fx.proxy.TraceError(f"it assigns the attribute `{name}` of a tensor")
        super().__setattr__(name, value)


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def apply(self: InPlaceProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in IN_PLACE:
    setattr(InPlaceProxy, f"__{_name}__", _in_place(_name))


@contextmanager
def true_to_tensors(tracer: fx.Tracer) -> Iterator[None]:
    """Within it, functions do with the values of a trace as they do with tensors.

    `isinstance` takes those that are known to be tensors for such. (Not by their
    `__class__`: torch would take them for tensors in memory.)
    """
    original, example = builtins.isinstance, torch.empty(0)

    def answer(value: Any, kinds: Any) -> bool:
        if type(value) is InPlaceProxy:
            asking = sys._getframe(1).f_globals.get("__name__", "")
            if not asking.startswith("torch.") and _is_tensor(tracer, value.node):
                value = example
        return original(value, kinds)

    builtins.isinstance = answer
    try:
        with _RandomNumbers(tracer):
            yield
    finally:
        builtins.isinstance = original


class _RandomNumbers(TorchFunctionMode):
    """Within it, torch's random numbers of a fixed size are an operation of a trace."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in RANDOM:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _is_tensor(tracer: Any, node: fx.Node) -> bool:
    """Returns whether an operation yields a tensor; `False` where that is unknown."""
    if node.op == "call_module":
        layer = tracer.root.get_submodule(node.target)
        several = isinstance(layer, nn.RNNBase | nn.MultiheadAttention)
        return type(layer).__module__.startswith("torch.nn") and not several
    if node.op == "call_function":
        return getattr(node.target, "__module__", None) in ("torch", "torch._C._nn")
    return node.op == "placeholder"
