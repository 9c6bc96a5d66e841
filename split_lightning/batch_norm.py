"""BatchNorm over several clients' samples: separately, or all as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from split_lightning.models.vertical import Bottom
from split_lightning.running_mean import RunningMean

# What layers see where several clients compute together: their samples as one batch
# (`joint`), each client's separately in BatchNorm (`by_client`) or in all layers
# (`apart`).
Normalisation: TypeAlias = Literal["joint", "by_client", "apart"]
T = TypeVar("T")

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNormByClient(TorchFunctionMode):
    """Context in which BatchNorm normalises each client's samples separately.

    All other layers see the samples of all clients as one batch. The running statistics
    become the mean, weighted by samples, of what they would become at each client.

    Args:
        sizes: Number of samples of each client, in the order of the batch.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        own = self._by_client if func is F.batch_norm else func
        return own(*args, **(kwargs or {}))

    def _by_client(
        self,
        inputs: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            fixed = (running_mean, running_var, weight, bias)
            return F.batch_norm(inputs, *fixed, momentum=momentum, eps=eps)
        kept = [s for s in (running_mean, running_var) if s is not None]
        own = [s.detach().repeat(len(self.sizes), 1) for s in kept]  # (clients, C)
        rows = list(zip(*own, strict=True)) or [(None, None)] * len(self.sizes)
        parts = zip(torch.split(inputs, self.sizes), rows, strict=True)
        outputs = [
            F.batch_norm(part, mean, var, weight, bias, True, momentum, eps)
            for part, (mean, var) in parts
        ]
        for running, values in zip(kept, own, strict=True):
            running.copy_(self._mean(values))
        return torch.cat(outputs)

    def _mean(self, values: Tensor) -> Tensor:
        """Returns the mean over clients of `(clients, C)`, weighted by samples."""
        # Apple's GPUs have no float64.
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        weights = torch.tensor(self.sizes, dtype=wide, device=values.device)
        return (weights @ values.to(wide)) / sum(self.sizes)


def with_mean_buffers(
    segment: nn.Module, runs: Iterable[Callable[[], T]], sizes: Sequence[int]
) -> list[T]:
    """Runs the forward passes of clients that share a segment, one after the other.

    Each begins with the same buffers (BatchNorm's statistics); they end with the mean
    of them all, weighted by samples.

    Args:
        segment: The segment.
        runs: The forward pass of each client.
        sizes: Number of samples of each client.
    """
    buffers = dict(segment.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    mean, found = RunningMean(), []
    for size, run in zip(sizes, runs, strict=True):
        _copy(before, buffers)
        found.append(run())
        mean.add(buffers, size)
    _copy(mean.state(), buffers)
    return found


def _copy(state: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        # Past autograd, which would refuse the backward pass of BatchNorm: in training
        # its backward has no use for the statistics that change here.
        buffer.data.copy_(state[name])


def is_only_mixer(segment: nn.Module) -> bool:
    """Returns whether a segment's samples meet in layers of BatchNorm alone.

    Other layers that keep buffers may mix them, too; those of a holder that lacks
    samples see others than those of the step.
    """
    layers = [
        m for m in segment.modules() if next(m.buffers(recurse=False), None) is not None
    ]
    lacks = any(isinstance(m, Bottom) and m.may_lack for m in segment.modules())
    return not lacks and all(type(layer) in _KINDS for layer in layers)


def statistics(segment: nn.Module) -> tuple[Tensor, ...]:
    """Returns tensors of the size of what a client sends for joint statistics.

    A mean and a variance for each channel that is normalised, in the forward pass, and
    as many again in the backward pass: the sums over its samples of the gradient, and
    of its product with what was normalised (as in torch's SyncBatchNorm). In one
    process they are computed together, so that only their size counts here.
    """
    layers = [m for m in segment.modules() if isinstance(m, _KINDS) and m.training]
    return tuple(torch.empty(2, layer.num_features) for layer in layers)
