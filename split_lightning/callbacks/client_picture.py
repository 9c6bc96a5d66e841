"""`ClientPicture`: each client's loss and accuracy by round, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from split_lightning.callbacks.logs import log_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {"loss": "training loss", "accuracy": "validation accuracy"}


class ClientPicture(pl.Callback):
    """Draws the clients' losses and accuracies as heat maps, clients by rounds.

    TensorBoard gives all curves of a run one colour, so that its charts do not show
    which curve is which client's. The picture goes to the loggers that show pictures
    (`clients/by_round`) and to a PNG file, at the end of the fit. There is none of a
    single client. What is drawn is in checkpoints, so that a run that resumes has all
    rounds.

    Args:
        folder: Where `clients.png` is written; `None`: to loggers only.

    Attributes:
        rows: By round, from 1: each client's `loss` and `accuracy`, as vectors of shape
            (num_clients,) or shorter. They are NaN where a client took no part.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.rows: dict[int, dict[str, Tensor]] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.clients.accuracies = {}
        if trainer.ckpt_path is None:  # a run of its own
            self.rows = {}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        validated, pl_module.clients.accuracies = pl_module.clients.accuracies, {}
        self.rows[trainer.current_epoch + 1] = {
            "loss": _vector(pl_module.client_losses()),
            "accuracy": _vector(validated),
        }

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        vectors = [vector for row in self.rows.values() for vector in row.values()]
        if max(map(len, vectors), default=0) < 2:
            return
        figure = draw_clients(self.rows)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / "clients.png", dpi=120)
        log_figure(trainer, "clients/by_round", figure)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": {number: dict(row) for number, row in self.rows.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = dict(state_dict["rows"])


def _vector(values: Mapping[int, float]) -> Tensor:
    vector = torch.full((max(values, default=-1) + 1,), torch.nan)
    for client_id, value in values.items():
        vector[client_id] = value
    return vector


def draw_clients(rows: Mapping[int, Mapping[str, Tensor]]) -> Figure:
    """Returns heat maps of clients by rounds; what was not measured is grey.

    Args:
        rows: By round: each client's `loss`, and `accuracy` where it was measured.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rounds = list(rows)
    vectors = [row[name] for name in _TITLES for row in rows.values()]
    joint = pad_sequence(vectors, padding_value=torch.nan)  # (num_clients, 2 * rounds)
    values = dict(zip(_TITLES, joint.chunk(2, dim=1), strict=True))
    drawn = [name for name in _TITLES if not values[name].isnan().all()]
    num_clients = len(joint)
    height = min(2.2 + 0.16 * num_clients, 12.0)
    figure = Figure(figsize=(5.2 * max(len(drawn), 1), height), layout="constrained")
    for number, name in enumerate(drawn, start=1):
        axes = figure.add_subplot(1, len(drawn), number)
        kind = "viridis_r" if name == "loss" else "viridis"
        axes.set_facecolor("0.85")  # shows where there is no value
        image = axes.imshow(
            values[name].numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap=kind,
            extent=(rounds[0] - 0.5, rounds[-1] + 0.5, num_clients - 0.5, -0.5),
        )
        if name == "accuracy" and image.norm.vmin == image.norm.vmax:
            image.set_clim(0, 1)  # matplotlib's own range could begin below 0
        figure.colorbar(image)
        axes.set(xlabel="round", ylabel="client", title=f"Clients: {_TITLES[name]}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    return figure
