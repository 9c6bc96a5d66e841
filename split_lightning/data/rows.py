"""Rows: a data set for partitioners, whose selections are cheap until they are read."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset


class Rows(Dataset):  # type: ignore[misc]  # has no types
    """A `datasets.Dataset` that only notes which rows are selected from it.

    Partitioners select the rows of each client. `Dataset.select` takes milliseconds: it
    hashes the row numbers and writes them into an Arrow table. A selection from `Rows`
    notes them, and becomes a full data set when something other than `index` is read.

    The column `index` holds integers.

    >>> rows = Rows.from_dict({"label": [5, 6, 7], "index": [0, 1, 2]})
    >>> part = rows.select([2, 0])
    >>> part.index
    array([2, 0])
    >>> part["label"][:]
    [7, 5]
    """

    def select(self, indices: Iterable[int], *args: Any, **kwargs: Any) -> Any:
        """Returns rows of this data set.

        Args:
            indices: The rows' numbers.
            args: Further arguments of `Dataset.select`, which say where it stores the
                selection: they change nothing here.
            kwargs: The same, by name.
        """
        indices = indices if hasattr(indices, "__len__") else list(indices)
        numbers = np.array(indices)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":  # refused, or empty
            return super().select(indices, *args, **kwargs)
        selected = object.__new__(type(self))
        selected.__dict__["_selection"] = (self, numbers.astype(np.int64))
        return selected

    @cached_property
    def index(self) -> Any:
        """The column `index`, an array of shape `(N,)`."""
        if "_selection" in self.__dict__:
            origin, numbers = self.__dict__["_selection"]
            return origin.index[numbers]
        return np.array(self["index"][:], dtype=np.int64)

    def __getattr__(self, name: str) -> Any:
        """Makes a selection a full data set, which has what is missing so far."""
        if name.startswith("__") or "_selection" not in self.__dict__:
            raise AttributeError(f"`Rows` has no attribute {name!r}.")
        origin, numbers = self.__dict__.pop("_selection")
        full = Dataset.select(origin, numbers.tolist())
        self.__dict__.update(full.__dict__)  # before `full` deletes its tables
        return getattr(self, name)

    def __del__(self) -> None:
        if "_selection" not in self.__dict__:
            super().__del__()
