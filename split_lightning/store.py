"""`StateStore`: which party has which state of a segment, and which states are live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from split_lightning.message import role_of
from split_lightning.running_mean import RunningMean

Part: TypeAlias = Literal["parameters", "buffers", "optimizer"]
# Tensors by name; of an optimizer a dictionary for each parameter.
State: TypeAlias = dict[str, Any]

# Returns the part of a parameter's optimizer state that its optimizer uses.
Fit: TypeAlias = Callable[[nn.Parameter, dict[str, Any]], dict[str, Any]]

WEIGHTS: tuple[Part, ...] = ("parameters", "buffers")
PARTS: tuple[Part, ...] = (*WEIGHTS, "optimizer")


class StateAway(ABC):
    """A state at rest that is not in this process."""

    @abstractmethod
    def fetch(self) -> State:
        """Returns the state, once it is here."""


class Seat(NamedTuple):
    """A live copy of a segment.

    Attributes:
        module: The segment.
        role: The role of the parties that it serves; its optimizer has the parameters.
    """

    module: nn.Module
    role: str


class StateStore:
    """Stores the states of one segment: of every party that has it.

    A state has three parts, each of which moves by itself: parameters, buffers and
    optimizer state. The states of the parties that train are live, in seats; the others
    are at rest. A state at rest is never modified, so equal states are one object. A
    party without a state of its own has the common one: that of the start, or the last
    mean.

    Args:
        depth: The depth of the segment in the network, from 0.
        seats: The live copies.
        at_rest: Makes a mapping for states at rest: in memory, or in files.

    Attributes:
        seats: The live copies.
        roles: The roles of the parties that may have the segment.
        own: The states at rest: by part, of each party that has one of its own, or
            what fetches it from elsewhere (`StateAway`). The
            momentum of a client that waits is in `own["optimizer"]`.
        common: The common state of each role, by part; empty where no party needs it.
        start: The state from which every party begins, by part; empty before it is
            needed.
        newest: The party whose state alone is the common one; `None`: there is none.
        last: The party that had the weights last, for each group of clients that pass
            them on.
        samples: How many samples each party trained on since the last mean.
        optimizers: The optimizer of each role.
    """

    def __init__(
        self,
        depth: int,
        seats: Sequence[Seat],
        at_rest: Callable[[], MutableMapping[str, State]] = dict,
    ) -> None:
        self.depth = depth
        self.seats = list(seats)
        self.roles = sorted({seat.role for seat in self.seats})
        self.optimizers: Mapping[str, Optimizer] = {}
        self._persistent = set(self.seats[0].module.state_dict())
        self._weights = [p for p in WEIGHTS if self._view(0, p)]  # what it has of them
        self.own: dict[Part, MutableMapping[str, Any]] = {p: at_rest() for p in PARTS}
        self._versions: dict[tuple[str, Part], tuple[int, State | None]] = {}
        self.forget()

    def forget(self) -> None:
        """Returns to the time before the first step; the live weights stay."""
        self._names: list[dict[Part, str | None]] = [
            dict.fromkeys(PARTS) for _ in self.seats
        ]
        self.start: dict[Part, State] = {}
        self.common: dict[str, dict[Part, State]] = {role: {} for role in self.roles}
        self.last: dict[int, str] = {}
        self.samples: Counter[str] = Counter()
        self.newest: str | None = None
        for states in self.own.values():
            states.clear()

    def add_seats(self, seats: Iterable[Seat]) -> None:
        """Adds live copies, for parties that train in the same step."""
        self.seats += seats
        self._names += [dict.fromkeys(PARTS) for _ in self.seats[len(self._names) :]]

    # Live states and states at rest

    def check_out(self, names: Iterable[str]) -> dict[str, Seat]:
        """Makes the states of parties live, and puts others at rest where needed.

        Returns:
            The seat of each party.

        Raises:
            RuntimeError: If more parties train at once than there are seats, or a party
                has no weights.
        """
        wanted, seated = set(names), dict[str, Seat]()
        for name in dict.fromkeys(names):
            seat = self._choose(name, wanted)
            for part in PARTS:
                if self._names[seat][part] != name:
                    self._bring(seat, part, name)
            seated[name] = self.seats[seat]
        return seated

    def _choose(self, name: str, wanted: set[str]) -> int:
        """Returns the seat that a party has, or one that is free for it."""
        role = role_of(name)
        fitting = [i for i, seat in enumerate(self.seats) if seat.role == role]
        for seat in fitting:
            if self._names[seat]["parameters"] == name:
                return seat
        for seat in fitting:
            if self._names[seat]["parameters"] not in wanted:
                return seat
        raise RuntimeError(
            f"{len(wanted)} parties train at once, and there is room for "
            f"{len(fitting)}. Train with trainer.fit(module, datamodule=data)."
        )

    def _bring(self, seat: int, part: Part, name: str) -> None:
        """Puts a part of a party's state into a seat."""
        before = self._names[seat][part]
        for at in {seat, self._seat_of(name, part)} - {None}:
            assert at is not None
            party = self._names[at][part]
            if party is not None:
                state = self._view(at, part)
                # An optimizer makes new tensors; those of a module are used again.
                self.own[part][party] = state if part == "optimizer" else clone(state)
                self._names[at][part] = None
        own = self.own[part].pop(name, None)
        if own is None:
            own = self.common[role_of(name)].get(part)
            own = clone(own) if part == "optimizer" else own
        if own is None and part in self._weights and before not in (None, name):
            raise RuntimeError(
                f"{name} has no weights of its own, and those of {before} were not "
                "passed to it. A protocol that passes weights does so before the first "
                "batch of each turn: yield PassWeights(to=...) in its plan."
            )
        if own is not None or part == "optimizer":
            self._write(seat, part, own or {})
        self._names[seat][part] = name

    def remember_start(self) -> None:
        """Keeps the state of the start, from which every party begins."""
        if not any(self.common.values()):
            self.start = {part: clone(self._view(0, part)) for part in WEIGHTS}
            self.common = {role: dict(self.start) for role in self.roles}

    # How states move

    def move(self, giver: str, taker: str, parts: Iterable[Part]) -> None:
        """Lets a party continue from another's state. Nothing is copied."""
        for part in parts:
            seat, at_rest = self._seat_of(giver, part), self.own[part].pop(giver, None)
            self._release(taker, part)
            if seat is not None:
                self._names[seat][part] = taker
            elif at_rest is not None:
                self.own[part][taker] = _here(at_rest)
        self.samples[taker] += self.samples.pop(giver, 0)

    def adopt(self, name: str, parts: Iterable[Part]) -> None:
        """Lets a party continue from the common state as it is now."""
        for part in parts:
            self._release(name, part)
            common = self.common[role_of(name)].get(part, {})
            self.own[part][name] = clone(common) if part == "optimizer" else common

    def drop(self, name: str, parts: Iterable[Part]) -> None:
        """Forgets parts of a party's state: it continues from the common one."""
        for part in parts:
            self._release(name, part)

    def _release(self, name: str, part: Part) -> None:
        self.own[part].pop(name, None)
        seat = self._seat_of(name, part)
        if seat is not None:
            self._names[seat][part] = None

    def fetch(self, name: str, part: Part) -> bool:
        """Brings a part of a party's state here; returns whether it was elsewhere."""
        own = self.own[part].get(name)
        if isinstance(own, StateAway):
            self.own[part][name] = own.fetch()
            return True
        return False

    def share(self, part: Part, state: State, roles: Iterable[str]) -> None:
        """Lets all parties of some roles continue from one state."""
        roles = set(roles)
        for role in roles:
            self.common[role][part] = state
        for name in [name for name in self.own[part] if role_of(name) in roles]:
            del self.own[part][name]
        for seat, names in enumerate(self._names):
            there = names[part]
            role = self.seats[seat].role if there is None else role_of(there)
            if role in roles:
                if part != "optimizer":  # which is written when a party trains
                    self._write(seat, part, state)
                names[part] = None

    def version_of_common(self, role: str, part: Part) -> int:
        """Returns a number that is another when the common state of a role is."""
        common = self.common[role].get(part)
        number, known = self._versions.get((role, part), (0, None))
        if known is not common:
            number += 1
        self._versions[role, part] = number, common
        return number

    def put(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Gives a party weights from elsewhere."""
        for part in self._weights:
            keys = self._view(0, part).keys()
            self.own[part][name] = {key: state[key] for key in keys}

    # Which party has what

    def peek(self, name: str, part: Part) -> State:
        """Returns a part of a party's state, to be read; what is live stays live."""
        seat = self._seat_of(name, part)
        if seat is not None:
            return self._view(seat, part)
        own = self.own[part].get(name)
        if own is not None:
            return _here(own)
        common = self.common[role_of(name)].get(part)
        if common is not None:
            return common
        return {} if part == "optimizer" else self._view(0, part)

    def weights_of(self, name: str) -> dict[str, Tensor]:
        """Returns a party's parameters and buffers, to be read."""
        return {k: v for part in WEIGHTS for k, v in self.peek(name, part).items()}

    def live_state(self, part: Part) -> State:
        """Returns a part of the state that the first seat has, to be read."""
        return self._view(0, part)

    def live(self, name: str) -> nn.Module | None:
        """Returns the live copy that has a party's weights, if there is one."""
        seats = {self._seat_of(name, part) for part in self._weights}
        seat = seats.pop() if len(seats) == 1 else None
        if seat is None and not (self.names() or any(self.common.values())):
            seat = 0  # nothing was trained yet
        return None if seat is None else self.seats[seat].module

    def has_own(self, name: str, part: Part) -> bool:
        """Returns whether a part of a party's state is its own, not the common one."""
        return self._seat_of(name, part) is not None or name in self.own[part]

    def origin(self, name: str) -> str | None:
        """Returns a party's name if it has weights of its own, else `None`."""
        return name if any(self.has_own(name, part) for part in WEIGHTS) else None

    def names(self) -> list[str]:
        """Returns the parties that have weights of their own."""
        live = [names[part] for names in self._names for part in WEIGHTS]
        rest = [name for part in WEIGHTS for name in self.own[part]]
        return list(dict.fromkeys(name for name in (*rest, *live) if name is not None))

    def parties_with(self, part: Part, roles: Collection[str]) -> set[str]:
        """Returns the parties of some roles that have a part of their own."""
        live = (names[part] for names in self._names)
        own = (name for name in (*self.own[part], *live) if name is not None)
        return {name for name in own if role_of(name) in roles}

    def _seat_of(self, name: str, part: Part) -> int | None:
        for seat, names in enumerate(self._names):
            if names[part] == name:
                return seat
        return None

    # Seats as states

    def _view(self, seat: int, part: Part) -> State:
        """Returns what is live, not copied."""
        module = self.seats[seat].module
        if part == "buffers":
            buffers = module.named_buffers(remove_duplicate=False)
            return {k: v for k, v in buffers if k in self._persistent}
        named = module.named_parameters()
        if part == "parameters":
            return {name: parameter.detach() for name, parameter in named}
        if not self.optimizers:
            return {}
        state = self.optimizers[self.seats[seat].role].state
        return {name: state[p] for name, p in named if p in state}

    def _write(self, seat: int, part: Part, state: State) -> None:
        if part in WEIGHTS:
            for name, tensor in self._view(seat, part).items():
                tensor.copy_(state[name])
        elif self.optimizers:
            module, role = self.seats[seat]
            optimizer = self.optimizers[role]
            for name, parameter in module.named_parameters():
                optimizer.state.pop(parameter, None)
                if name in state:
                    optimizer.state[parameter] = _moved(state[name], parameter)

    # Checkpoints

    def fit_optimizer_states(self, fitted: Fit) -> None:
        """Fits optimizer states at rest to optimizers with other options.

        Args:
            fitted: Returns the part of a parameter's state that its optimizer uses.
        """
        states = self.own["optimizer"]
        for name in list(states):
            states[name] = self._fitted(name, states[name], fitted)
        for role, common in self.common.items():
            if "optimizer" in common:
                own = common["optimizer"]
                common["optimizer"] = self._fitted(f"{role}/", own, fitted)

    def fit_mean(self, mean: RunningMean, fitted: Fit) -> None:
        """Fits the sum of optimizer states in a mean in the same way."""
        own = self._fitted(f"{self.roles[0]}/", nested(mean.sums()), fitted)
        mean.keep(flat(own).keys())

    def _fitted(self, name: str, state: State, fitted: Fit) -> State:
        """Fits a party's optimizer state, by the parameters of a seat for its role."""
        seats = (seat for seat in self.seats if seat.role == role_of(name))
        parameters = dict(next(seats).module.named_parameters())
        return {key: fitted(parameters[key], own) for key, own in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is remembered but what is live, in plain containers.

        `None` stands for a state that is elsewhere.
        """
        return {
            "names": [dict(names) for names in self._names],
            "common": {role: dict(own) for role, own in self.common.items()},
            "own": {
                part: {
                    name: None if isinstance(state, StateAway) else state
                    for name, state in states.items()
                }
                for part, states in self.own.items()
            },
            "last": dict(self.last),
            "samples": dict(self.samples),
            "newest": self.newest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self._names = [dict(names) for names in state["names"]]
        self.common = {role: dict(own) for role, own in state["common"].items()}
        self.last = dict(state["last"])
        self.samples = Counter(state["samples"])
        self.newest = state["newest"]
        for part, states in self.own.items():
            states.clear()
            states.update(state["own"][part])


def _here(state: State | StateAway) -> State:
    """Returns a state at rest; it comes from where it is."""
    return state.fetch() if isinstance(state, StateAway) else state


def clone(value: Any) -> Any:
    """Returns a copy of tensors in plain containers."""
    if isinstance(value, dict):
        return {key: clone(own) for key, own in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


def _moved(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Returns an optimizer's state on its parameter's device.

    From a checkpoint it comes on the CPU; elsewhere nothing moves.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[key] = value.to(parameter.device)
    return state


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the tensors in plain containers.

    >>> import torch
    >>> tensors_in({"w": {"step": torch.tensor(1.0), "momentum": None}})
    [tensor(1.)]
    """
    if isinstance(value, dict):
        return [tensor for own in value.values() for tensor in tensors_in(own)]
    return [value] if isinstance(value, Tensor) else []


def flat(states: State) -> dict[str, Tensor]:
    """Returns the tensors of optimizer states, by parameter and name in one.

    >>> import torch
    >>> flat({"0.weight": {"step": torch.tensor(3.0), "momentum_buffer": None}})
    {'0.weight/step': tensor(3.)}
    """
    return {
        f"{parameter}/{name}": value
        for parameter, state in states.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def nested(tensors: Mapping[str, Tensor]) -> State:
    """Returns what `flat` made flat."""
    states: State = {}
    for key, value in tensors.items():
        parameter, _, name = key.rpartition("/")
        states.setdefault(parameter, {})[name] = value
    return states
