"""A `torch.fx` tracer that is true to the network, or says what stopped it."""

from __future__ import annotations

import dis
import inspect
import linecache
import operator
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from typing_extensions import override

from split_lightning.models.logits import logits_in
from split_lightning.models.proxies import MAKERS, InPlaceProxy
from split_lightning.models.side_effects import Watch, drawn_anew

# Files that are not of the network.
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Leaf(nn.Module, ABC):
    """A layer that a trace takes as one operation.

    What it does may depend on values, and need not be traceable.
    """

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the operation."""


class LayerTracer(fx.Tracer):
    """Traces a network, and finds the layers whose behavior a trace would lose.

    Such a layer becomes one operation, which runs the layer itself. Buffers are read
    when the trace runs, not when it is made. Switches of autograd and autocast leave no
    operation behind, so that they cannot be traced.

    Args:
        network: The network.
        whole: The layers that are one operation: path and reason. Those that are found
            are added; `""` is the network itself.
        watch: Says whether a layer has changed something; `None`: it is not checked.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, network: nn.Module, whole: dict[str, str], watch: Watch | None = None
    ) -> None:
        super().__init__(
            autowrap_functions=(*MAKERS, torch.utils.checkpoint.checkpoint)
        )
        self._autowrap_search += [torch, torch.utils.checkpoint, *_modules_of(network)]
        self.whole = whole
        self.watch = watch
        self._modes = _modes()
        self._seed, self._random = torch.initial_seed(), torch.get_rng_state()
        self._running: list[str] = []

    @override
    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Returns the network's call, and its inputs: those without a default.

        Where all have one, the first is the input.
        """
        names = _inputs_of(self.root)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return lambda root, *values: logits_in(root(*values)), [self.root, *inputs]

    @override
    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.initial_seed() != self._seed:
            raise fx.proxy.TraceError("it changes torch's random numbers")
        if _modes() != self._modes:
            raise fx.proxy.TraceError(
                "it computes in a torch.autograd.Function, or switches gradients, "
                "autocast or the hooks of saved tensors"
            )
        return super().create_node(*args, **kwargs)

    @override
    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Generator):  # on both sides of a cut it would differ
            raise fx.proxy.TraceError("it draws from a torch.Generator of its own")
        return super().create_arg(a)

    @override
    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decides what is checked later: an assertion, or that dtypes are the same."""
        node = obj.node
        if node.target in (operator.eq, operator.ne) and all(map(_is_dtype, node.args)):
            self.graph.call_function(_require_same, node.args)
            return node.target is operator.eq
        frame = sys._getframe(2)  # behind `Proxy.__bool__`
        if _is_in_assert(frame):
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            self.graph.call_function(_require_true, (node, line))
            return True
        return bool(super().to_bool(obj))

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.whole
            or isinstance(m, Leaf)
            or super().is_leaf_module(m, module_qualified_name)
        )

    @override
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    @override
    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        assert self.submodule_paths is not None
        if m not in self.submodule_paths:  # made in passing: `nn.ReLU()(x)`
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path) and any(_hooks_of(m)):
            self.whole[path] = "it has hooks"
        drawn = [] if self.is_leaf_module(m, path) else drawn_anew(m)
        if drawn:
            self.whole[path] = f"it draws something else each time ({drawn[0]})"
        if self.is_leaf_module(m, path) and path:
            return super().call_module(m, forward, args, kwargs)
        stack, calls = self.module_stack.copy(), self.num_calls.copy()
        self._note_changes()
        self._running.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.whole[path] = _reason(error)
            if not path:
                raise
            # Continues, to find all such layers; this trace is not used.
            self.module_stack, self.num_calls = stack, calls
            if torch.initial_seed() != self._seed:
                torch.set_rng_state(self._random)
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._note_changes()
            self._running.pop()

    def _note_changes(self) -> None:
        changes = self.watch.changes() if self.watch and self._running else []
        if changes:
            reason = f"it changes {', '.join(changes)}"
            self.whole.setdefault(self._running[-1], reason)


def _is_dtype(value: Any) -> bool:
    return (
        isinstance(value, fx.Node)
        and value.target is getattr
        and str(value.args[1]) == "dtype"
    )


def _require_same(one: torch.dtype, other: torch.dtype) -> None:
    if one != other:
        raise ValueError(
            "Expected inputs of the dtype of the network's weights, since the network "
            f"does other things else, but got {one} and {other}."
        )


def _is_in_assert(frame: FrameType) -> bool:
    """Returns whether what a frame tests now is the condition of an `assert`."""
    steps = [
        step
        for step in dis.get_instructions(frame.f_code)
        if step.offset >= frame.f_lasti
        and step.opname not in ("CACHE", "NOT_TAKEN", "TO_BOOL")
    ]
    fails = [
        s for s in steps if "ASSERTION" in s.opname or s.argrepr == "AssertionError"
    ]
    jump = steps[0]  # over the failure, or, within `a and b`, to it
    if "FALSE" in jump.opname:
        return any(jump.argval == step.offset for step in fails)
    return steps[1] in fails


def _hooks_of(layer: nn.Module) -> tuple[Any, ...]:
    return (
        layer._forward_pre_hooks,
        layer._forward_hooks,
        layer._backward_pre_hooks,
        layer._backward_hooks,
    )


def _require_true(value: Any, line: str) -> None:
    if not value:
        raise AssertionError(line)


def _modules_of(network: nn.Module) -> list[ModuleType]:
    """Returns the Python modules in which a network's classes are defined."""
    classes = {own for layer in network.modules() for own in type(layer).__mro__}
    names = {own.__module__ for own in classes if own.__module__ in sys.modules}
    return [sys.modules[name] for name in sorted(names)]


def _inputs_of(network: nn.Module) -> list[str]:
    """Returns the names of a network's inputs: those without a default, or the first.

    Raises:
        fx.proxy.TraceError: If one can only be given by its name, or there is none.
    """
    parameters = inspect.signature(network.forward).parameters.values()
    places = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    needed = [p for p in places if p.default is p.empty]
    if any(p.kind is p.KEYWORD_ONLY for p in needed) or not places:
        raise fx.proxy.TraceError("its forward takes no input by position")
    return [p.name for p in needed or places[:1]]


def _reason(error: Exception) -> str:
    """Returns what stopped a trace and where, in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, fx.proxy.TraceError):
        text = " ".join(str(error).split())
        if "control flow" in text or "iterated" in text:
            text = "its control flow depends on values"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    if own:
        text += f" ({Path(own[-1].filename).name}:{own[-1].lineno}: `{own[-1].line}`)"
    return text


def _modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )
