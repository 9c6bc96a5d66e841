"""The options of engines: the values that they may have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_MOST_PORT = 65535


class _Allowed(NamedTuple):
    """Which values an option may have, and how a user is told."""

    fits: Callable[[Any], bool]
    expected: str


def is_address(value: Any) -> bool:
    """Returns whether a value is a host and a port.

    >>> [is_address(value) for value in ("a.example:8443", "[::1]:0", "a", "a:b", 80)]
    [True, True, False, False, False]
    """
    if not isinstance(value, str):
        return False
    found = re.fullmatch(r"([^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", value)
    return found is not None and int(found[2]) <= _MOST_PORT


def _is_server(value: Any) -> bool:
    return is_address(value) and int(value.rpartition(":")[2]) > 0


def _is_number(value: Any) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and math.isfinite(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_path(value: Any) -> bool:
    return value is not None and str(value) != "" and not _is_number(value)


def _or_null(fits: Callable[[Any], bool], expected: str) -> _Allowed:
    return _Allowed(lambda v: v is None or fits(v), f"{expected}, or null")


_OPTIONS = {
    "listen": _or_null(is_address, "HOST:PORT, such as 0.0.0.0:8443"),
    "server": _or_null(_is_server, "HOST:PORT, such as server.example:8443"),
    "certificates": _or_null(_is_path, "a folder"),
    "folder": _or_null(_is_path, "a folder"),
    "deadline": _or_null(_is_positive, "a number of seconds above 0"),
    "absences": _or_null(_is_path, "a file"),
    "patience": _Allowed(_is_number, "a number of seconds, of at least 0"),
    "own_data": _Allowed(lambda v: isinstance(v, bool), "true or false"),
    "address": _or_null(_is_path, "the address of a cluster, such as auto"),
    "workers": _Allowed(_is_count, "an integer of at least 1"),
    "num_cpus": _Allowed(_is_number, "a number of at least 0"),
    "num_gpus": _Allowed(_is_number, "a number of at least 0"),
}


def check_options(options: Mapping[str, Any], called: str = "argument `{}`") -> None:
    """Stops where an option has a value that it cannot have.

    Args:
        options: The options of an engine, by name.
        called: What a user knows an option as.

    Raises:
        ValueError: Names the option, what was expected and what came.
    """
    for name, value in options.items():
        allowed = _OPTIONS.get(name)
        if allowed is not None and not allowed.fits(value):
            raise ValueError(
                f"Expected {called.format(name)} to be {allowed.expected}, but got "
                f"{value!r}."
            )
