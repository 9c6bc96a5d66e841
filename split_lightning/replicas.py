"""Replicas: many parties that hold a segment of their own share few live ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from split_lightning.channel import num_bytes
from split_lightning.optimizer_states import (
    OptimizerStates,
    copied,
    flat,
    nested,
    put_in,
    states_of,
    take_out,
)
from split_lightning.resumed_options import StateFitter
from split_lightning.running_mean import RunningMean, mixed

OptimizerState: TypeAlias = Literal["keep", "travel", "reset"]
Buffers: TypeAlias = Literal["average", "keep"]
State: TypeAlias = dict[str, Tensor]

SHARED = -1  # the line of weights that is all parties' own


class Replicas:
    """Lets many parties share few live segments, and one optimizer of them.

    Weights go along lines: a party that acts goes on from where its line stands. Each
    party may have a line of its own (named by its number), or several share one and
    hand it over (`SHARED`, or another negative number). A live segment is a seat; only
    the lines of those who act have one. What the others must remember waits here, and
    nothing else: nothing at all where all share one line and the optimizer's state
    travels with it or is reset.

    Lines may be averaged: each that is done (`collect`) is added to a running mean, and
    all begin anew from it (`spread`), weighted by the samples they were trained on.
    Or each that is done is mixed into the newest (`mix`), from which the next begin
    (`begin`).

    Args:
        segment: The first live segment.
        optimizer_state: What becomes of the optimizer's state (momentum) when weights
            come from elsewhere, handed over or averaged. `keep`: each party has its
            own; `travel`: it goes along with the weights, or is averaged with them;
            `reset`: it is cleared.
        buffers: Whether buffers (BatchNorm's statistics) are averaged with the
            parameters (`average`), or each line has its own (`keep`).
        store: Makes a mapping for what waits: one in memory, or of a `SpillFolder`.

    Attributes:
        seats: The live segments.
        seated: The seat of each party that acts now.

    Raises:
        ValueError: If `optimizer_state` or `buffers` is none of these.
    """

    def __init__(
        self,
        segment: nn.Module,
        optimizer_state: OptimizerState,
        buffers: Buffers = "average",
        store: Callable[[], MutableMapping[int, Any]] = dict,
    ) -> None:
        for name, value, choices in (
            ("optimizer_state", optimizer_state, get_args(OptimizerState)),
            ("buffers", buffers, get_args(Buffers)),
        ):
            if value not in choices:
                raise ValueError(
                    f"Expected argument `{name}` to be one of {choices}, but got "
                    f"{value!r}."
                )
        self.optimizer_state = optimizer_state
        self.buffers = buffers
        self.seats = [segment]
        self._weights: MutableMapping[int, State] = store()  # of lines that wait
        # Of lines that begin anew, and of parties that wait.
        self._own_buffers: MutableMapping[int, State] = store()
        self._optimizer_states: MutableMapping[int, OptimizerStates] = store()
        self.forget()

    def forget(self) -> None:
        """Goes back to before the first turn; the live weights stay."""
        self.seated: dict[int, int] = {}
        self._lines: list[int | None] = [None] * len(self.seats)
        self._owners: list[int | None] = [None] * len(self.seats)
        self._line_of: dict[int, int] = {}  # of each party that ever acted
        self._last_owner: dict[int, int] = {}  # of each line
        for waiting in (self._weights, self._own_buffers, self._optimizer_states):
            waiting.clear()
        self._initial: State = {}  # where a line without weights of its own begins
        self._initial_optimizer: OptimizerStates = {}  # where such a one's travels
        self._samples: dict[int, int] = {}  # of each line, since the last averaging
        self._collected: set[int] = set()
        self._mean, self._optimizer_mean = RunningMean(), RunningMean()
        self._mixes = 0  # number of times that a line was mixed into the newest
        self._mixes_before: dict[int, int] = {}  # of each line that began since
        self._newest_of: int | None = None  # whose alone the newest is
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

    @property
    def live(self) -> nn.Module:
        """The live segment of the first line that has one, or what is shown."""
        live = (seat for seat, line in enumerate(self._lines) if line is not None)
        return self.seats[0 if self._hidden else next(live, 0)]

    def enter(
        self,
        parties: Mapping[int, int],
        optimizer: Optimizer,
        together: bool = False,
        seats: Mapping[int, Sequence[int]] | None = None,
    ) -> list[int]:
        """Lets parties act next, each from where its line stands.

        Args:
            parties: The line of each.
            optimizer: The optimizer of all live segments.
            together: Whether those who share a line act from it at once, so that the
                optimizer's state is the line's; else it is handed over.
            seats: The seats that each may take; `None`: any.

        Returns:
            For each line that was handed over the bytes that would travel: the
            segment's parameters and buffers, and the optimizer's state where it
            travels too.
        """
        lines, sent = set(parties.values()), []
        for party, line in parties.items():
            owner = line if together else party
            fitting = range(len(self.seats)) if seats is None else seats[party]
            if line in self._lines and self._lines.index(line) not in fitting:
                self._leave(self._lines.index(line), optimizer)
            if line not in self._lines:
                seat = self._free_seat(lines, fitting)
                self._leave(seat, optimizer)
                self._arrive(seat, line, self._last_owner.get(line, owner), optimizer)
            seat = self._lines.index(line)
            if self._owners[seat] != owner:
                sent.append(self._hand_over(seat, owner, optimizer))
            self._last_owner[line] = owner
        self.seated = {k: self._lines.index(line) for k, line in parties.items()}
        self._line_of |= parties
        return sent

    def _free_seat(self, lines: set[int], fitting: Sequence[int]) -> int:
        free = [seat for seat in fitting if self._lines[seat] not in lines]
        if not free:
            raise RuntimeError(
                f"{len(lines)} clients act at once, and there is room for "
                f"{len(fitting)}. Train with trainer.fit(module, datamodule=data)."
            )
        return free[0]

    def _hand_over(self, seat: int, owner: int, optimizer: Optimizer) -> int:
        segment, before = self.seats[seat], self._owners[seat]
        sent: list[Any] = list(segment.state_dict().values())
        if self.optimizer_state == "travel":
            for parameter in segment.parameters():
                sent += optimizer.state.get(parameter, {}).values()
        else:
            states = take_out(segment, optimizer)
            if self.optimizer_state == "keep" and before is not None:
                self._optimizer_states[before] = states
                own = self._optimizer_states.pop(owner, {})
                put_in(segment, optimizer, own)
        self._owners[seat] = owner
        return num_bytes(value for value in sent if value is not None)

    def _leave(self, seat: int, optimizer: Optimizer) -> None:
        """Puts away what the line and the party in a seat must remember."""
        line, owner, segment = self._lines[seat], self._owners[seat], self.seats[seat]
        if line is None or owner is None:
            return
        states = take_out(segment, optimizer)
        if line not in self._collected:
            self._weights[line] = _cloned(segment.state_dict())
            self._optimizer_states[owner] = states
        else:
            if self.buffers == "keep":
                self._own_buffers[line] = _cloned(_buffers_of(segment))
            if self.optimizer_state == "keep":
                self._optimizer_states[owner] = states
        self._lines[seat] = self._owners[seat] = None

    def _arrive(self, seat: int, line: int, owner: int, optimizer: Optimizer) -> None:
        """Puts a line's weights in place, and a party's optimizer state.

        A line that has no weights of its own begins with those that were averaged
        last, or else with those of the run's start, or, where another was shared
        before, with those that were handed over last.
        """
        segment = self.seats[seat]
        if not self._initial and line != SHARED:
            self._initial = self._weights.get(SHARED) or _cloned(segment.state_dict())
        states = self._optimizer_states.pop(owner, {})
        if line not in self._weights and self.optimizer_state == "travel":
            states = copied(self._initial_optimizer)
        begins = {**self._initial, **self._own_buffers.pop(line, {})}
        own = self._weights.pop(line, begins)
        if own:
            segment.load_state_dict(own)
        put_in(segment, optimizer, states)
        self._lines[seat], self._owners[seat] = line, owner

    def trained(self, samples: Mapping[int, int]) -> None:
        """Notes on how many samples parties that act were trained."""
        for party, count in samples.items():
            line = self._line_of[party]
            self._samples[line] = self._samples.get(line, 0) + count

    def collect(self, lines: Iterable[int], optimizer: Optimizer) -> None:
        """Adds lines to the running mean that act no more before it is spread."""
        kept = set(_buffers_of(self.seats[0])) if self.buffers == "keep" else set()
        for line in lines:
            weight = self._samples.pop(line, 0)
            if line in self._collected or weight == 0:
                continue
            self._collected.add(line)
            if line in self._lines:
                segment = self.seats[self._lines.index(line)]
                state, states = segment.state_dict(), states_of(segment, optimizer)
            else:
                state = self._weights[line]
                states = self._optimizer_states.get(self._last_owner[line], {})
            averaged = {k: v for k, v in state.items() if k not in kept}
            self._mean.add(averaged, weight)
            if self.optimizer_state == "travel":
                self._optimizer_mean.add(flat(states), weight)

    def spread(self, optimizer: Optimizer) -> dict[int, int]:
        """Lets all lines begin anew from the mean of those that were trained.

        Returns:
            Of the party that trained each line last the bytes that would travel to
            where the mean is made; as many come back.
        """
        live = [line for line in self._lines if line is not None]
        self.collect([*self._weights, *live], optimizer)
        if not self._collected:
            return {}
        mean = self._mean.state()
        self._initial = {**self._initial, **mean}
        self._initial_optimizer = nested(self._optimizer_mean.state())
        travels = [*mean.values(), *flat(self._initial_optimizer).values()]
        sent = {self._last_owner[k]: num_bytes(travels) for k in self._collected}
        if self.buffers == "keep":
            names = _buffers_of(self.seats[0]).keys()
            for line, state in self._weights.items():
                self._own_buffers[line] = {name: state[name] for name in names}
        for seat, segment in enumerate(self.seats):
            self._leave(seat, optimizer)
            segment.load_state_dict(self._initial)
        self._weights.clear()
        self._samples, self.seated = {}, {}
        self._collected, self._last_owner = set(), {}
        self._mean, self._optimizer_mean = RunningMean(), RunningMean()
        if self.optimizer_state != "keep":
            self._optimizer_states.clear()
        return sent

    def begin(self, party: int, optimizer: Optimizer) -> int:
        """Lets a party act next on a line of its own, from the newest weights.

        The newest are those that were mixed last, or else those of the run's start.

        Returns:
            The bytes that would travel to it: none where the newest are its own alone,
            or the start's.
        """
        comes = self._mixes > 0 and self._newest_of != party
        self.enter({party: party}, optimizer)
        self._mixes_before[party] = self._mixes
        return self._travelling_bytes(party, optimizer) if comes else 0

    def running(self) -> list[int]:
        """Returns the parties that began, and are not mixed in yet, in that order."""
        return list(self._mixes_before)

    def age_of(self, party: int) -> int:
        """Returns how often the newest changed since a party began."""
        return self._mixes - self._mixes_before[party]

    def mix(self, party: int, share: float, optimizer: Optimizer) -> int:
        """Mixes the weights of a party that is done into the newest.

        Parameters, and buffers where they are averaged, become (1 - share) times the
        newest and share times the party's; so does the optimizer's state that travels.

        Args:
            party: Who is done.
            share: From 0, which leaves the newest as they are and is no change of them,
                to 1, a hand-off.
            optimizer: The optimizer of all live segments.

        Returns:
            The bytes that would travel from it.
        """
        self.enter({party: party}, optimizer)
        segment = self.seat_of(party)
        sent = self._travelling_bytes(party, optimizer) if share else 0
        kept = set(_buffers_of(segment)) if self.buffers == "keep" else set()
        own = {k: v for k, v in segment.state_dict().items() if k not in kept}
        self._initial = mixed(self._initial, own, share)
        states = states_of(segment, optimizer)
        if self.optimizer_state == "travel":
            newest = mixed(flat(self._initial_optimizer), flat(states), share)
            self._initial_optimizer = nested(newest)
        if share:
            done = self._optimizer_states.keys() - self._mixes_before.keys()
            for other in done if self.optimizer_state == "reset" else ():
                del self._optimizer_states[other]  # the newest were its own till now
            self._newest_of = party if share == 1 else None
            self._mixes += 1
        seat = self.seated[party]
        self._collected.add(party)  # so that its weights are not put away
        self._leave(seat, optimizer)
        self._collected.remove(party)
        if self.optimizer_state == "reset" and self._newest_of == party:
            self._optimizer_states[party] = states
        self.seated = {}
        self._samples.pop(party, None)
        del self._mixes_before[party]
        segment.load_state_dict(self._initial)
        return sent

    @property
    def weight_bytes(self) -> int:
        """The bytes of a party's weights as they travel to be mixed."""
        segment = self.seats[0]
        without = self.buffers == "keep"
        state = segment.parameters() if without else segment.state_dict().values()
        return num_bytes(state)

    def _travelling_bytes(self, party: int, optimizer: Optimizer) -> int:
        """Returns the bytes of what a party that acts would send to be mixed."""
        own: OptimizerStates = {}
        if self.optimizer_state == "travel":
            own = states_of(self.seat_of(party), optimizer)
        return self.weight_bytes + num_bytes(flat(own).values())

    @property
    def are_apart(self) -> bool:
        """Whether the parties' weights may differ from each other's."""
        live = {line for line in self._lines if line is not None}
        waiting = bool(self._weights or self._own_buffers)
        return waiting or len(live) > 1 or bool(live and self._initial)

    def last_on(self, line: int) -> int | None:
        """Returns the party that acted last on a line; `None` before the first."""
        return self._last_owner.get(line)

    def known(self) -> list[int]:
        """Returns the parties that ever acted."""
        return sorted(self._line_of)

    def line_of(self, party: int) -> int | None:
        """Returns the line of a party; `None` where it never acted, or all are one."""
        return self._line_of.get(party) if self.are_apart else None

    def hold(self, weights: Mapping[int, State | None]) -> None:
        """Lets parties stand at given weights; those of `None` have the live ones."""
        self._line_of = {party: party for party in weights}
        self._weights = {k: state for k, state in weights.items() if state is not None}

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
        if line is not None and line in self._weights:
            return self._weights[line]
        if line is None or line not in self._lines:
            begins = self._initial or self._hidden
            own = {} if line is None else self._own_buffers.get(line, {})
            return {**begins, **own}
        seat = self._lines.index(line)
        return self.seats[seat].state_dict() if seat else self._hidden

    def fit_optimizer_states(self, fitter: StateFitter) -> None:
        """Fits optimizer states that wait to optimizers with other options."""
        parameters = dict(self.seats[0].named_parameters())

        def fitted(states: OptimizerStates) -> OptimizerStates:
            return {k: fitter.fitted(parameters[k], own) for k, own in states.items()}

        for owner in list(self._optimizer_states):
            self._optimizer_states[owner] = fitted(self._optimizer_states[owner])
        self._initial_optimizer = fitted(self._initial_optimizer)
        mean = fitted(nested(self._optimizer_mean.sums()))
        self._optimizer_mean.keep(flat(mean).keys())

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is remembered, in plain containers and tensors."""
        return {
            "seated": self.seated,
            "lines": self._lines,
            "owners": self._owners,
            "line_of": self._line_of,
            "last_owner": self._last_owner,
            "weights": dict(self._weights),
            "own_buffers": dict(self._own_buffers),
            "initial": self._initial,
            "initial_optimizer": self._initial_optimizer,
            "optimizer_states": dict(self._optimizer_states),
            "samples": self._samples,
            "collected": list(self._collected),
            "mixes": self._mixes,
            "mixes_before": self._mixes_before,
            "newest_of": self._newest_of,
            "mean": self._mean.state_dict(),
            "optimizer_mean": self._optimizer_mean.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        device = next(self.seats[0].parameters(), torch.empty(0)).device
        self.seated, self._line_of = state["seated"], state["line_of"]
        self._lines, self._owners = state["lines"], state["owners"]
        self._last_owner, self._samples = state["last_owner"], state["samples"]
        self._initial = state["initial"]
        self._initial_optimizer = state["initial_optimizer"]
        for waiting, name in (
            (self._weights, "weights"),
            (self._own_buffers, "own_buffers"),
            (self._optimizer_states, "optimizer_states"),
        ):
            waiting.clear()
            waiting.update(state[name])
        self._collected = set(state["collected"])
        self._mixes = state.get("mixes", 0)
        self._mixes_before = state.get("mixes_before", {})
        self._newest_of = state.get("newest_of")
        self._mean.load_state_dict(state["mean"], device)
        self._optimizer_mean.load_state_dict(state["optimizer_mean"], device)


def _buffers_of(segment: nn.Module) -> State:
    """Returns those entries of a segment's state that are no parameters."""
    trained = {name for name, _ in segment.named_parameters(remove_duplicate=False)}
    return {k: v for k, v in segment.state_dict().items() if k not in trained}


def _cloned(state: Mapping[str, Tensor]) -> State:
    return {name: torch.clone(tensor) for name, tensor in state.items()}
