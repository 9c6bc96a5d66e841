"""`Party`: computes with the segments it has. The two backward passes are here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from split_lightning.batch_norm import (
    BatchNormByClient,
    Normalisation,
    with_mean_buffers,
)
from split_lightning.message import Values, role_of
from split_lightning.store import Seat
from split_lightning.task import Task

# Names a forward pass: the training step, and the segment's depth in the network.
Key: TypeAlias = tuple[int, int]
# Runs the first backward pass: Lightning's `manual_backward`, or torch's own.
BackwardPass: TypeAlias = Callable[[Tensor], None]


class Stepping(Protocol):
    """An optimizer, or what wraps it."""

    def step(self) -> Any:
        """Steps the parameters that have a gradient."""

    def zero_grad(self) -> None:
        """Clears the gradients."""


class Call(NamedTuple):
    """A forward pass of one client, or of several as one batch.

    Attributes:
        sizes: Number of samples of each client.
        rows: For each client the number of rows of each of its inputs, and whether it
            wants their gradient.
        inputs: Detached leaves.
        gradients: The gradients of the inputs, by their numbers; filled by the backward
            pass.
        outputs: What the segment returned, with its graph.
    """

    sizes: Sequence[int]
    rows: list[list[tuple[int, bool]]]
    inputs: Values
    gradients: dict[int, Tensor]
    outputs: Values


class Losses(NamedTuple):
    """What the first backward pass returns.

    Attributes:
        total: What the backward pass began from.
        own: Each client's mean loss.
        gradients: For each client the gradients of what came to the last segment.
    """

    total: Tensor
    own: list[Tensor]
    gradients: list[Values]


class Party:
    """A participant that computes. It knows no other party.

    It takes and returns tensors alone, a tuple for each client of the step, so that the
    same calls can come from another process. A forward pass that waits for its gradient
    is kept under its key.

    Args:
        name: Such as `client/3` or `server/0`.
        segments: The live segments that it has, by their depths in the network.
        task: The loss.
        normalisation: What BatchNorm sees where several clients compute at this party.
        stash: For depths whose forward pass takes older parameters than the live ones,
            these parameters, by name. The live ones get the gradient.
        backward_pass: Runs the first backward pass.
    """

    def __init__(
        self,
        name: str,
        segments: Mapping[int, Seat],
        task: Task,
        normalisation: Normalisation = "joint",
        stash: Mapping[int, Mapping[str, Tensor]] | None = None,
        backward_pass: BackwardPass = torch.autograd.backward,
    ) -> None:
        self.name, self.role = name, role_of(name)
        self.segments = dict(segments)
        self.task = task
        self.normalisation = normalisation
        self.stash = stash or {}
        self.backward_pass = backward_pass
        self.calls: dict[Key, list[Call]] = {}
        self._stashed: dict[int, dict[str, Tensor]] = {}  # as leaves, while in use

    def forward(
        self, key: Key, several: Sequence[Values], sizes: Sequence[int]
    ) -> list[Values]:
        """Runs a segment.

        Args:
            key: Names the call.
            several: For each client of the step the inputs of the segment.
            sizes: For each client its number of samples.

        Returns:
            For each client its smashed data, detached.
        """
        if len(sizes) == 1 or self.normalisation == "joint":
            calls = [self._call(key, several, sizes)]
        elif self.normalisation == "by_client":
            with BatchNormByClient(sizes):
                calls = [self._call(key, several, sizes)]
        else:
            pairs = zip(several, sizes, strict=True)
            each = [partial(self._call, key, [own], [size]) for own, size in pairs]
            calls = with_mean_buffers(self.segments[key[1]].module, each, sizes)
        self.calls[key] = calls
        return _sent(calls)

    def _call(self, key: Key, several: Sequence[Values], sizes: Sequence[int]) -> Call:
        segment = self.segments[key[1]].module
        inputs = several[0] if len(several) == 1 else joined(several)
        gradients: dict[int, Tensor] = {}
        for number, value in enumerate(inputs):
            if isinstance(value, Tensor) and value.requires_grad:
                # Caught before autograd copies it into the strides of its leaf: some
                # backward passes round in another way for other strides.
                value.register_hook(partial(gradients.__setitem__, number))  # type: ignore[no-untyped-call]
        if key[1] in self.stash:
            outputs = functional_call(segment, self._leaves(key[1]), inputs)
        else:
            outputs = segment(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        rows = list[list[tuple[int, bool]]]()
        if len(several) > 1:
            rows = [[(len(v), v.requires_grad) for v in own] for own in several]
        return Call(sizes, rows, inputs, gradients, outputs)

    def loss(
        self,
        key: Key,
        targets: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        shares: Sequence[Tensor] | None = None,
        scale: float = 1.0,
    ) -> Losses:
        """Stage 1 of the backward pass: from the loss down to the cut.

        Args:
            key: Names the call of the last segment.
            targets: For each client its labels.
            weights: For each client what its mean loss counts in the step's; `None`:
                the loss is one mean over all samples.
            shares: See `backward`.
            scale: What the loss is multiplied by before the backward pass.
        """
        calls, sizes = self.calls.pop(key), [len(own) for own in targets]
        logits = [self.task.logits(call.outputs) for call in calls]
        parts = (
            logits if len(logits) == len(sizes) else list(torch.split(logits[0], sizes))
        )
        if weights is None:
            total = self.task.loss(_cat(logits), _cat(targets))
            own = self.task.losses(total, parts, targets)
        else:
            own = [self.task.loss(*pair) for pair in zip(parts, targets, strict=True)]
            total = torch.stack(own) @ torch.stack(list(weights)).to(own[0])
        self.backward_pass(total if scale == 1 else total * scale)
        if key[1] in self._stashed:
            self._to_live(key[1])
        own = [loss.detach() for loss in own]
        gradients = _returned(calls)
        if shares is not None:
            gradients = _weighed(gradients, [1 / share for share in shares])
        return Losses(total.detach(), own, gradients)

    def backward(
        self,
        key: Key,
        gradients: Sequence[Values],
        shares: Sequence[Tensor] | None = None,
    ) -> list[Values]:
        """Stage 2 of the backward pass: from the cut to the inputs.

        Args:
            key: Names the call.
            gradients: For each client the gradients of its smashed data; `None` for
                values without a gradient behind the cut.
            shares: For each client what its gradient counts in the mean over clients
                that share this party's state: a client multiplies what it gets by its
                share, and sends back the gradient as it was. `None`: there is no mean.

        Returns:
            For each client the gradients of what came to the segment.
        """
        if shares is not None:
            gradients = _weighed(gradients, shares)
        calls, rest = self.calls.pop(key), iter(gradients)
        outputs, slopes = list[Tensor](), list[Tensor]()
        for call in calls:
            several = zip(*(next(rest) for _ in call.sizes), strict=True)
            for output, alike in zip(call.outputs, several, strict=True):
                if alike[0] is not None:
                    outputs.append(output)
                    slopes.append(_cat(alike))
        if outputs:  # unless nothing trains before the cut
            torch.autograd.backward(outputs, slopes)
        if key[1] in self._stashed:
            self._to_live(key[1])
        returned = _returned(calls)
        if shares is not None:
            returned = _weighed(returned, [1 / share for share in shares])
        return returned

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of its live segments."""
        return [p for seat in self.segments.values() for p in seat.module.parameters()]

    def _named(self, depth: int) -> Iterator[tuple[str, nn.Parameter]]:
        return self.segments[depth].module.named_parameters()

    def _leaves(self, depth: int) -> dict[str, Tensor]:
        """Returns stashed parameters as leaves, whose gradients autograd keeps."""
        older = self.stash[depth]
        self._stashed[depth] = {
            name: older[name].detach().requires_grad_(parameter.requires_grad)
            for name, parameter in self._named(depth)
        }
        return self._stashed[depth]

    def _to_live(self, depth: int) -> None:
        """Gives the gradients of stashed parameters to the live ones."""
        leaves = self._stashed.pop(depth)
        for name, parameter in self._named(depth):
            parameter.grad = leaves[name].grad


def step(
    parties: Sequence[Party],
    optimizers: Mapping[str, Stepping],
    clip: Callable[[list[nn.Parameter]], Any] | None = None,
) -> None:
    """Lets parties take a step, after both stages of the backward pass.

    Args:
        parties: Those with gradients.
        optimizers: By role. Each has the parameters of all parties of the role that are
            live in this process; those without a gradient stay as they are.
        clip: Limits a party's gradient, by itself: no party sees another's.
    """
    if clip is not None:
        for party in parties:
            clip(party.parameters())
    for role in dict.fromkeys([party.role for party in parties]):
        optimizers[role].step()
        optimizers[role].zero_grad()


def joined(several: Sequence[Values]) -> Values:
    """Returns the inputs of several clients as one batch.

    Raises:
        ValueError: If numbers cross the cut that may depend on a client's batch.
    """
    values = list(zip(*several, strict=True))
    _require_tensors(value for alike in values for value in alike)
    return tuple(
        torch.cat([v.detach() for v in alike]).requires_grad_(
            any(v.requires_grad for v in alike)
        )
        for alike in values
    )


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _sent(calls: Sequence[Call]) -> list[Values]:
    """Returns the smashed data of each client, detached from their graph."""
    found = list[Values]()
    for call in calls:
        own: list[Any] = []
        if len(call.sizes) > 1:
            _require_tensors(call.outputs)
        for value in call.outputs:
            if not isinstance(value, Tensor):
                own.append([value])
                continue
            sent, trains = value.detach(), value.requires_grad
            parts = (
                torch.split(sent, list(call.sizes)) if len(call.sizes) > 1 else [sent]
            )
            for part in parts if trains else ():
                part.requires_grad_()
            own.append(parts)
        found += zip(*own, strict=True)
    return found


def _returned(calls: Iterable[Call]) -> list[Values]:
    """Returns the gradients of what came to a segment, for each client."""
    found: list[Values] = []
    for call in calls:
        own: list[Any] = []
        for number in range(len(call.inputs)):
            gradient = call.gradients.get(number)
            if gradient is None or len(call.sizes) == 1:
                own.append([gradient] * len(call.sizes))
            else:
                counts = [rows[number] for rows in call.rows]
                parts = torch.split(gradient, [count for count, _ in counts])
                pairs = zip(parts, counts, strict=True)
                own.append([part if wants else None for part, (_, wants) in pairs])
        found += zip(*own, strict=True)
    return found


def _weighed(several: Sequence[Values], factors: Sequence[Tensor]) -> list[Values]:
    """Multiplies each client's gradients by a factor."""
    return [
        tuple(None if v is None else v * factor.to(v) for v in values)
        for values, factor in zip(several, factors, strict=True)
    ]


def _require_tensors(values: Iterable[Any]) -> None:
    if not all(isinstance(value, Tensor) for value in values):
        raise ValueError(
            "Expected only tensors to cross the cut where clients act together, but "
            "those behind it take sizes, too, which are those of one batch. Cut after "
            "another layer."
        )
