"""`RoundRobinWeightPassing`: each client goes on from the last one's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from typing_extensions import override

from split_lightning.callbacks.intervals import average_if_due, check_rounds

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule


class WeightPassing(pl.Callback):
    """Base of all callbacks that give the turn to clients.

    Before a step they call one of the module's `hand_over(client_id)`, so that the
    client goes on from the last one's weights, `switch_to(*client_ids)`, so that each
    goes on from its own, or `share(*client_ids)`, so that they act on the same weights
    together.

    Attributes:
        enabled: Whether weights are handed over.
        acts_together: Whether it gives turns to clients that act together
            (`ParallelSchedule`), to one at a time, or to both (`None`).
        hands_in: Whether it is for clients whose turns run at the same time
            (`AsynchronousSchedule`).
        num_seats: For how many clients of a step weights of their own must be live;
            `None`: for all of them.
    """

    enabled: bool = True
    acts_together: bool | None = False
    hands_in: bool = False
    num_seats: int | None = 1

    @property
    def keeps_one(self) -> bool:
        """Whether all clients of a server train the same weights."""
        return False


class RoundRobinWeightPassing(WeightPassing):
    """Passes the client segment on whenever the turn goes to another client.

    The next client gets the whole state of the last one's segment, parameters and
    buffers (BatchNorm statistics); what becomes of the optimizer's state is the
    module's `optimizer_state`. The first client of a round takes over from the last
    one of the round before. Where there are several servers, it is passed on among
    the clients of each.

    Args:
        enabled: `False` is the baseline without weight passing: each client goes on
            from its own weights, with its own optimizer state, and only the server
            sees all.
        average_every: With several servers: whether the segments that each server's
            clients pass on are averaged at the end of every so-many-th round; `None`:
            never.

    Raises:
        ValueError: If `average_every` is not a positive number of rounds.

    Example::

        trainer = Trainer(callbacks=[RoundRobinWeightPassing()])
    """

    def __init__(self, enabled: bool = True, average_every: int | None = None) -> None:
        check_rounds("average_every", average_every, "or null for never")
        self.enabled = enabled
        self.average_every = average_every

    @property
    @override
    def keeps_one(self) -> bool:
        return self.enabled

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        module: SplitLightningModule = pl_module
        if self.enabled:
            module.hand_over(batch.client_id)
        else:
            module.switch_to(batch.client_id)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.average_every is not None:
            sent = average_if_due(
                "client", self.average_every, trainer, pl_module, batch
            )
            pl_module.traffic.averaging_bytes += sent
