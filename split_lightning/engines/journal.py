"""`Journal`: the files in which a site saves its state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class Journal:
    """Saves states in files, each as a whole or not at all.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Saves a state under a name."""
        path = self._path(name)
        being_written = path.with_suffix(".tmp")
        torch.save(state, being_written)
        os.replace(being_written, path)

    def has(self, name: str) -> bool:
        """Returns whether there is a state of a name."""
        return self._path(name).is_file()

    def load(self, name: str) -> dict[str, Any]:
        """Returns a state; nothing is unpickled but tensors in plain containers."""
        state: dict[str, Any] = torch.load(self._path(name), weights_only=True)
        return state

    def keep_newest(self, pattern: str, count: int, but: str) -> None:
        """Removes the oldest states whose names are like a pattern.

        Args:
            pattern: The pattern.
            count: How many stay.
            but: The name of one that stays beside them.
        """
        paths = sorted(self.folder.glob(f"{pattern}.pt"), key=_age, reverse=True)
        for path in paths[count:]:
            if path != self._path(but):
                path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns
