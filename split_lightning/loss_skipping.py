"""`LossSkipping`: a client whose loss has settled sends less."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

SkippingState: TypeAlias = Literal["A", "B", "C"]
STATES: tuple[SkippingState, ...] = ("A", "B", "C")
# The smashed data of a batch, and its targets.
Sent: TypeAlias = tuple[tuple[Any, ...], Tensor]


class LossSkipping:
    """Says what of each client's turn takes place, by how its loss changes.

    Loss-based asynchronous training (Chen et al. 2021,
    https://arxiv.org/abs/2107.09786). Of a turn in state

    - A all takes place;
    - B no gradient goes back to the client, which keeps its weights; the server stores
      what the client sent;
    - C the client sends nothing: the server trains on what it stored.

    After each turn its mean loss is compared with that of the turn which led to the
    last state A. Where they differ by the threshold or more the next turn is in state
    A; else it is in B after A, and in C after B or C. The first turn is in A, and so is
    the second.

    Departures from the paper: it is a client's turns that have states, not the epochs
    of all; nothing is quantised to eight bits; a client that does not step has nothing
    to hand in, and one that sends nothing takes no weights over; where a turn has more
    batches than are stored they are used again from the first.

    Args:
        threshold: How much a loss must change to be worth an update; `None`: every
            turn is in state A, and nothing is kept.

    Attributes:
        turns: Number of turns in each state, since `count` was called last.

    Raises:
        ValueError: If the threshold is negative.
    """

    def __init__(self, threshold: float | None = None) -> None:
        if threshold is not None and threshold < 0:
            raise ValueError(
                "Expected argument `loss_threshold` to be a number from 0, or null for "
                f"no skipping, but got {threshold}."
            )
        self.threshold = threshold
        self.forget()

    def forget(self) -> None:
        """Goes back to before the first turn."""
        self.turns = dict.fromkeys(STATES, 0)
        self._states: dict[int, SkippingState] = {}  # of the turn that runs, or is next
        self._references: dict[int, float] = {}
        self._losses: dict[int, tuple[Tensor, int]] = {}  # sum over samples, and number
        self._stored: dict[int, list[Sent]] = {}
        self._batches: dict[int, int] = {}  # of the turn that runs, so far

    def state_of(self, client_id: int) -> SkippingState:
        """Returns the state of a client's turn that runs, or of its next."""
        return self._states.get(client_id, "A")

    def begin(self, client_id: int) -> None:
        """A client's turn begins."""
        self._batches[client_id] = 0
        self._losses.pop(client_id, None)
        if self.state_of(client_id) != "C":
            self._stored.pop(client_id, None)

    def store(self, client_id: int, smashed: tuple[Any, ...], targets: Tensor) -> None:
        """Keeps what a client sent, where a later turn may be trained on it."""
        if self.state_of(client_id) == "B":
            kept = tuple(v.detach() if isinstance(v, Tensor) else v for v in smashed)
            self._stored.setdefault(client_id, []).append((kept, targets))

    def stored(self, client_id: int, device: torch.device) -> Sent:
        """Returns what stands for a client's next batch in state C."""
        kept = self._stored[client_id]
        smashed, targets = kept[self._batches[client_id] % len(kept)]
        # From a checkpoint they come on the CPU.
        moved = (v.to(device) if isinstance(v, Tensor) else v for v in smashed)
        return tuple(moved), targets.to(device)

    def trained(self, client_id: int, loss: Tensor, num_samples: int) -> None:
        """Notes the mean loss of a batch."""
        if self.threshold is None:
            return
        total, count = self._losses.get(client_id, (torch.zeros_like(loss), 0))
        total = loss * num_samples + total
        self._losses[client_id] = (total, count + num_samples)
        self._batches[client_id] += 1

    def end(self, client_id: int) -> SkippingState:
        """A client's turn ends; returns its state, and decides on the next one's."""
        state = self.state_of(client_id)
        self.turns[state] += 1
        if self.threshold is None or client_id not in self._losses:
            return state
        total, count = self._losses.pop(client_id)
        loss = float(total) / count
        reference = self._references.get(client_id)
        if reference is None or abs(reference - loss) >= self.threshold:
            self._states[client_id], self._references[client_id] = "A", loss
        else:
            self._states[client_id] = "B" if state == "A" else "C"
        return state

    def count(self) -> dict[SkippingState, int]:
        """Returns the number of turns in each state since the last call."""
        turns, self.turns = self.turns, dict.fromkeys(STATES, 0)
        return turns

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is remembered, in plain containers and tensors."""
        return {
            "turns": dict(self.turns),
            "states": dict(self._states),
            "references": dict(self._references),
            "losses": {k: list(own) for k, own in self._losses.items()},
            "stored": {k: list(map(list, own)) for k, own in self._stored.items()},
            "batches": dict(self._batches),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.turns, self._states = dict(state["turns"]), dict(state["states"])
        self._references = dict(state["references"])
        self._losses = {k: (total, n) for k, (total, n) in state["losses"].items()}
        self._stored = {
            k: [(tuple(smashed), targets) for smashed, targets in own]
            for k, own in state["stored"].items()
        }
        self._batches = dict(state["batches"])
