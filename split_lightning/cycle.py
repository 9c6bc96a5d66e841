"""`CycleSplitLightningModule`: the server trains first, then the clients."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from split_lightning import joint_step
from split_lightning.data.least_batch import shared_out
from split_lightning.data.loader import StepBatch
from split_lightning.data.schedule import batches_of
from split_lightning.manual_optimization import no_closure
from split_lightning.module import SplitLightningModule
from split_lightning.support import require_one_device


class CycleSplitLightningModule(SplitLightningModule):
    """Trains the server on pooled smashed data before the clients get gradients.

    CycleSL (https://arxiv.org/abs/2511.18611): in a step all clients send their smashed
    data up; the server takes them as a data set of its own, passes over it in batches
    that are drawn from all clients, and steps after each; then it computes, with its
    new weights, the gradients that the clients get. So the clients' and the server's
    parts are trained one after the other, and no batch of the server is of one client.

    Departure from the paper: BatchNorm of the server segment sees the smashed data in
    training mode once more when the gradients are computed.

    Args:
        server_passes: Number of the server's passes over the pooled smashed data.
        server_batch_size: Number of samples in a batch of those; `None`: all at once.
        options: The arguments of `SplitLightningModule`.

    Raises:
        ValueError: If an argument is not positive, or gradients are to be accumulated.
    """

    def __init__(
        self,
        *args: Any,
        server_passes: int = 1,
        server_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        for name, value in (
            ("server_passes", server_passes),
            ("server_batch_size", server_batch_size),
        ):
            if value is not None and value < 1:
                raise ValueError(
                    f"Expected argument `{name}` to be a positive integer, but got "
                    f"{value}."
                )
        if self.num_places > 2:
            raise ValueError(
                "Expected argument `cut_layer` to be one layer where the server trains "
                f"first, on what clients sent, but got {self.num_places - 1}: behind "
                "another cut it would have no loss of its own, and what clients send "
                "at different depths is no batch that it could draw from."
            )
        if self.accumulate_grad_batches != 1:
            raise ValueError(
                "Expected argument `accumulate_grad_batches` to be 1 where the server "
                "trains first, in steps of its own, but got "
                f"{self.accumulate_grad_batches}."
            )
        self.save_hyperparameters("server_passes", "server_batch_size", logger=False)
        self.server_passes = server_passes
        self.server_work = server_passes + 1
        self.server_batch_size = server_batch_size

    @override
    def verify(self, trainer: pl.Trainer, data: pl.LightningDataModule | None) -> None:
        super().verify(trainer, data)
        require_one_device(trainer)  # the pool is of all samples of a step

    @override
    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        self.check_turn(batch)
        client_optimizer, server_optimizer = self._both_optimizers()
        flow = self._compute(0, batch, self._inputs_of(batch))
        flow, (crossed,) = self._send(0, batch, flow)
        targets = self.channel.send_targets(batch.targets)

        # 1: the server, on batches drawn from what all clients sent up.
        pooled = [value.detach() for value in joint_step.joined(crossed.smashed)]
        step = self.trainer.strategy.optimizer_step
        for chosen in self._server_batches(len(targets)):
            logits = self.logits_of(self.server(*(v[chosen] for v in pooled)))
            loss = self.criterion(logits, targets[chosen])
            self.manual_backward(loss)
            computed = {
                "the smashed data": pooled,
                "the server's loss": (loss,),
                "the server's gradient": [p.grad for p in self.server.parameters()],
            }
            if not self.accepts(batch, batch_idx, computed):
                return torch.as_tensor(loss.detach())
            self._clip(*self._of_servers(batch))
            step(server_optimizer.optimizer, no_closure)
            server_optimizer.zero_grad()

        # 2: the gradients at the cut, of the server as it is now, and the clients.
        found = [self.logits_of(own.values) for own in self._compute(1, batch, flow)]
        losses, loss = self._loss_of(batch, found, targets)
        self.manual_backward(loss)
        server_optimizer.zero_grad()
        gradients = self._returned(batch, crossed)
        outputs, returned = joint_step.with_gradients(crossed.activations, gradients)
        if returned:
            torch.autograd.backward(outputs, returned)
        clients = self._of_clients(batch)
        computed = {
            "the loss": (loss,),
            "the gradient of the smashed data": gradients,
            "the client's gradient": [p.grad for own in clients for p in own],
        }
        if not self.accepts(batch, batch_idx, computed):
            return torch.as_tensor(loss.detach())
        if self.scheduler_interval == "batch":
            self._log_learning_rates(on_step=True)
        self._clip(*clients)
        client_optimizer.step()  # ticks `trainer.global_step`: once a step
        client_optimizer.zero_grad()
        self._after_step()
        self.end_of_step(batch, [own.detach() for own in losses], batch_idx)
        return torch.as_tensor(loss.detach())

    def _server_batches(self, num_samples: int) -> list[Tensor]:
        """Returns which samples make each batch of the server's passes."""
        size = self.server_batch_size or num_samples
        passes = [torch.randperm(num_samples) for _ in range(self.server_passes)]
        counts = batches_of(num_samples, size, num_passes=1)
        if len(counts) > 1 and counts[-1] < self.least.total:
            *others, first, second = counts
            shared = shared_out(first, second, self.least.total)
            counts = others + [count for count in shared if count]
        return [batch for order in passes for batch in torch.split(order, counts)]
