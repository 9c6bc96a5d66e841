"""Data sets, held once as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

# Held out of scikit-learn's digits as the test set, the same images in every run.
_DIGITS_TEST_SHARE, _DIGITS_TEST_SEED = 0.2, 0


class Images(NamedTuple):
    """Samples and their labels: images, signals, sequences, or the rows of a table.

    `split_lightning.data.scaling` has the rule for the network's inputs.

    Attributes:
        inputs: Images `(N, C, H, W)`, signals `(N, C, L)`, sequences of ids `(N, L)`
            (integers), or tables `(N, D)` (floats). Axis 1 is the channel axis.
        targets: Labels, integers of shape `(N,)`, from 0.
        columns: Values of each sample by which partitioners may divide the training
            set, such as `{"hospital": ["A", "B", "A"]}`; `None`: the label alone.
    """

    inputs: Tensor
    targets: Tensor
    columns: Mapping[str, Sequence[Any]] | None = None


class ImageSource(Protocol):
    """A data set that `SplitDataModule` can use: any object with these members.

    Attributes:
        classes: The names of the classes, at least two.
    """

    classes: Sequence[str]

    def load(self, train: bool) -> Images:
        """Returns the training set or the test set; fetches it first if need be.

        Arrays and lists work instead of tensors, a plain tuple instead of `Images`,
        and a map-style `torch.utils.data.Dataset` of (input, label) instead of all.
        """


class TorchvisionImages:
    """An image classification data set of torchvision, downloaded on first use.

    Args:
        name: Its class in `torchvision.datasets`: `CIFAR10`, `CIFAR100`, `MNIST` or
            `FashionMNIST`.
        root: The folder of the data set; it is downloaded there if missing.

    Raises:
        ValueError: If `name` is none of these.
    """

    names = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")

    def __init__(self, name: str, root: str | Path) -> None:
        if name not in self.names:
            raise ValueError(
                f"Expected argument `name` to be one of {self.names}, but got {name!r}."
            )
        self.name = name
        self.root = Path(root).expanduser()
        self.classes: tuple[str, ...] = ()

    def load(self, train: bool) -> Images:
        """Returns the training set or the test set.

        Raises:
            FileNotFoundError: If it is not under the root, or damaged, and cannot be
                downloaded.
        """
        from torchvision import datasets

        constructor = getattr(datasets, self.name)
        try:
            dataset = constructor(self.root, train=train, download=True)
        except Exception as error:  # a damaged file can raise anything
            raise FileNotFoundError(
                f"{self.name} is not in {self.root}, or is damaged there, and could "
                f"not be downloaded ({type(error).__name__}: {error}). Name the folder "
                "that holds it with data.root=FOLDER, delete what is damaged to "
                "download it again, or train on the bundled digits with data=digits."
            ) from error
        self.classes = tuple(dataset.classes)
        pixels = torch.as_tensor(np.asarray(dataset.data))  # (N, H, W[, C])
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(-1)
        inputs = pixels.permute(0, 3, 1, 2).contiguous()  # (N, C, H, W)
        return Images(inputs, torch.as_tensor(dataset.targets, dtype=torch.int64))


class DigitsImages:
    """Handwritten digits that come with scikit-learn: 1,797 real images of 8x8.

    A fifth of them, the same in every run and every class alike, is the test set.
    Pixels (0 to 16 in the source) are scaled to 0 to 255.
    """

    def __init__(self) -> None:
        self.classes = tuple("0123456789")

    def load(self, train: bool) -> Images:
        """Returns the training set or the test set."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)),
            test_size=_DIGITS_TEST_SHARE,
            random_state=_DIGITS_TEST_SEED,
            stratify=digits.target,
        )
        chosen = parts[0] if train else parts[1]
        pixels = torch.from_numpy(digits.images[chosen] * (255 / 16))
        inputs = pixels.round().to(torch.uint8).unsqueeze(1)  # (N, 1, 8, 8)
        return Images(inputs, torch.from_numpy(digits.target[chosen]).long())


class AtClients:
    """Stands for samples that are at clients, where nothing is to be loaded."""

    classes: Sequence[str] = ()

    def load(self, train: bool) -> Images:
        """Refuses to load samples.

        Raises:
            ValueError: Says how to name a source.
        """
        raise ValueError(
            "Expected `data.source` to be a source of samples here, but the run's "
            "samples were at its clients. Add data.source._target_=VALUE."
        )
