"""`RoundRobinWeightPassing`: each client continues from the previous client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from split_lightning.protocols.actions import OptimizerState, PassWeights, Train
from split_lightning.protocols.protocol import Protocol, check_count, check_policies
from split_lightning.protocols.round import Round


class RoundRobinWeightPassing(Protocol):
    """Each client continues from the previous client's weights.

    Round robin of Gupta and Raskar 2018 (https://arxiv.org/abs/1810.06060). The next
    client gets the whole state of the segment, parameters and buffers (BatchNorm
    statistics). The first client of a round continues from the last one of the round
    before.

    Args:
        enabled: `False` is the baseline without weight passing: each client continues
            from its own weights, and only the server sees all clients.
        shuffle: Whether the order of the turns is random in each round; else it is
            0, 1, 2, ...
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        local_steps: Number of batches in a turn. A client with samples left gets
            another turn in the round. `None`: one turn for all its batches.
        optimizer_state: What happens to the client's optimizer state when the weights
            move: each client keeps its own (`keep`), it moves with the weights
            (`travel`), or it is dropped (`reset`).

    Raises:
        ValueError: If an argument is out of range.

    Example::

        trainer = Trainer(callbacks=[RoundRobinWeightPassing()])
    """

    sequential = True

    def __init__(
        self,
        enabled: bool = True,
        shuffle: bool = False,
        clients_per_round: int | None = None,
        local_steps: int | None = None,
        optimizer_state: OptimizerState = "keep",
    ) -> None:
        super().__init__(clients_per_round)
        check_count("local_steps", local_steps, "batches, or null for no limit")
        check_policies(optimizer_state)
        if optimizer_state != "keep" and not enabled:
            raise ValueError(
                "Expected argument `optimizer_state` to be 'keep' where no weights "
                f"move (enabled=False), but got {optimizer_state!r}."
            )
        self.enabled = self.moves_weights = enabled
        self.shuffle = shuffle
        self.local_steps = local_steps
        self.optimizer_state: OptimizerState = optimizer_state

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        clients = round.clients(self.clients_per_round, self.shuffle)
        for client, batches in round.turns(clients, self.local_steps, self.shuffle):
            if self.enabled:
                yield PassWeights(client, self.optimizer_state)
            for batch in batches:
                yield Train((batch,))

    @property
    @override
    def trains_one_network(self) -> bool:
        return self.enabled
