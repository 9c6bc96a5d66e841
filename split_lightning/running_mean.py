"""`RunningMean`: a weighted mean of states, of which one is in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMean:
    """Sums weighted states up, in float64, so that the mean of one state is that state.

    Attributes:
        weight: The sum of the weights so far.

    >>> mean = RunningMean()
    >>> mean.add({"w": torch.tensor([1.0])}, weight=3)
    >>> mean.add({"w": torch.tensor([5.0])}, weight=1)
    >>> mean.state()
    {'w': tensor([2.])}
    """

    def __init__(self) -> None:
        self.weight: float = 0
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Adds a state with a weight, such as its number of samples."""
        self.weight += weight
        for name, tensor in state.items():
            # Apple's GPUs have no float64.
            wide = torch.float32 if tensor.device.type == "mps" else torch.float64
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(tensor, dtype=wide)
                self._dtypes[name] = tensor.dtype
            self._sums[name].add_(tensor.detach(), alpha=weight)

    def state(self) -> dict[str, Tensor]:
        """Returns the mean; whole numbers (BatchNorm's count of batches) rounded."""
        means = {name: total / self.weight for name, total in self._sums.items()}
        return {
            name: (mean if self._dtypes[name].is_floating_point else mean.round()).to(
                self._dtypes[name]
            )
            for name, mean in means.items()
        }

    def sums(self) -> dict[str, Tensor]:
        """Returns the weighted sums so far."""
        return self._sums

    def keep(self, names: Collection[str]) -> None:
        """Forgets all sums but those of some names."""
        self._sums = {k: total for k, total in self._sums.items() if k in names}

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums, in plain containers and tensors."""
        return {"weight": self.weight, "sums": self._sums, "dtypes": self._dtypes}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes over what `state_dict` returned."""
        self.weight, self._dtypes = state["weight"], state["dtypes"]
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}


def mixed(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Returns a mixture of two states: a share of the other, and the rest of the one.

    What only one of them has stays as it is. With a share of 1 it is the other, bit for
    bit, and with 0 the one.

    >>> mixed({"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}, share=0.25)
    {'w': tensor([2.])}
    """
    both = [name for name in other if name in one]
    mean = RunningMean()
    # From a checkpoint the one comes on the CPU.
    mean.add({name: one[name].to(other[name].device) for name in both}, 1 - share)
    mean.add({name: other[name] for name in both}, share)
    alone = {**one, **(other if share else {})}
    return mean.state() | {k: t.clone() for k, t in alone.items() if k not in both}


class StateMean:
    """The mean of the states of several parties, weighted by samples.

    Attributes:
        weights: The mean of parameters and buffers.
        optimizer: The mean of optimizer states, where these travel.
        members: The parties whose states are in it.
    """

    def __init__(self) -> None:
        self.weights = RunningMean()
        self.optimizer = RunningMean()
        self.members: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums, in plain containers."""
        return {
            "weights": self.weights.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "members": list(self.members),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continues from what `state_dict` returned."""
        self.weights.load_state_dict(state["weights"], device)
        self.optimizer.load_state_dict(state["optimizer"], device)
        self.members = list(state["members"])
