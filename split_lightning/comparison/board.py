"""A comparison in TensorBoard: curves that lie on each other, settings, the plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger

from split_lightning.comparison.curve import by_bytes, by_round, by_samples, curve
from split_lightning.comparison.group import SEED, RunGroup
from split_lightning.comparison.settings import short_names

_CURVES = {"by_round": by_round, "by_samples": by_samples, "by_bytes": by_bytes}
_METRICS = ("test_accuracy", "test_loss", "val_accuracy", "bytes", "seconds")


def write_board(
    groups: Sequence[RunGroup],
    labels: Sequence[str],
    keys: Sequence[str],
    plot: Path,
    folder: Path,
) -> None:
    """Writes a run of TensorBoard for each group, and the plot as an image.

    Its scalars `val_accuracy/by_round`, `by_samples` and `by_bytes` have rounds, images
    trained on and bytes that travelled as their steps. Its hyperparameters are the
    settings in which the groups differ; metrics are the means of the figures.

    Args:
        groups: The runs, in groups.
        labels: A name for each.
        keys: The settings in which they differ.
        plot: The plot, a PNG file.
        folder: Where it all goes; what an earlier comparison wrote there is removed.
    """
    from matplotlib.image import imread

    for old in folder.rglob("events.out.tfevents.*"):
        old.unlink()
    for group, label in zip(groups, labels, strict=True):
        _write_group(group, re.sub(r"[^\w.=,+-]+", "_", label), keys, folder)
    logger = TensorBoardLogger(folder, name="", version="")
    logger.experiment.add_image("comparison", imread(plot), dataformats="HWC")
    logger.finalize("success")


def _write_group(group: RunGroup, name: str, keys: Sequence[str], folder: Path) -> None:
    logger = TensorBoardLogger(folder, name="", version=name, default_hp_metric=False)
    for tag, position in _CURVES.items():
        for point in curve(group, position):
            logger.log_metrics({f"val_accuracy/{tag}": point.y}, round(point.x))
    settings = {
        name: group.shown(key) if key == SEED else group.settings[key].value
        for key, name in short_names(keys).items()
        if key in group.settings
    }
    means = group.means()
    reached = {key: value for key in _METRICS if (value := means[key]) is not None}
    logger.log_hyperparams({k: _plain(v) for k, v in settings.items()}, reached)
    logger.finalize("success")


def _plain(value: object) -> object:
    """Returns a value as TensorBoard takes it."""
    return value if isinstance(value, bool | int | float) else str(value)
