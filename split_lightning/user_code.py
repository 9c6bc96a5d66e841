"""The position of an error in a user's own code."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).parent
_STANDARD = Path(sysconfig.get_path("stdlib"))
_INSTALLED = {"site-packages", "dist-packages"}


def position_of(error: BaseException) -> str | None:
    """Returns the position in a user's own code at which an error was raised.

    Returns:
        Such as `MySource.load, my.py:12`; `None` if no such code ran within the
        package's.
    """
    position = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            position = None  # what called the package is not of interest
        elif _is_users(file):
            position = f"{_name_of(frame)}, {file.name}:{line}"
    return position


def described(error: BaseException) -> str:
    """Returns an error's message; of one in a user's code its type and position, too.

    >>> described(ValueError("too large"))
    'too large'
    """
    position = position_of(error)
    if position is None and isinstance(error, ValueError | IndexError | RuntimeError):
        return str(error)
    where = "" if position is None else f" (in {position})"
    return f"{type(error).__name__}: {error}{where}"


def _is_users(file: Path) -> bool:
    is_installed = file.is_relative_to(_STANDARD) or _INSTALLED & set(file.parts)
    return file.is_file() and not is_installed


def _name_of(frame: FrameType) -> str:
    """Returns the name of a frame's function, with its class."""
    instance = frame.f_locals.get("self")
    name = frame.f_code.co_name
    return name if instance is None else f"{type(instance).__name__}.{name}"
