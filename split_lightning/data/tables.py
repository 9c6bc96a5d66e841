"""Tables: a sample is a row, and each column a channel of one pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from split_lightning.data.sources import Images

_TEST_SHARE, _TEST_SEED = 0.2, 0


class SklearnTable:
    """A table that comes with scikit-learn, of real measurements.

    A fifth of its rows, the same in every run and every class alike, is the test set.
    Columns are standardised by the mean and deviation of the others.

    Args:
        name: `breast_cancer` (569 rows of 30 columns, two classes) or `wine` (178 of
            13, three classes).

    Raises:
        ValueError: If `name` is neither.
    """

    names = ("breast_cancer", "wine")

    def __init__(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(
                f"Expected argument `name` to be one of {self.names}, but got {name!r}."
            )
        self.name = name
        self.classes: tuple[str, ...] = tuple(map(str, self._read().target_names))

    def load(self, train: bool) -> Images:
        """Returns the training set or the test set, float32 of shape `(N, C, 1, 1)`."""
        from sklearn.model_selection import train_test_split

        table = self._read()
        parts = train_test_split(
            np.arange(len(table.target)),
            test_size=_TEST_SHARE,
            random_state=_TEST_SEED,
            stratify=table.target,
        )
        known = table.data[parts[0]]
        chosen = parts[0] if train else parts[1]
        rows = (table.data[chosen] - known.mean(axis=0)) / known.std(axis=0)
        inputs = torch.from_numpy(rows).float()[:, :, None, None]  # (N, C, 1, 1)
        return Images(inputs, torch.from_numpy(table.target[chosen]).long())

    def _read(self) -> Any:
        from sklearn import datasets

        return getattr(datasets, f"load_{self.name}")()
