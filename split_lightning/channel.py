"""The channel: all that passes between parties in a step goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from split_lightning.route import Party

# What one segment hands to the next: a tensor, or several values.
Activations: TypeAlias = Tensor | tuple[Any, ...]
# Who sends activations across a cut, and who receives them.
Ends: TypeAlias = tuple[Party, Party]


class Crossing(NamedTuple):
    """Something that passes from one party to another.

    Attributes:
        content: What it is.
        sender: Whose it was.
        receiver: Who gets it.
        cut: Which cut it crosses, from 0 in the order of the network.
        holder: Which of the client's holders, where each has a part of its samples.
    """

    content: Literal["smashed data", "gradient", "targets"]
    sender: Party
    receiver: Party
    cut: int
    holder: int | None = None


Observer: TypeAlias = Callable[[Crossing, tuple[Any, ...]], None]

# Where the bytes of what one party sends to another are counted.
_COUNTS: dict[tuple[Party, Party], str] = {
    ("client", "server"): "uplink_bytes",
    ("server", "client"): "downlink_bytes",
    ("server", "server"): "hop_bytes",
}
# A size that crosses beside the tensors travels as an int64.
_BYTES_PER_NUMBER = 8


@dataclass
class Traffic:
    """Bytes that would have travelled in training since the start of the run.

    Attributes:
        uplink_bytes: What clients send to servers: smashed data and targets; in a
            U-shape the gradients of what came down, too.
        downlink_bytes: What servers send to clients: gradients of the smashed data; in
            a U-shape the server's activations, too.
        handoff_bytes: Client segments (and optimizer states, where they travel too),
            from client to client.
        handoffs: Number of hand-offs.
        averaging_bytes: Client segments (and optimizer states, where they travel too,
            or gradients, where those are averaged), from clients to where they are
            averaged and back.
        server_averaging_bytes: Server segments, between servers, in the same way.
        hop_bytes: Smashed data and their gradients, from server to server.
        layer_bytes: Layers (and their optimizer states, where they travel too) between
            clients and servers, where clients cut after different layers.
    """

    uplink_bytes: int = 0
    downlink_bytes: int = 0
    handoff_bytes: int = 0
    handoffs: int = 0
    averaging_bytes: int = 0
    server_averaging_bytes: int = 0
    hop_bytes: int = 0
    layer_bytes: int = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the counts."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes counts over."""
        for name, count in state.items():
            setattr(self, name, count)


class CutLayerChannel:
    """Carries smashed data and gradients across the cuts, and counts the bytes.

    The parties' parts of a step meet here alone. Counted is what the tensors take as
    they are: 4 bytes a value in fp32, 2 in bfloat16, 8 a target.

    Args:
        traffic: Where the bytes are counted.
        holders: Who computes each stretch of the network, from cut to cut.
        fan_in: Where a client is a group of holders, each with a part of its samples:
            how many of the values that cross the first cut are each one's. What each
            sends crosses by itself. A boolean value says of which samples it has a
            part; what is not there (zeros, in training) does not cross.
        label_holder: Which of the holders has the labels.

    Attributes:
        is_counting: Whether what crosses is counted: not where a process computes with
            samples that are another's.
        by_cut: The bytes that crossed each cut in this process, forward and back.
        by_holder: Those of each holder at the first cut, without labels.
        observers: Called with the `Crossing` and all values that cross, each time
            something does. They may look, and change nothing.
    """

    def __init__(
        self,
        traffic: Traffic,
        holders: Sequence[Party] = ("client", "server"),
        fan_in: Sequence[int] = (),
        label_holder: int = 0,
    ) -> None:
        self.traffic = traffic
        self.holders = tuple(holders)
        self.fan_in = tuple(fan_in)
        self.label_holder = label_holder if self.fan_in else None
        self.is_counting = True
        self.forget()
        self.observers: list[Observer] = []

    def forget(self) -> None:
        """Begins to count what crosses each cut anew."""
        self.by_cut = [[0, 0] for _ in self.holders[1:]]
        self.by_holder = [[0, 0] for _ in self.fan_in]

    def send(
        self, activations: Activations, cut: int = 0, ends: Ends | None = None
    ) -> Activations:
        """Sends activations across a cut.

        Args:
            activations: What the stretch before the cut returned.
            cut: Which cut.
            ends: Who sends and who receives; `None`: the holders on both sides of it.

        Returns:
            The same values as detached leaves of autograd: nothing else crosses.
        """
        smashed = tuple(map(_leaf, values_of(activations)))
        sender, receiver = ends or self.holders[cut : cut + 2]
        for holder, own in self._by_holder(cut, smashed):
            crossing = Crossing("smashed data", sender, receiver, cut, holder)
            self._cross(crossing, own)
        return smashed if isinstance(activations, tuple) else smashed[0]

    def send_targets(self, targets: Tensor) -> Tensor:
        """Sends the labels of a batch to whoever has the loss.

        They cross nothing where that is the client itself.
        """
        last = len(self.holders) - 2
        receiver = self.holders[-1]
        if receiver != "client":
            crossing = Crossing("targets", "client", receiver, last, self.label_holder)
            self._cross(crossing, (targets,))
        return targets

    def send_back(
        self, smashed: Activations, cut: int = 0, ends: Ends | None = None
    ) -> tuple[Tensor | None, ...]:
        """Sends the gradient at a cut back.

        Args:
            smashed: What `send` returned, after the backward of what is behind the cut.
            cut: Which cut.
            ends: Between whom, as in `send`.

        Returns:
            The gradient of each value, `None` where there is none.
        """
        gradients = tuple(getattr(v, "grad", None) for v in values_of(smashed))
        receiver, sender = ends or self.holders[cut : cut + 2]
        for holder, own in self._by_holder(cut, gradients, values_of(smashed)):
            crossing = Crossing("gradient", sender, receiver, cut, holder)
            self._cross(crossing, own)
        return gradients

    def _by_holder(
        self, cut: int, values: tuple[Any, ...], sent: tuple[Any, ...] | None = None
    ) -> Iterator[tuple[int | None, tuple[Any, ...]]]:
        """Yields what crosses a cut, of a client or of each holder by itself.

        Args:
            cut: Which cut.
            values: What is there to cross.
            sent: What was sent in the forward; `None`: these values.
        """
        if cut > 0 or not self.fan_in:
            is_clients = "client" in self.holders[cut : cut + 2]
            yield self.label_holder if is_clients else None, values
            return
        sent = values if sent is None else sent
        for holder, (start, end) in enumerate(pairwise(accumulate((0, *self.fan_in)))):
            yield holder, _there(values[start:end], sent[start:end])

    def _cross(self, crossing: Crossing, values: tuple[Any, ...]) -> None:
        if self.is_counting:
            count = num_bytes(value for value in values if value is not None)
            name = _COUNTS[crossing.sender, crossing.receiver]
            setattr(self.traffic, name, getattr(self.traffic, name) + count)
            if crossing.content != "targets":
                way = crossing.content == "gradient"
                self.by_cut[crossing.cut][way] += count
                if crossing.cut == 0 and crossing.holder is not None:
                    self.by_holder[crossing.holder][way] += count
        for observer in self.observers:
            observer(crossing, values)


def num_bytes(values: Iterable[Any]) -> int:
    """Returns the bytes that tensors (and plain numbers) take when they travel.

    >>> import torch
    >>> num_bytes([torch.zeros(2, 3), torch.tensor([1, 2])])
    40
    """
    return sum(
        v.numel() * v.element_size() if isinstance(v, Tensor) else _BYTES_PER_NUMBER
        for v in values
    )


def values_of(activations: Activations) -> tuple[Any, ...]:
    """Returns what crosses a cut as a tuple, of one element for a tensor."""
    return activations if isinstance(activations, tuple) else (activations,)


def _there(values: tuple[Any, ...], sent: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns of a holder's values those of the samples that it has.

    Args:
        values: What crosses.
        sent: What was sent in the forward: which samples these are is among it, or all.
    """
    masks = [v for v in sent if isinstance(v, Tensor) and v.dtype == torch.bool]
    if not masks:
        return values
    (has,) = masks
    return tuple(
        v[has] if isinstance(v, Tensor) and v is not has else v for v in values
    )


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    leaf = value.detach().requires_grad_(value.requires_grad)
    if leaf.requires_grad:
        # Autograd copies a gradient into the strides of its leaf, and some backward
        # passes round in another way for other strides: the leaf gets it as it is.
        gradients: list[Tensor] = []
        leaf.register_hook(gradients.append)  # type: ignore[no-untyped-call]
        leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda own: setattr(own, "grad", gradients.pop())
        )
    return leaf
