"""A plan, grouped into training steps: each with the actions around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from split_lightning.protocols.actions import Action, Train


class Step(NamedTuple):
    """A training step: what the Trainer gets as a batch.

    Attributes:
        parts: The batch of each client that takes part: a `ClientBatch`, or a `Planned`
            one before its samples are loaded.
        before: The actions since the last step.
        after: The actions behind the round's last step.
        is_last: Whether it is the round's last step.
        upcoming: The batches of the next step, where it may overlap this one.
    """

    parts: tuple[Any, ...]
    before: tuple[Action, ...] = ()
    after: tuple[Action, ...] = ()
    is_last: bool = False
    upcoming: tuple[Any, ...] = ()

    @property
    def client_ids(self) -> tuple[int, ...]:
        """The clients that take part."""
        return tuple(part.client_id for part in self.parts)

    def may_overlap(self, before: Step) -> bool:
        """Returns whether the clients may begin while another step is computed.

        Args:
            before: The step before this one.
        """
        own = set(self.client_ids)
        is_free = not any(a.concerns(client) for a in self.before for client in own)
        return is_free and own.isdisjoint(before.client_ids)

    @property
    def ends_turn(self) -> bool:
        """Whether other clients train in the next step."""
        return bool(self.parts[0].ends_turn)

    @property
    def share(self) -> float:
        """The part of the step's samples that this process has."""
        return float(self.parts[0].share)

    @property
    def num_samples(self) -> int:
        """Number of samples that are this process's own."""
        return sum(part.num_samples for part in self.parts)

    @property
    def num_samples_of_all(self) -> int:
        """Number of samples, of all processes."""
        return sum(part.num_samples_of_all for part in self.parts)

    def to(self, device: Any) -> Step:
        """Returns the step with its samples on a device."""
        return self._replace(parts=tuple(part.to(device) for part in self.parts))


def steps_of(plan: Iterable[Any]) -> Iterator[Step]:
    """Yields the training steps of a plan.

    Raises:
        ValueError: If the plan has something that is no action, or actions alone.
    """
    before: list[Action] = []
    step: Step | None = None
    for action in plan:
        if isinstance(action, Action):
            before.append(action)
        elif isinstance(action, Train):
            if step is not None:
                yield step
            step, before = Step(action.batches, tuple(before)), []
        else:
            raise ValueError(
                "Expected the plan of a protocol to yield Train(...), or objects of "
                f"subclasses of Action, but got {action!r}."
            )
    if step is not None:
        yield step._replace(after=tuple(before), is_last=True)
    elif before:
        raise ValueError(
            "Expected the plan of a protocol to yield Train(...) in each round, around "
            f"which its actions are applied, but got {before[0]!r} without any."
        )
