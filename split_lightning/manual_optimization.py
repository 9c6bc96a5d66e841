"""`ManualOptimization`: a client's and a server's optimizer, stepped by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from split_lightning.classifier import Classifier
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.finite import NonFinitePolicy
from split_lightning.optimizers import (
    OptimizerFactory,
    SchedulerFactory,
    make_optimizer,
    make_scheduler,
)
from split_lightning.parties import Parties
from split_lightning.route import Party


class ManualOptimization(Classifier):
    """Says when the parties' optimizers step, and does what goes with it.

    Lightning's manual optimization leaves all of it to the module: accumulation,
    clipping, schedulers, learning rates in the log.

    Args:
        num_classes: See `Classifier`, as for the next four.
        criterion: The loss.
        channels_last: Whether images and weights are laid out channels-last.
        non_finite: What becomes of a batch that is not finite.
        parties: Who holds which weights.
        client_optimizer: Makes the optimizer of the client segments' parameters.
        server_optimizer: Makes the optimizer of the server segment's parameters.
        client_scheduler: Makes the learning-rate scheduler of the client's optimizer.
        server_scheduler: Makes the learning-rate scheduler of the server's optimizer.
        scheduler_interval: When schedulers step: each `batch` that stepped the
            optimizers, or each `round`.
        gradient_clip_val: Limit for each party's gradient; `None`: no limit.
        gradient_clip_algorithm: Whether the limit is for the `norm` or each `value`.
        accumulate_grad_batches: Number of batches whose gradients make a step.
        server_lr_exponent: See `SplitLightningModule`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        criterion: nn.Module | None,
        channels_last: bool,
        non_finite: NonFinitePolicy,
        parties: Parties,
        *,
        client_optimizer: OptimizerFactory,
        server_optimizer: OptimizerFactory,
        client_scheduler: SchedulerFactory | None,
        server_scheduler: SchedulerFactory | None,
        scheduler_interval: Literal["batch", "round"],
        gradient_clip_val: float | None,
        gradient_clip_algorithm: Literal["norm", "value"],
        accumulate_grad_batches: int,
        server_lr_exponent: float,
    ) -> None:
        super().__init__(num_classes, criterion, channels_last, non_finite, parties)
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ValueError(
                "Expected argument `gradient_clip_val` to be positive, or null for no "
                f"limit, but got {gradient_clip_val}."
            )
        if accumulate_grad_batches < 1:
            raise ValueError(
                "Expected argument `accumulate_grad_batches` to be a positive integer, "
                f"but got {accumulate_grad_batches}."
            )
        self.automatic_optimization = False
        self.client_optimizer = client_optimizer
        self.server_optimizer = server_optimizer
        self.client_scheduler = client_scheduler
        self.server_scheduler = server_scheduler
        self.scheduler_interval = scheduler_interval
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.server_lr_exponent = server_lr_exponent
        self._accumulated = 0

    optimizer_names = ("client", "server")
    stashes = False  # whether it keeps the weights of batches on their way

    @override
    def is_accumulating(self) -> bool:
        return self._accumulated > 0

    def _is_time_to_step(self, ends_turn: bool) -> bool:
        is_full = self._accumulated == self.accumulate_grad_batches
        return is_full or ends_turn or self.trainer.is_last_batch

    def _after_step(self) -> None:
        self._accumulated = 0
        if self.scheduler_interval == "batch":
            self._step_schedulers()

    def _both_optimizers(self) -> list[LightningOptimizer]:
        """Returns the client's optimizer and the server's."""
        both = self.optimizers()
        assert isinstance(both, list)
        return both

    def _clip(self, *parties: Sequence[nn.Parameter]) -> None:
        """Limits each party's gradient, by itself."""
        if self.gradient_clip_val is None:
            return
        clip = nn.utils.clip_grad_norm_
        if self.gradient_clip_algorithm == "value":
            clip = nn.utils.clip_grad_value_  # type: ignore[assignment]
        for parameters in parties:
            clip(parameters, self.gradient_clip_val)

    def _step_schedulers(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()  # type: ignore[call-arg]  # needs no metric

    def _log_learning_rates(self, on_step: bool) -> None:
        both = self._both_optimizers()
        for party, optimizer in zip(("client", "server"), both, strict=True):
            lr = optimizer.param_groups[0]["lr"]
            self.log(f"lr/{party}", lr, on_step=on_step, on_epoch=not on_step)

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self._accumulated = 0

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.scheduler_interval == "round":
            self._log_learning_rates(on_step=False)
            self._step_schedulers()

    @override
    def optimizers_of(self) -> dict[str, Optimizer]:
        client, server = self._both_optimizers()
        return {"client": client.optimizer, "server": server.optimizer}

    def _num_together(self) -> int:
        """Returns how many clients may take part in a step."""
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, SplitDataModule):
            return 1
        return data.schedule.most_together(data.num_clients)

    def _live(self, party: Party) -> nn.ModuleList:
        """Returns all live segments of a party."""
        pieces = self.parties.pieces.values()
        return nn.ModuleList(s for piece in pieces for s in piece.live.get(party, ()))

    @override
    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        client = make_optimizer("client", self.client_optimizer, self._live("client"))
        server = make_optimizer("server", self.server_optimizer, self._live("server"))
        for group in server.param_groups:
            group["lr"] *= self._num_together() ** self.server_lr_exponent
        schedulers = [
            {"scheduler": make_scheduler(make, optimizer), "name": f"lr/{party}"}
            for party, make, optimizer in (
                ("client", self.client_scheduler, client),
                ("server", self.server_scheduler, server),
            )
            if make is not None
        ]
        return [client, server], schedulers

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["accumulated"] = self._accumulated

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._accumulated = checkpoint["accumulated"]


def no_closure() -> None:
    """Does nothing: gradients are there before an optimizer steps."""
