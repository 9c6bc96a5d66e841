"""Paths that a user names."""

from __future__ import annotations

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
