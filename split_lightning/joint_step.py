"""What clients that take part in a step together compute, and get at a cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from split_lightning.batch_norm import BatchNormByClient, Normalisation, is_only_mixer
from split_lightning.channel import Activations, values_of
from split_lightning.data.loader import StepBatch
from split_lightning.replicas import Replicas
from split_lightning.running_mean import RunningMean

# What crosses a cut: of each client by itself, or of all in one.
Several: TypeAlias = Sequence[Activations]


def at_clients(
    clients: Replicas,
    batch: StepBatch,
    inputs: Several,
    stretch: int | Sequence[int] = 0,
    normalisation: Normalisation = "own",
) -> list[Activations]:
    """Returns what each client computes, or all at once where that is the same.

    That is so where they share their weights, and no layer mixes samples but
    BatchNorm, which can be told whose they are.

    Args:
        clients: The live segments.
        batch: The batches of those who take part.
        inputs: What they compute from.
        stretch: Which stretch of their segment; several side by side.
        normalisation: Whether BatchNorm sees each client's samples by themselves
            (`own`), or those of all who share their weights as one batch (`joint`).

    Raises:
        ValueError: If a layer mixes samples that are to stay apart, and cannot be told
            whose they are.
    """
    sizes = sizes_of(batch)
    seats = [clients.seat_of(part.client_id) for part in batch.parts]
    acting = list(dict.fromkeys(seats))
    if len(sizes) == 1 or len(acting) > 1:
        pairs = zip(seats, apart(inputs, sizes), strict=True)
        return [segment(*values, stretch=stretch) for segment, values in pairs]
    (shared,) = acting
    if not is_only_mixer(shared):
        if normalisation == "joint":
            raise ValueError(
                "Expected argument `batch_norm` to be 'own' where the client segment "
                "has layers beside BatchNorm that keep buffers: they may mix clients' "
                "samples. Got 'joint'."
            )
        return _with_mean_buffers(shared, sizes, apart(inputs, sizes), stretch)
    if normalisation == "joint":
        return [shared(*joined(inputs), stretch=stretch)]
    with BatchNormByClient(sizes):
        return [shared(*joined(inputs), stretch=stretch)]


def _with_mean_buffers(
    segment: nn.Module,
    sizes: Sequence[int],
    inputs: Sequence[tuple[Any, ...]],
    stretch: int | Sequence[int],
) -> list[Activations]:
    """Returns what clients compute that share their weights, each by itself.

    Each begins with the same buffers (BatchNorm's statistics); they end with the mean
    of them all, weighted by samples.
    """
    buffers = dict(segment.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    mean, activations = RunningMean(), []
    for size, values in zip(sizes, inputs, strict=True):
        _copy(before, buffers)
        activations.append(segment(*values, stretch=stretch))
        mean.add(buffers, size)
    _copy(mean.state(), buffers)
    return activations


def _copy(state: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        # Past autograd, which would refuse to go back through BatchNorm: in training
        # its backward has no use for the statistics that change here.
        buffer.data.copy_(state[name])


def sizes_of(batch: StepBatch) -> list[int]:
    """Returns the number of samples of each client in a step."""
    return [len(part.targets) for part in batch.parts]


def joined(several: Several) -> tuple[Any, ...]:
    """Returns what several clients sent as one batch; of one client as it is.

    Raises:
        ValueError: If numbers cross the cut that may depend on a client's batch.
    """
    if len(several) == 1:
        return values_of(several[0])
    values = list(zip(*map(values_of, several), strict=True))
    _require_tensors(value for alike in values for value in alike)
    return tuple(torch.cat(alike) for alike in values)


def apart(several: Several, sizes: Sequence[int]) -> list[tuple[Any, ...]]:
    """Returns what is each client's of what is theirs, or of one batch of all.

    Raises:
        ValueError: If numbers cross the cut that may depend on the whole batch.
    """
    if len(several) == len(sizes):
        return [values_of(own) for own in several]
    (values,) = map(values_of, several)
    _require_tensors(values)
    parts = (torch.split(value, list(sizes)) for value in values)
    return list(zip(*parts, strict=True))


def _require_tensors(values: Iterable[Any]) -> None:
    if not all(isinstance(value, Tensor) for value in values):
        raise ValueError(
            "Expected only tensors to cross the cut where clients act together, but "
            "those behind it take sizes, too, which are those of one batch. Cut after "
            "another layer."
        )


def factors_of(sizes: Sequence[int], own: bool, shared: bool) -> Tensor:
    """Returns by what clients multiply the gradient of the step's mean loss.

    Of B samples in a step b are a client's. The gradient of its own mean loss is B / b
    times its slice of the gradient of the joint mean loss. In a mean over clients that
    is weighted by samples it counts b / B times. Both together change nothing.

    Args:
        sizes: Number of samples of each client.
        own: Whether the gradient is to be that of each client's own mean loss.
        shared: Whether the clients' gradients are averaged in this step.
    """
    counts = torch.tensor(sizes)
    if own == shared:
        return torch.ones(len(sizes))
    return counts / counts.sum() if shared else counts.sum() / counts


def scale_gradients(several: Several, sizes: Sequence[int], factors: Tensor) -> None:
    """Multiplies each client's gradient at a cut.

    Args:
        several: What crossed, after the backward of what is behind the cut: one for
            each client, or one for all.
        sizes: Number of samples of each client.
        factors: One for each client.
    """
    if bool((factors == 1).all()):
        return
    of_samples = factors.repeat_interleave(torch.tensor(sizes))
    lengths = [len(values_of(own)[0]) for own in several]
    for own, part in zip(several, torch.split(of_samples, lengths), strict=True):
        for value in _with_gradient(values_of(own)):
            shape = (-1, *[1] * (value.ndim - 1))
            # Not in place: values may share the memory of their gradients.
            value.grad = value.grad * part.to(value.grad).reshape(shape)


def average_cut_gradients(
    smashed: Sequence[Activations], sizes: Sequence[int], count: int
) -> None:
    """Gives clients the mean of their gradients at the cut.

    Position by position in their batches; of different sizes they are left as they are.

    Args:
        smashed: What crossed, after the server's backward: one for each client, or one
            for all.
        sizes: Number of samples of each client.
        count: Number of clients, the first.
    """
    for alike in zip(*map(values_of, smashed), strict=True):
        values = _with_gradient(alike)
        gradients = [value.grad for value in values]
        one_for_all = len(gradients) < len(sizes)
        if one_for_all:
            gradients = [own for g in gradients for own in torch.split(g, list(sizes))]
        if len({gradient.shape for gradient in gradients[:count]}) != 1:
            continue
        mean = torch.stack(gradients[:count]).mean(dim=0)
        gradients = [mean] * len(gradients[:count]) + gradients[count:]
        if one_for_all:
            gradients = [torch.cat(gradients)]
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient


def _with_gradient(values: Iterable[Any]) -> list[Any]:
    """Returns the tensors among values that got a gradient."""
    return [value for value in values if getattr(value, "grad", None) is not None]


def with_gradients(
    activations: Sequence[Activations], gradients: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what the clients go back from, and its gradients.

    Args:
        activations: What crossed, one for each client, or one for all.
        gradients: The gradient of each value, `None` where there is none: nothing of
            the clients trains there.
    """
    values = [value for a in activations for value in values_of(a)]
    pairs = [(v, g) for v, g in zip(values, gradients, strict=True) if g is not None]
    return [value for value, _ in pairs], [gradient for _, gradient in pairs]
