"""`PartitionPicture`: the clients' label distribution, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from split_lightning.callbacks.logs import log_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MOST_BARS = 500  # clients that are drawn as bars


class PartitionPicture(pl.Callback):
    """Draws how many samples of each class each client has, once per run.

    The picture goes to the loggers that show pictures (`data/partition`) and to a PNG
    file.

    Args:
        folder: Where `partition.png` is written; `None`: to loggers only.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        data = getattr(trainer, "datamodule", None)
        if data is None:
            raise MisconfigurationException(
                "PartitionPicture draws what a SplitDataModule deals out: fit with "
                "datamodule=..., or leave the callback out."
            )
        figure = draw_label_counts(data.label_counts, data.classes)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / "partition.png", dpi=120)
        log_figure(trainer, "data/partition", figure)


def draw_label_counts(counts: Tensor, classes: Sequence[str]) -> Figure:
    """Returns a chart with a bar for each client, its classes stacked.

    Args:
        counts: Number of samples by client and class, `(num_clients, num_classes)`.
        classes: The classes' names.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_clients, num_classes = counts.shape
    height = min(3.0 + 0.16 * num_clients, 14.0)
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["tab10" if num_classes <= 10 else "nipy_spectral"]
    left = counts.cumsum(dim=1) - counts
    for label in range(num_classes):
        color = colors(label if num_classes <= 10 else label / num_classes)
        start, width = left[:, label].tolist(), counts[:, label].tolist()
        if num_clients <= _MOST_BARS:
            axes.barh(
                range(num_clients),
                width,
                left=start,
                height=0.85 if num_clients <= 100 else 1.0,
                color=color,
                label=classes[label],
            )
            continue
        # One outline: a bar for each of so many clients would take minutes.
        edges = [client - 0.5 for client in range(num_clients + 1)]
        ends = [a + b for a, b in zip(start, width, strict=True)]
        axes.fill_betweenx(
            edges,
            [*start, start[-1]],
            [*ends, ends[-1]],
            step="post",
            color=color,
            linewidth=0,
            label=classes[label],
        )
    axes.set_ylim(num_clients - 0.5, -0.5)  # client 0 on top, no empty bands
    axes.set(xlabel="samples", ylabel="client", title="Label distribution by client")
    if num_clients <= 20:
        axes.set_yticks(range(num_clients))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    if num_classes <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
