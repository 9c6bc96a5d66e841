"""A comparison in TensorBoard: curves that lie on each other, and the plot."""

from __future__ import annotations

import re
from pathlib import Path

from split_lightning.runs.comparison.table import Comparison
from split_lightning.runs.tensorboard import TensorBoardLogger

_LONGEST = 200  # characters of a folder's name; file systems allow 255
_CURVES = {"by_round": "round", "by_samples": "images", "by_bytes": "bytes"}


def write_board(compared: Comparison, plot: Path, folder: Path) -> None:
    """Writes a run of TensorBoard for each group, and the plot as an image.

    Its scalars `val_accuracy/by_round`, `by_samples` and `by_bytes` have rounds, images
    trained on and bytes sent as their steps. They are means over seeds.

    Args:
        compared: The runs.
        plot: The plot, a PNG file.
        folder: Where it all goes; what an earlier comparison wrote there is removed.
    """
    from matplotlib.image import imread

    for old in folder.rglob("events.out.tfevents.*"):
        old.unlink()
    shown, names = compared.shown, compared.names()
    for group, rounds in compared.rounds.groupby("group"):
        settings = ",".join(f"{key}={shown.loc[group, key]}" for key in shown)
        name = ",".join(filter(None, [names[group], settings]))
        version = re.sub(r"[^\w.=,+-]+", "_", name)[:_LONGEST]
        logger = TensorBoardLogger(folder, name="", version=version)
        means = rounds.groupby("round", as_index=False).mean()
        for tag, x in _CURVES.items():
            if x in means and means[x].gt(0).any():
                points = means[[x, "val_accuracy"]].dropna()
                for step, accuracy in points.itertuples(index=False):
                    logger.log_metrics({f"val_accuracy/{tag}": accuracy}, round(step))
        logger.finalize("success")
    logger = TensorBoardLogger(folder, name="", version="")
    logger.experiment.add_image("comparison", imread(plot), dataformats="HWC")
    logger.finalize("success")
