"""Side effects of a forward pass: what it changes besides what it returns."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

# Values that are compared as they are.
_PLAIN = (bool, int, str, bytes, type, ModuleType, torch.dtype, torch.device)
_CODE = (ModuleType, property, classmethod, staticmethod)
# Names of what gives something else each time, without a state that could be watched.
_DRAWN_ANEW = {
    "SystemRandom",
    "default_rng",
    "monotonic",
    "perf_counter",
    "perf_counter_ns",
    "time_ns",
    "urandom",
}
# Returns what is there now, by name.
_Reader = Callable[[], Mapping[str, Any]]


class Watch:
    """Notices what changes in a network, and in the Python around it.

    It watches the random numbers of Python, NumPy and torch; the attributes and buffers
    of the layers, with all that these hold; the attributes of their classes; and the
    global variables that their methods use.
    """

    def __init__(self, network: nn.Module) -> None:
        self._places = dict(_places(network))
        self._last = self._read()

    def changes(self) -> list[str]:
        """Returns the names of what has changed since the last call, or the start."""
        found, last = [], self._last
        self._last = self._read()
        for name, now in self._last.items():
            before = last[name]
            if now != before:
                keys = {**before, **now}
                changed = [k for k in keys if before.get(k, ()) != now.get(k, ())]
                found += [name.format(key) for key in changed]
        return found

    def _read(self) -> dict[str, dict[str, Any]]:
        key = _Key()
        return {
            name: {own: key(value) for own, value in read().items()}
            for name, read in self._places.items()
        }


def _places(network: nn.Module) -> Iterator[tuple[str, _Reader]]:
    """Yields what is watched: a name, with a place for a key in it, and a reader."""
    yield "Python's random numbers (`random`)", lambda: {"": random.getstate()}
    yield "NumPy's random numbers (`numpy.random`)", lambda: {"": np.random.get_state()}
    yield "torch's random numbers", lambda: {"": torch.get_rng_state().numpy()}
    for path, layer in network.named_modules():
        where = f" of its layer `{path}`" if path else ""
        yield f"the attribute `{{}}`{where}", partial(_attributes, layer)
        yield f"the buffer `{{}}`{where}", partial(dict, layer._buffers)
    classes = {type(layer): None for layer in network.modules()}
    seen = set[FunctionType]()
    for own in dict.fromkeys(base for c in classes for base in c.__mro__):
        if _is_of_torch(own) or own.__module__ not in sys.modules:
            continue
        yield f"the class attribute `{own.__name__}.{{}}`", partial(_data_of, vars(own))
        for function in vars(own).values():
            if isinstance(function, FunctionType):
                yield from _around(function, own.__name__, seen)


def _around(
    function: FunctionType, user: str, seen: set[FunctionType]
) -> Iterator[tuple[str, _Reader]]:
    """Yields what a function may change, and the functions that it uses.

    These are the global variables that it names, its attributes and its defaults.
    """
    if function in seen or _is_of_torch(function):
        return
    seen.add(function)
    names, variables = sorted(_names_in(function)), function.__globals__
    where = f"the global variable `{{}}` that {user} uses"
    yield where, partial(_data_of, variables, names)
    name = function.__name__
    yield f"the attribute `{{}}` of the function `{name}`", partial(vars, function)
    defaults = (function.__defaults__, function.__kwdefaults__)
    yield f"a default of the function `{name}`", lambda: {"": defaults}
    for used in [variables.get(name) for name in names]:
        if isinstance(used, FunctionType):
            yield from _around(used, used.__name__, seen)


def drawn_anew(layer: nn.Module) -> list[str]:
    """Returns the names of what a layer's forward draws anew each time, if anything.

    Such as the time, or a generator of random numbers that it makes for itself.
    """
    classes = type(layer).__mro__
    left: list[Any] = [type(layer).forward]
    seen, names = set[Any](), set[str]()
    while left:
        function = left.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        if _is_of_torch(function):
            continue
        seen.add(function)
        used = _names_in(function)
        names |= used
        left += [function.__globals__.get(name) for name in used]
        left += [vars(own)[name] for own in classes for name in used & vars(own).keys()]
    return sorted(_DRAWN_ANEW & names)


def _is_of_torch(code: Any) -> bool:
    return (code.__module__ or "").partition(".")[0] == "torch"


def _attributes(layer: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a layer, but for what the trace itself changes."""
    own = vars(layer).items()
    return {
        k: v for k, v in own if k != "_buffers" and not k.startswith("_tensor_constant")
    }


def _data_of(
    values: Mapping[str, Any], names: Iterable[str] | None = None
) -> dict[str, Any]:
    """Returns those values, of certain names or all, that are no code."""
    return {
        name: values[name]
        for name in list(values if names is None else names)
        if name in values
        and not name.startswith("__")
        and not (callable(values[name]) or isinstance(values[name], _CODE))
    }


def _names_in(function: FunctionType) -> set[str]:
    """Returns the names that a function, and those inside it, may read or write."""
    found, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        codes += [own for own in code.co_consts if isinstance(own, CodeType)]
    return found


class _Same:
    """Equals what stands for the same object, which it keeps alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


class _Key:
    """Turns values into what is equal as long as they, and all they hold, are the same.

    What is met again is told by its identity alone: it is looked into once.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if value is None or isinstance(value, _PLAIN):
            return value
        if issubclass(type(value), fx.Proxy):  # which may pass for a tensor
            return _Same(value)
        if isinstance(value, float):
            return repr(value)  # a NaN does not equal itself
        if isinstance(value, Tensor):
            return _Same(value), None if value.is_inference() else value._version
        if isinstance(value, np.ndarray):
            return value.shape, value.tobytes()
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if id(value) in self._seen or isinstance(value, nn.Module):
            return _Same(value)
        self._seen[id(value)] = value
        held = _held(value)
        if held is None:
            return _Same(value)
        if isinstance(held, dict):
            return type(value), [(self(k), self(v)) for k, v in held.items()]
        return type(value), list(map(self, held))


def _held(value: Any) -> Any:
    """Returns what a value holds, as a list or a dict; `None`: nothing is known."""
    if isinstance(value, dict | list | deque):
        return value
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    if isinstance(value, torch.Generator):
        return [value.get_state().numpy()]
    if isinstance(value, FunctionType):
        return [_Same(value), *(cell.cell_contents for cell in value.__closure__ or ())]
    if isinstance(value, MethodType):
        return [_Same(value.__func__), value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if type(value).__module__ == "itertools":
        return [repr(value)]  # `count(3)`
    slots = [k for c in type(value).__mro__ for k in getattr(c, "__slots__", ())]
    held = {k: getattr(value, k) for k in slots if hasattr(value, k)}
    return {**held, **getattr(value, "__dict__", {})} or None
