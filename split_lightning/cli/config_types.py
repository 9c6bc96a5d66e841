"""Whether values are of the types that a class or function asks for."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    NoneType: (NoneType,),
}


def misfit(target: str, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the first option of a wrong type, and the type that it has to have.

    Only plain values are checked, not objects.

    Args:
        target: A class or function that can be imported.
        options: Its arguments.

    >>> misfit("split_lightning.RoundRobinWeightPassing", {"enabled": "no"})
    ('enabled', 'bool')
    """
    found = pkgutil.resolve_name(target)
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # a builtin
        return None
    for name, value in options.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.annotation is parameter.empty:
            continue
        hint = _evaluated(parameter.annotation, found)
        if not _fits(value, hint) and value != parameter.default:
            return name, _named(hint)
    return None


def _evaluated(annotation: Any, found: Any) -> Any:
    """Returns the type that an annotation means; `Any` where it cannot be told."""
    names = vars(sys.modules[found.__module__])
    try:
        return get_type_hints(
            SimpleNamespace(__annotations__={"it": annotation}), names
        )["it"]
    except (NameError, TypeError):  # imported for type checkers alone
        return Any


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in _PLAIN:
        is_alike = hint is bool or not isinstance(value, bool)
        return is_alike and isinstance(value, _PLAIN[hint])
    if isinstance(value, str):
        return hint is not _torch_class("nn.Module")  # but a path, a device
    return not isinstance(value, bool | int | float) or not _is_object(hint)


def _is_object(hint: Any) -> bool:
    """Returns whether no plain number is of a type."""
    is_class = isinstance(hint, type) and hint is not object
    if is_class:
        return not issubclass(hint, _torch_class("Tensor"))
    return get_origin(hint) is Callable


def _named(hint: Any) -> str:
    """Returns a type as a user knows it.

    >>> _named(int | Literal["all"] | None)
    "int or 'all' or null"
    """
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_named(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return "null" if hint is NoneType else inspect.formatannotation(hint)


def _torch_class(name: str) -> Any:
    """Returns a class of torch, imported when it is first needed."""
    return pkgutil.resolve_name(f"torch.{name}")
