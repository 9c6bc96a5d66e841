"""`ConfusionPicture`: the confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from typing_extensions import override

from split_lightning.callbacks.logs import log_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELLED = 20  # classes; with more there is no room for names and numbers


class ConfusionPicture(pl.Callback):
    """Draws the confusion matrix of the last validation of a fit, and of each test.

    The pictures go to the loggers that show pictures (`val/confusion`,
    `test/confusion`), that of the test to a PNG file too.

    Args:
        folder: Where `confusion.png` is written; `None`: to loggers only.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._counts: MulticlassConfusionMatrix | None = None
        self._networks = 1

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._begin(pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count(outputs, batch.targets)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._draw(trainer, "val")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._begin(pl_module)

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
        self._count(outputs, batch[1])

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        figure = self._draw(trainer, "test")
        if self.folder is not None and figure is not None and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / "confusion.png", dpi=120)

    def _begin(self, pl_module: Any) -> None:
        counts = MulticlassConfusionMatrix(pl_module.num_classes, validate_args=False)
        self._counts = counts.to(pl_module.device)
        self._networks = 1

    def _count(self, logits: Tensor | None, targets: Tensor) -> None:
        if logits is not None:  # else this process has no share of the batch
            assert self._counts is not None
            self._networks = len(logits) // len(targets)
            self._counts.update(logits, repeated(targets, logits))

    def _draw(self, trainer: pl.Trainer, part: str) -> Figure | None:
        metric, self._counts = self._counts, None
        if metric is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        counts = metric.compute().cpu()  # of all processes
        data = getattr(trainer, "datamodule", None)
        names = range(len(counts)) if data is None else data.classes
        title = title_of(part, self._networks)
        figure = draw_confusion(counts, [str(name) for name in names], title)
        log_figure(trainer, f"{part}/confusion", figure)
        return figure


def repeated(targets: Tensor, logits: Tensor) -> Tensor:
    """Returns the targets once for each network whose logits of them are given.

    >>> import torch
    >>> repeated(torch.tensor([1, 2]), torch.zeros(4, 3))
    tensor([1, 2, 1, 2])
    """
    return targets.repeat(len(logits) // len(targets))


def title_of(part: str, networks: int) -> str:
    """Names what a confusion matrix counts.

    >>> title_of("test", 10)
    'test, 10 networks'
    """
    return part if networks == 1 else f"{part}, {networks} networks"


def draw_confusion(counts: Tensor, classes: Sequence[str], part: str) -> Figure:
    """Returns a chart of a confusion matrix, a row for each true class.

    Args:
        counts: Number of samples by true and predicted class, `(K, K)`.
        classes: The classes' names.
        part: What the samples are, for the title, such as `test`.
    """
    from matplotlib.figure import Figure

    size = min(3.5 + 0.45 * len(classes), 10.0)
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
    axes = figure.add_subplot()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    right, total = int(counts.diagonal().sum()), int(counts.sum())
    title = f"Confusion matrix ({part}): {right:,} of {total:,} right"
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if len(classes) <= _MOST_LABELLED:
        long = max(map(len, classes)) > 2
        axes.set_xticks(range(len(classes)), classes, rotation=90 if long else 0)
        axes.set_yticks(range(len(classes)), classes)
        for true, predicted in counts.nonzero().tolist():
            color = "white" if shares[true, predicted] > 0.5 else "black"
            text = str(int(counts[true, predicted]))
            axes.text(predicted, true, text, ha="center", va="center", color=color)
    return figure
