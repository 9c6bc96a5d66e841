"""`Protocol`: the base of all protocols, a Lightning callback with a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytorch_lightning as pl
from typing_extensions import override

from split_lightning.engines.engine import Cohort, Engine
from split_lightning.party import Party
from split_lightning.protocols.actions import Action, Buffers, OptimizerState
from split_lightning.protocols.plan import Step, steps_of
from split_lightning.protocols.round import Round

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule


class Protocol(pl.Callback, ABC):
    """Plans which client trains when, and how weights flow: the actions of each round.

    A plan is a function of the seed, the round and the sizes of the partition. The data
    module yields its training steps; this callback applies the actions around them.
    A protocol of your own is a subclass with a `plan`.

    Args:
        clients_per_round: Number of clients that take part in a round, drawn anew for
            each; `None`: all.

    Attributes:
        num_servers: Number of servers, each for a group of neighbouring clients;
            `None`: one for each client.
        together: Whether several clients train in one step.
        sequential: Whether all clients train one server, one after the other.
        cohort: Whether these share one state, by the `mean` of their gradients,
            weighted by samples, or by the `sum`; `None`: each has its own.
        joint_norm: Whether BatchNorm of a cohort sees all its samples as one batch.
        unsplit_at: Which role has the whole network; `None`: it is split.
        pools_samples: Whether one party has the samples of all clients.
        draws_samples: Whether the numbers of samples in a step are random.
        overlapping: Whether turns run at the same time, in an order by their seconds.
        in_flight: Number of batches that a client may have on their way.
        server_work: How often a server computes a batch in a step.
        steps_each_batch: Why gradients of several batches cannot wait for a step;
            empty: they can.
        moves_weights: Whether clients get weights from other parties.

    Raises:
        ValueError: If `clients_per_round` is not positive.

    Example::

        class Alternating(Protocol):
            def plan(self, round):
                for client, batches in round.turns(round.clients()):
                    yield PassWeights(to=client)
                    for batch in batches:
                        yield Train((batch,))
    """

    num_servers: int | None = 1
    together: bool = False
    sequential: bool = False
    cohort: Cohort | None = None
    joint_norm: bool = False
    unsplit_at: Literal["client", "server"] | None = None
    pools_samples: bool = False
    draws_samples: bool = False
    overlapping: bool = False
    in_flight: int = 1
    server_work: int = 1
    steps_each_batch: str = ""
    moves_weights: bool = True

    def __init__(self, clients_per_round: int | None = None) -> None:
        check_count("clients_per_round", clients_per_round, "clients, or null for all")
        self.clients_per_round = clients_per_round
        self._closed = False  # whether the round's last actions were applied
        # The last action of each class, and with the same roles, of the round.
        self._applied: dict[tuple[type, tuple[str, ...]], Action] = {}

    @abstractmethod
    def plan(self, round: Round) -> Iterator[Any]:
        """Yields the actions of a round."""

    def steps(self, round: Round) -> Iterator[Step]:
        """Yields the training steps of a round.

        Raises:
            ValueError: If more clients train in one step than may.
        """
        room = self.num_together(len(round.sizes))
        for step in steps_of(self.plan(round)):
            if len(step.parts) > room:
                remedy = (
                    f"Draw at most {room} (`clients_per_round`) with "
                    "round.clients(self.clients_per_round)."
                    if self.together
                    else "Set `together = True` on the protocol's class."
                )
                raise ValueError(
                    f"{len(step.parts)} clients train in one step of "
                    f"{type(self).__name__}. {remedy}"
                )
            yield step

    @property
    def trains_one_network(self) -> bool:
        """Whether all clients train the same weights, in turn or together."""
        return self.cohort is not None or self.pools_samples

    def num_together(self, num_clients: int) -> int:
        """Returns the largest number of clients in one step."""
        if not self.together:
            return 1
        return min(self.clients_per_round or num_clients, num_clients)

    def serve(self, party: Party, engine: Engine) -> Any:
        """Returns what computes for a server: its party, or what wraps it."""
        return party

    def carry_out(
        self, actions: Iterable[Action], module: SplitLightningModule
    ) -> None:
        """Applies actions."""
        for action in actions:
            action.apply(module.engine)
            self._applied[type(action), action.roles] = action

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._closed = False
        self._applied = {}

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.carry_out(batch.before, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if batch.is_last:
            self._closed = True
            self.carry_out(batch.after, pl_module)
        elif trainer.is_last_batch:
            self._close(trainer, pl_module, batch_idx + 1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.overlapping and not self._closed:
            self._close(trainer, pl_module, trainer.fit_loop.batch_idx + 1)
        if not pl_module.skipped_batches:  # these were not averaged
            self.require_no_leak(pl_module.engine)

    def require_no_leak(self, engine: Engine) -> None:
        """Stops where parties remember what they gave up in the round.

        Raises:
            RuntimeError: Names the parties.
        """
        for action in self._applied.values():
            leaked = sorted(action.leaked(engine))
            if leaked:
                kind = type(action).__name__
                raise RuntimeError(
                    f"{type(self).__name__} leaks states: after {kind} {leaked} still "
                    "have some of their own. Each party that trains has to take part "
                    "in it."
                )

    def _close(self, trainer: pl.Trainer, module: Any, done: int) -> None:
        """Ends a round that is cut short, such as by `limit_train_batches`."""
        self._closed = True
        loader: Any = trainer.train_dataloader
        for number, step in enumerate(loader.planned()):
            if number >= done:
                due = [own for own in (*step.before, *step.after) if own.closes]
                self.carry_out(due, module)


def check_count(name: str, count: Any, what: str) -> None:
    """Stops where a number is neither positive nor `None`.

    Raises:
        ValueError: Names the argument.
    """
    whole = isinstance(count, int) and not isinstance(count, bool)
    if count is not None and not (whole and count > 0):
        raise ValueError(
            f"Expected argument `{name}` to be a positive number of {what}, but got "
            f"{count!r}."
        )


def check_policies(
    optimizer_state: str, buffers: str = "average", server_optimizer_state: str = "keep"
) -> None:
    """Stops where a policy is unknown.

    Raises:
        ValueError: Names the argument, and what is allowed.
    """
    for name, value, choices in (
        ("optimizer_state", optimizer_state, get_args(OptimizerState)),
        ("server_optimizer_state", server_optimizer_state, get_args(OptimizerState)),
        ("buffers", buffers, get_args(Buffers)),
    ):
        if value not in choices:
            raise ValueError(
                f"Expected argument `{name}` to be one of {choices}, but got {value!r}."
            )
