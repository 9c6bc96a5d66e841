"""Mean training losses of a round, over all clients and by client."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from torch import Tensor

from split_lightning.pending import here, is_away
from split_lightning.processes import summed

# By client: the sum of its samples' losses, and their number.
Sums: TypeAlias = dict[int, tuple[Tensor | float, int]]


class RoundLosses:
    """Sums up the losses of the batches of a round, as this process sees them."""

    def __init__(self) -> None:
        self._sums: Sums = {}
        # Losses on their way, and those behind them: client, loss, number of samples.
        self._coming: list[tuple[int, Any, int]] = []

    def add(self, client_id: int, loss: Any, num_samples: int) -> None:
        """Adds the mean loss of some samples of a client; it may be on its way."""
        self._coming.append((client_id, loss, num_samples))
        if isinstance(loss, Tensor):
            self._settle()

    def _settle(self) -> None:
        """Sums up what is here, in order, until the next that is not."""
        while self._coming and not is_away(self._coming[0][1]):
            client_id, loss, num_samples = self._coming.pop(0)
            total, count = self._sums.get(client_id, (0.0, 0))
            own = here(loss).float()
            self._sums[client_id] = total + own * num_samples, count + num_samples

    @property
    def sums(self) -> Sums:
        """For each client the sum of its samples' losses, and their number."""
        for _, loss, _ in self._coming:
            here(loss)
        self._settle()
        return self._sums

    @sums.setter
    def sums(self, sums: Sums) -> None:
        self._sums, self._coming = sums, []

    def by_client(self, trainer: pl.Trainer) -> dict[int, Tensor | float]:
        """Returns each client's mean over all processes; each must call it."""
        return {k: s / n for k, (s, n) in self._of_all(trainer).items()}

    def mean(self, trainer: pl.Trainer) -> Tensor | float:
        """Returns the mean over all clients and processes; each must call it."""
        sums = self._of_all(trainer).values()
        return sum(total for total, _ in sums) / max(sum(n for _, n in sums), 1)

    def take_over(self, sums: list[Sums], rank: int, world_size: int) -> None:
        """Continues from the sums of each process.

        Another number of processes than there were has their total in the first.
        """
        if len(sums) == world_size:
            self.sums = dict(sums[rank])
        elif rank > 0:
            self.sums = dict.fromkeys(sums[0], (0.0, 0))
        else:
            self.sums = {
                k: (sum(own[k][0] for own in sums), sum(own[k][1] for own in sums))
                for k in sums[0]
            }

    def _of_all(self, trainer: pl.Trainer) -> Sums:
        if trainer.world_size == 1 or not self.sums:
            return self.sums
        own = [[float(total), float(count)] for total, count in self.sums.values()]
        of_all = summed(trainer, torch.tensor(own)).tolist()
        return {k: (s, int(n)) for k, (s, n) in zip(self.sums, of_all, strict=True)}
