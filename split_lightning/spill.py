"""States at rest, in files of a folder instead of memory."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from split_lightning.paths import path_of

_PREFIX = f"waiting-{socket.gethostname()}-"


class SpillFolder:
    """A folder that stores keep their entries in, as long as they are used.

    Entries are in a new folder inside it, made when it is opened and removed when it is
    closed, or else when nothing refers to it any more, or the process ends. Several
    runs and processes may use the same folder. What a process that was killed left
    there is removed when one of the same machine opens it (but on Windows).

    Args:
        folder: The folder; it is made where there is none, and removed in the end if
            it was made and is empty.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = path_of(folder)
        self._own: Path | None = None
        self._numbers = count()

    def store(self) -> FolderStore:
        """Returns a new store, which is empty."""
        return FolderStore(self, next(self._numbers))

    def open(self) -> Path:
        """Makes the folder of the entries, if there is none yet, and returns it.

        Raises:
            ValueError: If it cannot be made.
        """
        if self._own is None:
            is_new = not self.folder.exists()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _remove_left_behind(self.folder)
                prefix = f"{_PREFIX}{os.getpid()}-"
                self._own = Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))
            except OSError as error:
                raise ValueError(
                    "Expected argument `spill_to` to be a folder that can be written, "
                    f"or null to keep in memory what waits, but got "
                    f"{str(self.folder)!r}: {error}"
                ) from error
            outer = self.folder if is_new else None
            self._remove = weakref.finalize(self, _remove, self._own, outer)
        return self._own

    def close(self) -> None:
        """Removes all entries; stores must not be read after it."""
        if self._own is not None:
            self._remove()
            self._own = None


class FolderStore(MutableMapping[str, Any]):
    """A mapping whose values are files: plain containers and tensors.

    A value is read anew each time, and its file is gone when it is taken out (`pop`).

    Args:
        spill: Where the files are.
        number: Tells this store's files from others'.
    """

    def __init__(self, spill: SpillFolder, number: int) -> None:
        self.spill = spill
        self.number = number
        self._keys: dict[str, None] = {}  # in the order of a dict

    def _file(self, key: str) -> Path:
        name = key.replace("/", "-")  # of a party: `client/3`
        return self.spill.open() / f"{self.number}_{name}.pt"

    @override
    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return torch.load(self._file(key), weights_only=True)

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        torch.save(value, self._file(key))
        self._keys[key] = None

    @override
    def __delitem__(self, key: str) -> None:
        del self._keys[key]
        self._file(key).unlink()

    @override
    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    @override
    def __len__(self) -> int:
        return len(self._keys)

    @override
    def clear(self) -> None:
        for key in list(self._keys):
            del self[key]


def _remove_left_behind(folder: Path) -> None:
    """Removes the entries of processes of this machine that are no more."""
    if os.name != "posix":
        return
    for own in folder.glob(f"{_PREFIX}*-*"):
        process = own.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(own, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(own: Path, outer: Path | None) -> None:
    """Removes a folder, and the one around it if it is empty."""
    shutil.rmtree(own, ignore_errors=True)
    if outer is not None:
        try:
            outer.rmdir()
        except OSError:  # not empty, or gone
            return
