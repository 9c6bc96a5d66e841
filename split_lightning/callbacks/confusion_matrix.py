"""`ConfusionMatrix`: true and predicted classes of a tested network."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
)
from typing_extensions import override

from split_lightning.callbacks.confusion_picture import (
    draw_confusion,
    repeated,
    title_of,
)


class ClassFigures(NamedTuple):
    """The figures of each class.

    Attributes:
        classes: The classes' names.
        confusion: Number of images by true class and predicted class, `(K, K)`; each
            counts once for each network.
        accuracy: Share of a class's images that were predicted right (recall), `(K,)`.
        precision: Share of the predictions of a class that are right, `(K,)`.
        f1: Harmonic mean of both, `(K,)`.
        networks: Number of networks that were tested: of several where clients have
            networks of their own.
    """

    classes: tuple[str, ...]
    confusion: Tensor
    accuracy: Tensor
    precision: Tensor
    f1: Tensor
    networks: int = 1


class ConfusionMatrix(pl.Callback):
    """Counts true and predicted classes in a test.

    Args:
        folder: Where `confusion.csv`, `confusion.png` and `classes.csv` are written;
            `None`: nowhere.

    Attributes:
        figures: The counts, after a test.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.figures: ClassFigures | None = None
        self._metrics: MetricCollection | None = None
        self._networks = 1

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        num_classes = len(_classes(trainer))
        metrics = {
            "confusion": MulticlassConfusionMatrix(num_classes),
            "accuracy": MulticlassAccuracy(num_classes, average=None),
            "precision": MulticlassPrecision(num_classes, average=None),
            "f1": MulticlassF1Score(num_classes, average=None),
        }
        self._metrics = MetricCollection(dict(metrics)).to(pl_module.device)

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._metrics is not None
        if outputs is not None:  # else this process has no share of the batch
            self._networks = len(outputs) // len(batch[1])
            self._metrics.update(outputs, repeated(batch[1], outputs))

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        assert self._metrics is not None
        values = {name: value.cpu() for name, value in self._metrics.compute().items()}
        classes = _classes(trainer)
        self.figures = ClassFigures(classes, **values, networks=self._networks)
        if self.folder is not None and trainer.is_global_zero:
            write_class_figures(self.figures, self.folder)


def _classes(trainer: pl.Trainer) -> tuple[str, ...]:
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise MisconfigurationException(
            "ConfusionMatrix names the classes of a SplitDataModule: test with "
            "datamodule=..., or leave the callback out."
        )
    classes: tuple[str, ...] = tuple(data.classes)
    return classes


def write_class_figures(figures: ClassFigures, folder: Path) -> None:
    """Writes the confusion matrix as a table and a picture, and each class's figures.

    A class without images, or never predicted, has empty figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrix = zip(figures.classes, figures.confusion.tolist(), strict=True)
    rows = [["true \\ predicted", *figures.classes], *([c, *row] for c, row in matrix)]
    _write_csv(folder / "confusion.csv", rows)
    names = ("class", "images", "accuracy", "precision", "f1")
    _write_csv(folder / "classes.csv", [names, *by_class(figures)])
    part = title_of("test", figures.networks)
    picture = draw_confusion(figures.confusion, figures.classes, part)
    picture.savefig(folder / "confusion.png", dpi=120)


def by_class(figures: ClassFigures) -> list[tuple[str, int, Any, Any, Any]]:
    """Returns name, images, accuracy, precision and F1 of each class, `""` for none."""
    images, told = figures.confusion.sum(1).tolist(), figures.confusion.sum(0).tolist()
    return [
        (
            name,
            images[k] // figures.networks,
            figures.accuracy[k].item() if images[k] else "",
            figures.precision[k].item() if told[k] else "",
            figures.f1[k].item() if images[k] or told[k] else "",
        )
        for k, name in enumerate(figures.classes)
    ]


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
