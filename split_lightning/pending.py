"""Values that are on their way from another site."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def here(value: Any) -> Any:
    """Returns a value, once it is here."""
    return value.result() if isinstance(value, Future) else value


def is_away(value: Any) -> bool:
    """Returns whether a value is still on its way."""
    return isinstance(value, Future) and not value.done()


def then(value: Any, change: Callable[[Any], Any]) -> Any:
    """Returns what a function makes of a value; on its way, if the value is."""
    if not isinstance(value, Future):
        return change(value)
    changed: Future[Any] = Future()

    def finish(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            changed.set_result(change(done.result()))
        else:
            changed.set_exception(error)

    value.add_done_callback(finish)
    return changed
