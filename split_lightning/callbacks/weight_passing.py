"""`RoundRobinWeightPassing`: each client goes on from the last one's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from typing_extensions import override

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule


class WeightPassing(pl.Callback):
    """Base of all callbacks that give the turn to a client.

    They call `module.hand_over(client_id)`, so that the client goes on from the last
    one's weights, or `module.switch_to(client_id)`, so that it goes on from its own.

    Attributes:
        enabled: Whether weights are handed over.
    """

    enabled: bool = True


class RoundRobinWeightPassing(WeightPassing):
    """Passes the client segment on whenever the turn goes to another client.

    The next client gets the whole state of the last one's segment, parameters and
    buffers (BatchNorm statistics); what becomes of the optimizer's state is the
    module's `optimizer_state`. The first client of a round takes over from the last
    one of the round before.

    Args:
        enabled: `False` is the baseline without weight passing: each client goes on
            from its own weights, with its own optimizer state, and only the server
            sees all.

    Example::

        trainer = Trainer(callbacks=[RoundRobinWeightPassing()])
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        module: SplitLightningModule = pl_module
        if module.clients.active == batch.client_id:
            return
        if not self.enabled:
            module.switch_to(batch.client_id)
        elif module.clients.active is not None:
            module.hand_over(batch.client_id)

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.enabled:  # each client validates its own weights
            pl_module.clients.show(batch.client_id)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.clients.show_active()
