"""Paths that a user names, and where a user's own modules are."""

from __future__ import annotations

import sys
from pathlib import Path


def path_of(name: str | Path) -> Path:
    """Returns a path as it is named, if it is there; or else with `~` as the home.

    >>> path_of("runs/[a]")
    PosixPath('runs/[a]')
    """
    path = Path(name)
    try:
        return path if path.exists() else path.expanduser()
    except RuntimeError:  # `~name`, and there is no such user
        return path


def import_from_working_folder() -> None:
    """Has modules in the working folder be found, as `python -m` does.

    A console script looks for modules beside itself instead.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def absence(file: Path) -> str:
    """Returns what is missing, in words: the folder, or the file in it."""
    if file.parent.is_dir():
        return f"{file.parent} has no {file.name}"
    return f"there is no folder {str(file.parent)!r}"
