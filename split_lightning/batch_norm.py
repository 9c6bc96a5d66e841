"""BatchNorm over several clients' samples: each by itself, or all as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from split_lightning.models.vertical import Bottom

# Whose samples are normalised together.
Normalisation: TypeAlias = Literal["own", "joint"]

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNormByClient(TorchFunctionMode):
    """Within it, a layer's BatchNorm treats each client's samples by themselves.

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


def is_only_mixer(segment: nn.Module) -> bool:
    """Tells whether a segment's samples meet in layers of BatchNorm alone.

    Other layers that keep buffers may mix them, too; those of a holder that lacks
    samples see others than those of the step.
    """
    layers = [
        m for m in segment.modules() if next(m.buffers(recurse=False), None) is not None
    ]
    lacks = any(isinstance(m, Bottom) and m.may_lack for m in segment.modules())
    return not lacks and all(type(layer) in _KINDS for layer in layers)


def statistics_bytes(segment: nn.Module) -> int:
    """Returns the bytes of a mean and a variance for each channel that is normalised.

    So many a client sends up, and gets back, in a forward by joint statistics, and as
    many again in the backward: the sums over its samples of the gradient, and of its
    product with what was normalised.
    """
    layers = [m for m in segment.modules() if isinstance(m, _KINDS)]
    return sum(2 * 4 * layer.num_features for layer in layers if layer.training)
