"""`ParallelSplitLearning` and `GPSL`: clients train together in each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from typing_extensions import override

from split_lightning.protocols.actions import (
    Average,
    Buffers,
    Contribute,
    OptimizerState,
    Policy,
    Synchronize,
    Train,
)
from split_lightning.protocols.protocol import Protocol, check_count, check_policies
from split_lightning.protocols.round import Round

Every: TypeAlias = int | Literal["step"] | None


class ParallelSplitLearning(Protocol):
    """Clients train in each step together; the server sees their samples as one batch.

    Parallel split learning (Jeon and Kim 2020, https://doi.org/10.1109/ICOIN48656.2020.
    9016486). Each client has a batch of its own in a step, as long as it has samples.

    Args:
        every: When clients' segments are averaged, weighted by samples: after every so
            many rounds; after each step (`step`), by averaging their gradients (for SGD
            the same); or never (`None`): each client has its own.
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.
        optimizer_state: What happens to clients' optimizer state where weights are
            averaged after rounds: each keeps its own (`keep`), it is averaged
            (`travel`), or it is dropped (`reset`).
        buffers: Whether buffers (BatchNorm's statistics) are averaged with them.

    Raises:
        ValueError: If an argument is out of range, or would change nothing.
    """

    together = True

    def __init__(
        self,
        every: Every = None,
        clients_per_round: int | None = None,
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
    ) -> None:
        super().__init__(clients_per_round)
        if every != "step":
            check_count("every", every, "rounds, the word step, or null for never")
        check_policies(optimizer_state, buffers)
        policies = {"optimizer_state": optimizer_state, "buffers": buffers}
        for name, value in policies.items():
            default = "keep" if name == "optimizer_state" else "average"
            if value != default and not isinstance(every, int):
                raise ValueError(
                    f"Expected argument `{name}` to be {default!r} where clients are "
                    f"not averaged after rounds (every={every}), but got {value!r}."
                )
        self.every = every
        self.cohort = "mean" if every == "step" else None
        self.moves_weights = every is not None
        self.optimizer_state: OptimizerState = optimizer_state
        self.policy = Policy(optimizer_state, buffers=buffers)

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        is_due = isinstance(self.every, int) and round.is_due(self.every)
        for batches in round.together(round.clients(self.clients_per_round)):
            yield Train(batches)
            if self.every == "step":
                yield Synchronize(tuple(batch.client_id for batch in batches))
            for batch in batches if is_due else ():
                if batch.ends_round:
                    yield Contribute(batch.client_id, ("client",), self.policy)
        if is_due:
            yield Average(("client",), self.policy)


class GPSL(Protocol):
    """Clients train on one batch that is drawn from the samples of all of them.

    Global sampling (https://arxiv.org/abs/2407.15738): each client's part of a batch is
    in proportion to the samples that it has left. Their gradients are summed at each
    step, so that this is SGD of the unsplit network.

    Args:
        joint_norm: Whether BatchNorm sees the samples of all clients as one batch, for
            which they exchange sums, in the forward pass and in the backward pass; else
            it sees each client's by themselves.
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.

    Raises:
        ValueError: If an argument is out of range.
    """

    together = True
    draws_samples = True
    cohort = "sum"

    def __init__(
        self, joint_norm: bool = True, clients_per_round: int | None = None
    ) -> None:
        super().__init__(clients_per_round)
        self.joint_norm = joint_norm

    @override
    def plan(self, round: Round) -> Iterator[Any]:
        clients = round.clients(self.clients_per_round)
        for batches in round.together(clients, "proportional"):
            yield Train(batches)
            taking_part = tuple(batch.client_id for batch in batches)
            if self.joint_norm:  # then all have the same buffers
                yield Synchronize(taking_part, ("parameters",))
            else:
                yield Synchronize(taking_part)
