"""What several clients that take part in a step together do at the cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from split_lightning.batch_norm import BatchNormByClient, Normalisation, is_only_mixer
from split_lightning.channel import Activations, values_of
from split_lightning.data.loader import StepBatch
from split_lightning.replicas import Replicas
from split_lightning.running_mean import RunningMean

Layout = Callable[[Tensor], Tensor]


def forward(
    clients: Replicas,
    batch: StepBatch,
    lay_out: Layout,
    normalisation: Normalisation = "own",
) -> list[Activations]:
    """Returns what each client computes, or all at once where that is the same.

    That is so where they share their weights, and no layer mixes samples but
    BatchNorm, which can be told whose they are.

    Args:
        clients: The live segments.
        batch: The batches of those who take part.
        lay_out: Puts images into the memory layout of the weights.
        normalisation: Whether BatchNorm sees each client's samples by themselves
            (`own`), or those of all who share their weights as one batch (`joint`).

    Raises:
        ValueError: If a layer mixes samples that are to stay apart, and cannot be told
            whose they are.
    """
    acting = clients.acting()
    if len(batch.parts) == 1 or len(acting) > 1:
        seats = [clients.seat_of(part.client_id) for part in batch.parts]
        pairs = zip(seats, batch.parts, strict=True)
        return [segment(lay_out(part.inputs)) for segment, part in pairs]
    (shared,) = acting
    if not is_only_mixer(shared):
        if normalisation == "joint":
            raise ValueError(
                "Expected argument `batch_norm` to be 'own' where the client segment "
                "has layers beside BatchNorm that keep buffers: they may mix clients' "
                "samples. Got 'joint'."
            )
        return _forward_with_mean_buffers(shared, batch, lay_out)
    inputs = lay_out(torch.cat([part.inputs for part in batch.parts]))
    if normalisation == "joint":
        return [shared(inputs)]
    with BatchNormByClient([len(part.targets) for part in batch.parts]):
        return [shared(inputs)]


def _forward_with_mean_buffers(
    segment: nn.Module, batch: StepBatch, lay_out: Layout
) -> list[Activations]:
    """Returns what clients compute that share their weights, each by itself.

    Each begins with the same buffers (BatchNorm's statistics); they end with the mean
    of them all, weighted by samples.
    """
    buffers = dict(segment.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    mean, activations = RunningMean(), []
    for part in batch.parts:
        _copy(before, buffers)
        activations.append(segment(lay_out(part.inputs)))
        mean.add(buffers, part.num_samples)
    _copy(mean.state(), buffers)
    return activations


def _copy(state: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        # Past autograd, which would refuse to go back through BatchNorm: in training
        # its backward has no use for the statistics that change here.
        buffer.data.copy_(state[name])


def joined(smashed: Sequence[Activations]) -> tuple[Any, ...]:
    """Returns what several clients sent up as one batch; of one client as it is.

    Raises:
        ValueError: If numbers cross the cut that may depend on a client's batch.
    """
    if len(smashed) == 1:
        return values_of(smashed[0])
    values = list(zip(*map(values_of, smashed), strict=True))
    if not all(isinstance(value, Tensor) for several in values for value in several):
        raise ValueError(
            "Expected only tensors to cross the cut where clients act together, but "
            "the server segment takes sizes, too, which are those of one client's "
            "batch. Cut after another layer."
        )
    return tuple(torch.cat(several) for several in values)


def scale_cut_gradients(
    smashed: Sequence[Activations], sizes: Tensor, own: bool, shared: bool
) -> None:
    """Scales each client's gradient at the cut, in place.

    Of B samples in a step b are a client's. The gradient of its own mean loss is B / b
    times its slice of the gradient of the joint mean loss. In a mean over clients that
    is weighted by samples it counts b / B times. Both together change nothing.

    Args:
        smashed: What crossed, after the server's backward: one for each client, or one
            for all.
        sizes: Number of samples of each client.
        own: Whether the gradient is to be that of each client's own mean loss.
        shared: Whether the clients' gradients are averaged in this step.
    """
    if len(sizes) == 1 or own == shared:
        return
    factors = sizes / sizes.sum() if shared else sizes.sum() / sizes
    of_samples = factors.repeat_interleave(sizes)
    lengths = [len(values_of(several)[0]) for several in smashed]
    for several, part in zip(smashed, torch.split(of_samples, lengths), strict=True):
        for gradient in (value.grad for value in values_of(several)):
            if gradient is not None:
                shape = (-1, *[1] * (gradient.ndim - 1))
                gradient.mul_(part.to(gradient).reshape(shape))


def average_cut_gradients(
    smashed: Sequence[Activations], sizes: Sequence[int], count: int
) -> None:
    """Gives clients the mean of their gradients at the cut, in place.

    Position by position in their batches; of different sizes they are left as they are.

    Args:
        smashed: What crossed, after the server's backward: one for each client, or one
            for all.
        sizes: Number of samples of each client.
        count: Number of clients, the first.
    """
    for several in zip(*map(values_of, smashed), strict=True):
        gradients = [value.grad for value in several if value.grad is not None]
        if len(gradients) < len(sizes):  # one for all
            gradients = [own for g in gradients for own in torch.split(g, list(sizes))]
        gradients = gradients[:count]
        if len({gradient.shape for gradient in gradients}) == 1:
            mean = torch.stack(gradients).mean(dim=0)
            for gradient in gradients:
                gradient.copy_(mean)


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
