"""What simulated clients must remember while they wait for their turn."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from split_lightning.channel import num_bytes

OptimizerState: TypeAlias = Literal["keep", "travel", "reset"]
ParameterStates: TypeAlias = defaultdict[Tensor, dict[str, Any]]


class ClientStates:
    """Lets many clients share one live client segment and one optimizer.

    Only the client whose turn it is has its state in the live objects. The others'
    states wait here, and only as far as the protocol says that they must remember:
    nothing at all where weights are passed on and the optimizer's state travels with
    them or is reset.

    Args:
        segment: The live client segment.
        optimizer_state: What becomes of the optimizer's state (momentum) when weights
            are handed over. `keep`: each client has its own; `travel`: it goes along
            with the weights; `reset`: each hand-off clears it.

    Attributes:
        active: The client whose state is live; `None` before the first turn.

    Raises:
        ValueError: If `optimizer_state` is none of these.
    """

    def __init__(self, segment: nn.Module, optimizer_state: OptimizerState) -> None:
        if optimizer_state not in get_args(OptimizerState):
            raise ValueError(
                "Expected argument `optimizer_state` to be one of "
                f"{get_args(OptimizerState)}, but got {optimizer_state!r}."
            )
        self.segment = segment
        self.optimizer_state = optimizer_state
        self.active: int | None = None
        self._shown: int | None = None  # whose weights are live; None: the active one's
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._initial: dict[str, Tensor] = {}
        self._optimizer_states: dict[int, ParameterStates] = {}

    def forget(self) -> None:
        """Goes back to before the first turn; the live weights stay."""
        self.active = None
        self._weights, self._initial, self._optimizer_states = {}, {}, {}

    def hand_over(self, client_id: int, optimizer: Optimizer) -> int:
        """Lets a client go on from the active client's weights.

        Returns:
            The bytes that would travel: the segment's parameters and buffers, and the
            optimizer's state where it travels too.
        """
        sent: list[Any] = list(self.segment.state_dict().values())
        if self.optimizer_state == "keep":
            self._swap_optimizer_state(client_id, optimizer)
        elif self.optimizer_state == "reset":
            optimizer.state = defaultdict(dict)
        else:
            sent += [v for state in optimizer.state.values() for v in state.values()]
        self.active = client_id
        return num_bytes(value for value in sent if value is not None)

    def switch(self, client_id: int, optimizer: Optimizer) -> None:
        """Lets a client go on from its own weights and its own optimizer state.

        A client that has none starts from the weights of the run's start, or, where
        weights were handed over before, from those that were handed over last.
        """
        if self.active is None:
            self._initial = _cloned(self.segment.state_dict())
        else:
            self._weights[self.active] = _cloned(self.segment.state_dict())
            own = self._weights.pop(client_id, self._initial)
            if own:
                self.segment.load_state_dict(own)
            self._swap_optimizer_state(client_id, optimizer)
        self.active = client_id

    def show(self, client_id: int) -> None:
        """Puts a client's own weights in place to be evaluated.

        A client that has none is shown with the weights that it would start from (see
        `switch`). `show_active` ends it.
        """
        if self.active is None or client_id == self._shown:
            return
        if self._shown is None:
            self._weights[self.active] = _cloned(self.segment.state_dict())
        own = self._weights.get(client_id, self._initial) or self._weights[self.active]
        self.segment.load_state_dict(own)
        self._shown = client_id

    def show_active(self) -> None:
        """Puts the active client's weights back in place."""
        if self._shown is not None and self.active is not None:
            self.segment.load_state_dict(self._weights.pop(self.active))
            self._shown = None

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is remembered, in plain containers and tensors."""
        names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.segment.named_parameters()
        }
        return {
            "active": self.active,
            "weights": self._weights,
            "initial": self._initial,
            "optimizer_states": {
                client_id: {names[p]: dict(state) for p, state in states.items()}
                for client_id, states in self._optimizer_states.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        parameters = dict(self.segment.named_parameters())
        self.active = state["active"]
        self._weights = state["weights"]
        self._initial = state["initial"]
        self._optimizer_states = {
            client_id: defaultdict(dict, {parameters[n]: s for n, s in states.items()})
            for client_id, states in state["optimizer_states"].items()
        }

    def _swap_optimizer_state(self, client_id: int, optimizer: Optimizer) -> None:
        """Puts the active client's optimizer state away and takes a client's out.

        The live parameters stay the same objects, so that nothing is copied, and the
        optimizer can never step the parameters of another client.
        """
        if self.active is not None:
            self._optimizer_states[self.active] = optimizer.state
        own = self._optimizer_states.pop(client_id, defaultdict(dict))
        for parameter, state in own.items():
            for name, value in state.items():
                # From a checkpoint they come on the CPU; elsewhere nothing moves.
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = value.to(parameter.device)
        optimizer.state = own


def _cloned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.clone(tensor) for name, tensor in state.items()}
