"""Parts: which holder has which part of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


class Parts(Protocol):
    """How samples are divided among holders: any object with these members."""

    def __len__(self) -> int:
        """Returns the number of holders."""

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        """Returns each holder's part of samples `(B, C, H, W)`, as views of them."""

    def put_back(self, values: Sequence[Tensor]) -> Tensor:
        """Returns what holders computed as one, each in its own place."""

    def check(self, shape: Sequence[int]) -> None:
        """Stops where a holder would have nothing of samples of a shape `(C, H, W)`.

        Raises:
            ValueError: Says how many holders there can be.
        """


class Tiles:
    """Each holder has a tile of an image, row by row.

    `Tiles(1, 2)` are a left and a right half, `Tiles(2, 2)` quadrants. Where the height
    or the width does not divide, the first tiles have a pixel more.

    Args:
        rows: Number of tiles one above the other.
        columns: Number of tiles side by side.

    Raises:
        ValueError: If there is no tile, or only one.

    >>> left, right = Tiles(1, 2)(torch.tensor([[[[1, 2], [3, 4]]]]))
    >>> left.flatten().tolist(), right.flatten().tolist()
    ([1, 3], [2, 4])
    """

    def __init__(self, rows: int, columns: int) -> None:
        if rows < 1 or columns < 1 or rows * columns < 2:
            raise ValueError(
                "Expected arguments `rows` and `columns` to be positive, and to make "
                f"at least two tiles, but got {rows} and {columns}."
            )
        self.rows = rows
        self.columns = columns

    def __repr__(self) -> str:
        return f"Tiles(rows={self.rows}, columns={self.columns})"

    def __len__(self) -> int:
        """Returns the number of holders."""
        return self.rows * self.columns

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        """Returns each holder's tile of images `(B, C, H, W)`, as views of them."""
        # An operation of its own for each: branches share nothing but the inputs.
        return [
            inputs.tensor_split(self.rows, dim=2)[row].tensor_split(
                self.columns, dim=3
            )[column]
            for row in range(self.rows)
            for column in range(self.columns)
        ]

    def put_back(self, values: Sequence[Tensor]) -> Tensor:
        """Returns holders' maps `(B, C, h, w)` as one; vectors one behind the other."""
        if values[0].ndim != 4:
            return torch.cat(list(values), dim=1)
        rows = [
            torch.cat(list(values[first : first + self.columns]), dim=3)
            for first in range(0, len(self), self.columns)
        ]
        return torch.cat(rows, dim=2)

    def check(self, shape: Sequence[int]) -> None:
        """Stops where a tile of images of a shape `(C, H, W)` would have no pixel.

        Raises:
            ValueError: Says how many tiles there can be.
        """
        _, height, width = shape
        if self.rows > height or self.columns > width:
            raise ValueError(
                f"Expected each part of an image to have pixels: at most {height} rows "
                f"and {width} columns of tiles (argument `parts`) for images of shape "
                f"{tuple(shape)}, but got {self.rows} and {self.columns}. Of a table "
                "use `Columns` (in a configuration `topology/parts=columns`)."
            )


class Columns:
    """Each holder has some columns of a table, neighbours of each other.

    A row of a table is a sample `(C, 1, 1)`: a channel is a column.

    Args:
        num_holders: Number of holders, with as many columns each; where that does
            not divide, the first have one more.
        sizes: Or else the number of columns of each holder.

    Raises:
        ValueError: If neither or both are given, or there are fewer than two holders,
            or one has no column.

    >>> [part.shape[1] for part in Columns(3)(torch.zeros(2, 8, 1, 1))]
    [3, 3, 2]
    """

    def __init__(
        self, num_holders: int | None = None, sizes: Sequence[int] | None = None
    ) -> None:
        if (num_holders is None) == (sizes is None):
            raise ValueError(
                "Expected one of the arguments `num_holders` and `sizes`, and null for "
                f"the other, but got {num_holders} and {sizes}."
            )
        self.sizes = None if sizes is None else list(sizes)
        self.num_holders = len(self.sizes or ()) if num_holders is None else num_holders
        if self.num_holders < 2 or min(self.sizes or [1]) < 1:
            raise ValueError(
                "Expected at least two holders with a column each, but got "
                f"{'num_holders' if sizes is None else 'sizes'}="
                f"{num_holders if sizes is None else self.sizes}."
            )

    def __repr__(self) -> str:
        return f"Columns(num_holders={self.num_holders}, sizes={self.sizes})"

    def __len__(self) -> int:
        """Returns the number of holders."""
        return self.num_holders

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        """Returns each holder's columns of rows `(B, C, 1, 1)`, as views of them."""
        if self.sizes is None:
            return [
                inputs.tensor_split(len(self), dim=1)[holder]
                for holder in range(len(self))
            ]
        starts = [0, *accumulate(self.sizes)]
        return [
            inputs.narrow(1, start, size)
            for start, size in zip(starts[:-1], self.sizes, strict=True)
        ]

    def put_back(self, values: Sequence[Tensor]) -> Tensor:
        """Returns holders' values one behind the other, along the features."""
        return torch.cat(list(values), dim=1)

    def check(self, shape: Sequence[int]) -> None:
        """Stops where a holder would have no column of rows of a shape `(C, 1, 1)`.

        Raises:
            ValueError: Says how many columns there are.
        """
        count = shape[0]
        if self.sizes is not None and sum(self.sizes) != count:
            raise ValueError(
                f"Expected argument `sizes` to add up to the table's columns ({count}),"
                f" but got {self.sizes}, which are {sum(self.sizes)}."
            )
        if len(self) > count:
            raise ValueError(
                f"Expected each holder to have a column: at most {count} holders "
                f"(argument `parts`), as many as the table has columns, but got "
                f"{len(self)}."
            )
