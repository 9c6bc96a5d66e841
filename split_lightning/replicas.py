"""Replicas: many parties that hold a segment of their own share few live ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from split_lightning.channel import num_bytes

OptimizerState: TypeAlias = Literal["keep", "travel", "reset"]
State: TypeAlias = dict[str, Tensor]
OptimizerStates: TypeAlias = dict[str, dict[str, Any]]  # by parameter

SHARED = -1  # the line of weights that is all parties' own


class Replicas:
    """Lets many parties share few live segments, and one optimizer of them.

    Weights go along lines: a party that acts goes on from where its line stands. Each
    party may have a line of its own (named by its number), or several share one and
    hand it over (`SHARED`, or another negative number). A live segment is a seat; only
    the lines of those who act have one. What the others must remember waits here, and
    nothing else: nothing at all where all share one line and the optimizer's state
    travels with it or is reset.

    Args:
        segment: The first live segment.
        optimizer_state: What becomes of the optimizer's state (momentum) when weights
            come from another party. `keep`: each party has its own; `travel`: it goes
            along with the weights; `reset`: it is cleared.

    Attributes:
        seats: The live segments.
        seated: The seat of each party that acts now.

    Raises:
        ValueError: If `optimizer_state` is none of these.
    """

    def __init__(self, segment: nn.Module, optimizer_state: OptimizerState) -> None:
        if optimizer_state not in get_args(OptimizerState):
            raise ValueError(
                "Expected argument `optimizer_state` to be one of "
                f"{get_args(OptimizerState)}, but got {optimizer_state!r}."
            )
        self.optimizer_state = optimizer_state
        self.seats = [segment]
        self.forget()

    def forget(self) -> None:
        """Goes back to before the first turn; the live weights stay."""
        self.seated: dict[int, int] = {}
        self._lines: list[int | None] = [None] * len(self.seats)
        self._owners: list[int | None] = [None] * len(self.seats)
        self._line_of: dict[int, int] = {}  # of each party that ever acted
        self._weights: dict[int, State] = {}  # of lines that wait
        self._initial: State = {}  # where a line without weights of its own begins
        self._optimizer_states: dict[int, OptimizerStates] = {}  # of parties that wait
        self._hidden: State = {}  # of the first seat, while another line is shown
        self._shown: int | None = None

    @property
    def active(self) -> int | None:
        """The party that has the first seat; `None` before the first turn."""
        return self._owners[0]

    def add_seats(self, segments: Sequence[nn.Module]) -> None:
        """Makes room for more lines to be live at once.

        Args:
            segments: Copies of the first live segment.
        """
        self.seats += segments
        self._lines += [None] * len(segments)
        self._owners += [None] * len(segments)

    def seat_of(self, party: int) -> nn.Module:
        """Returns the live segment of a party that acts now."""
        return self.seats[self.seated[party]]

    def acting(self) -> list[nn.Module]:
        """Returns the live segments of those who act now."""
        return [self.seats[seat] for seat in sorted(set(self.seated.values()))]

    def enter(
        self, parties: Mapping[int, int], optimizer: Optimizer, together: bool = False
    ) -> list[int]:
        """Lets parties act next, each from where its line stands.

        Args:
            parties: The line of each.
            optimizer: The optimizer of all live segments.
            together: Whether those who share a line act from it at once, so that the
                optimizer's state is the line's; else it is handed over.

        Returns:
            For each line that was handed over the bytes that would travel: the
            segment's parameters and buffers, and the optimizer's state where it
            travels too.
        """
        lines = set(parties.values())
        sent = []
        for party, line in parties.items():
            owner = line if together else party
            if line in self._lines:
                seat = self._lines.index(line)
                if self._owners[seat] != owner:
                    sent.append(self._hand_over(seat, owner, optimizer))
            else:
                seat = self._free_seat(lines)
                self._leave(seat, optimizer)
                self._arrive(seat, line, owner, optimizer)
        self.seated = {k: self._lines.index(line) for k, line in parties.items()}
        self._line_of |= parties
        return sent

    def _free_seat(self, lines: set[int]) -> int:
        free = (seat for seat, line in enumerate(self._lines) if line not in lines)
        return next(free)

    def _hand_over(self, seat: int, owner: int, optimizer: Optimizer) -> int:
        segment, before = self.seats[seat], self._owners[seat]
        sent: list[Any] = list(segment.state_dict().values())
        if self.optimizer_state == "travel":
            for parameter in segment.parameters():
                sent += optimizer.state.get(parameter, {}).values()
        else:
            states = _take_out(segment, optimizer)
            if self.optimizer_state == "keep" and before is not None:
                self._optimizer_states[before] = states
                own = self._optimizer_states.pop(owner, {})
                _put_in(segment, optimizer, own)
        self._owners[seat] = owner
        return num_bytes(value for value in sent if value is not None)

    def _leave(self, seat: int, optimizer: Optimizer) -> None:
        """Puts away what the line and the party in a seat must remember."""
        line, owner, segment = self._lines[seat], self._owners[seat], self.seats[seat]
        if line is None or owner is None:
            return
        self._weights[line] = _cloned(segment.state_dict())
        self._optimizer_states[owner] = _take_out(segment, optimizer)
        self._lines[seat] = self._owners[seat] = None

    def _arrive(self, seat: int, line: int, owner: int, optimizer: Optimizer) -> None:
        """Puts a line's weights in place, and a party's optimizer state.

        A line that has no weights of its own begins with those of the run's start, or,
        where another was shared before, with those that were handed over last.
        """
        segment = self.seats[seat]
        if not self._initial and line != SHARED:
            self._initial = self._weights.get(SHARED) or _cloned(segment.state_dict())
        own = self._weights.pop(line, self._initial)
        if own:
            segment.load_state_dict(own)
        _put_in(segment, optimizer, self._optimizer_states.pop(owner, {}))
        self._lines[seat], self._owners[seat] = line, owner

    @property
    def are_apart(self) -> bool:
        """Whether the parties' weights may differ from each other's."""
        live = {line for line in self._lines if line is not None}
        return bool(self._weights) or len(live) > 1 or bool(live and self._initial)

    def line_of(self, party: int) -> int | None:
        """Returns the line of a party; `None` where it never acted, or all are one."""
        return self._line_of.get(party) if self.are_apart else None

    def show(self, party: int) -> None:
        """Puts a party's weights into the first seat, to be evaluated.

        `show_live` ends it.
        """
        line = self._line_of.get(party)
        if not self.are_apart or (self._hidden and line == self._shown):
            return
        if not self._hidden:
            if line == self._lines[0]:
                return
            self._hidden = _cloned(self.seats[0].state_dict())
        self.seats[0].load_state_dict(self._standing(line))
        self._shown = line

    def show_live(self) -> None:
        """Puts the weights of those who act back in place."""
        if self._hidden:
            self.seats[0].load_state_dict(self._hidden)
            self._hidden = {}

    def _standing(self, line: int | None) -> State:
        """Returns the weights of a line, wherever they are."""
        if line in self._weights:
            return self._weights[line]
        if line is None or line not in self._lines:
            return self._initial or self._hidden
        seat = self._lines.index(line)
        return self.seats[seat].state_dict() if seat else self._hidden

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is remembered, in plain containers and tensors."""
        return {
            "seated": self.seated,
            "lines": self._lines,
            "owners": self._owners,
            "line_of": self._line_of,
            "weights": self._weights,
            "initial": self._initial,
            "optimizer_states": self._optimizer_states,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.seated, self._line_of = state["seated"], state["line_of"]
        self._lines, self._owners = state["lines"], state["owners"]
        self._weights, self._initial = state["weights"], state["initial"]
        self._optimizer_states = state["optimizer_states"]


def _take_out(segment: nn.Module, optimizer: Optimizer) -> OptimizerStates:
    """Takes the state of a segment's parameters out of an optimizer.

    The live parameters stay the same objects, so that nothing is copied, and the
    optimizer can never step the parameters of another party.
    """
    return {
        name: optimizer.state.pop(parameter)
        for name, parameter in segment.named_parameters()
        if parameter in optimizer.state
    }


def _put_in(
    segment: nn.Module, optimizer: Optimizer, states: Mapping[str, dict[str, Any]]
) -> None:
    """Gives an optimizer the state of a segment's parameters."""
    for name, parameter in segment.named_parameters():
        state = states.get(name)
        if state is None:
            optimizer.state.pop(parameter, None)
            continue
        for key, value in state.items():
            # From a checkpoint they come on the CPU; elsewhere nothing moves.
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = value.to(parameter.device)
        optimizer.state[parameter] = state


def _cloned(state: Mapping[str, Tensor]) -> State:
    return {name: torch.clone(tensor) for name, tensor in state.items()}
