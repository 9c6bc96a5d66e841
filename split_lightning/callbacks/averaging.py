"""`ClientAveraging`, `ServerAveraging`: segments are averaged at the ends of rounds."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import pytorch_lightning as pl
from typing_extensions import override

from split_lightning.callbacks.intervals import average_if_due, check_rounds
from split_lightning.callbacks.weight_passing import WeightPassing
from split_lightning.channel import num_bytes

Every: TypeAlias = int | Literal["step"] | None


class ClientAveraging(WeightPassing):
    """Gives each client a segment of its own, and averages them.

    The mean is weighted by the samples that each client was trained on since the last
    averaging (McMahan et al. 2017, https://arxiv.org/abs/1602.05629; SplitFed, Thapa et
    al. 2020, https://arxiv.org/abs/2004.12088). Clients that took no part are left out
    of it, and begin from it when their turn comes.

    Memory: a running sum, the last mean and the live segments. Clients that wait are
    remembered where they go on from weights of their own later: between averagings
    that are several rounds apart, and in rounds of several turns each.

    Args:
        every: `1`: at the end of each round; `r`: of each r-th; `step`: at each step,
            by averaging the gradients of those who take part, weighted by samples (for
            SGD the same as averaging the weights); `None`: never.

    Raises:
        ValueError: If `every` is none of these.
    """

    def __init__(self, every: Every = 1) -> None:
        if every != "step":
            check_rounds("every", every, "the word step, or null for never")
        self.every = every
        self.enabled = every is not None
        self.acts_together = True if every == "step" else None
        self.num_seats = 1 if every == "step" else None

    @property
    @override
    def keeps_one(self) -> bool:
        return self.every == "step"

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        clients = [part.client_id for part in batch.parts]
        if self.every == "step":
            pl_module.share(*clients)
        else:
            pl_module.switch_to(*clients)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        sent = 0
        if isinstance(self.every, int):
            sent = average_if_due("client", self.every, trainer, pl_module, batch)
        elif self.every == "step" and not pl_module.is_accumulating():
            segment = pl_module.clients.acting()[0]
            joint = pl_module.batch_norm == "joint"  # then all have the same buffers
            travels = segment.parameters() if joint else segment.state_dict().values()
            own = num_bytes(travels)
            pl_module.parties.averaged(
                "client", {part.client_id: own for part in batch.parts}
            )
            sent = 2 * len(batch.parts) * own
        pl_module.traffic.averaging_bytes += sent


class ServerAveraging(pl.Callback):
    """Averages the replicas of the server segment at the ends of rounds.

    The mean is weighted by the samples that each replica was trained on since the last
    averaging.

    Args:
        every: `1`: at the end of each round; `r`: of each r-th; `None`: never.
        remote: Whether the replicas are at different places, so that averaging them
            costs bytes; else they are copies at one server.

    Raises:
        ValueError: If `every` is none of these.
    """

    def __init__(self, every: int | None = 1, remote: bool = True) -> None:
        check_rounds("every", every, "or null for never")
        self.every = every
        self.remote = remote

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.every is None:
            return
        sent = average_if_due(
            "server", self.every, trainer, pl_module, batch, self.remote
        )
        if self.remote:
            pl_module.traffic.server_averaging_bytes += sent
