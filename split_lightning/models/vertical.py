"""A network over parts of samples: a bottom for each holder, a join, a top."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from split_lightning.models.joins import JoinName, Missing, join_of
from split_lightning.models.parts import Parts
from split_lightning.models.split import split
from split_lightning.models.tracer import Leaf
from split_lightning.models.tracing import uncompiled

_logger = logging.getLogger(__name__)


class Bottom(Leaf):
    """A holder's lower layers, over its part of the samples.

    Args:
        network: The layers.
        may_lack: Whether the holder may lack samples: those with a NaN in its part.
            Its layers never see them in training, nor do they get a gradient.
    """

    def __init__(self, network: nn.Module, may_lack: bool = False) -> None:
        super().__init__()
        self.network = network
        self.may_lack = may_lack

    def forward(self, part: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the smashed data `(B, ...)`.

        Where the holder may lack samples: those of the samples that it has, and which
        these are, a mask of shape `(B,)`.
        """
        if not self.may_lack:
            values: Tensor = self.network(part)
            return values
        has = ~part.flatten(1).isnan().any(dim=1)
        if not self.training:  # no layer mixes samples
            return self.network(part.nan_to_num())[has], has
        if not has.any():  # nothing to compute; a copy knows the shape
            with torch.no_grad():
                shape = copy.deepcopy(self.network).eval()(torch.zeros_like(part))
            return torch.zeros_like(shape[:0]), has
        return self.network(part[has.nonzero()[:, 0]]), has


class Fill(Leaf):
    """Puts zeros where a holder lacks samples."""

    def forward(self, values: Tensor, has: Tensor) -> Tensor:
        """Returns `(B, ...)` from those that are there and a mask of shape `(B,)`."""
        zeros = values.new_zeros(len(has), *values.shape[1:])
        return zeros.index_put((has.nonzero()[:, 0],), values)


class VerticalNetwork(nn.Module):
    """A network over parts of samples that different holders have.

    Each holder's bottom computes from its own part alone; the join combines what
    they return, and the top takes it. Cut after `bottoms` it is trained vertically.

    Args:
        parts: How samples are divided among holders.
        bottoms: The lower layers of each holder, modules of their own: from its part
            to a tensor.
        join: From what the bottoms return, a list of tensors, to the top's input; also
            gets which samples each holder has where `missing` is given (see `joins`).
        top: The upper layers.
        missing: The join's rule for holders that lack a sample, a part with NaN;
            `None`: none lacks any.

    Raises:
        ValueError: If there are not as many bottoms as parts.

    >>> from split_lightning.models.joins import Sum
    >>> from split_lightning.models.parts import Columns
    >>> bottoms = [nn.Sequential(nn.Flatten(), nn.Linear(n, 3)) for n in (5, 4)]
    >>> network = VerticalNetwork(Columns(2), bottoms, Sum(), nn.Linear(3, 2))
    >>> network(torch.rand(7, 9, 1, 1)).shape
    torch.Size([7, 2])
    """

    def __init__(
        self,
        parts: Parts,
        bottoms: Sequence[nn.Module],
        join: nn.Module,
        top: nn.Module,
        missing: Missing | None = None,
    ) -> None:
        super().__init__()
        if missing is not None and missing not in get_args(Missing):
            raise ValueError(
                f"Expected argument `missing` to be one of {get_args(Missing)}, or "
                f"null where no holder lacks a sample, but got {missing!r}."
            )
        if len(bottoms) != len(parts):
            raise ValueError(
                f"Expected argument `bottoms` to be one for each of {len(parts)} "
                f"holders, but got {len(bottoms)}."
            )
        self.parts = parts
        self.missing = missing
        may_lack = missing is not None
        self.bottoms = nn.ModuleList(Bottom(own, may_lack) for own in bottoms)
        self.fill = Fill()
        self.join = join
        self.top = top

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns what the top does, such as logits `(B, K)`."""
        parts = self.parts(inputs)
        found = [own(part) for own, part in zip(self.bottoms, parts, strict=True)]
        if self.missing is None:
            joined = self.join(found)
        else:
            pairs = [(own[0], own[1]) for own in found]
            values = [self.fill(sent, has) for sent, has in pairs]
            joined = self.join(values, [has for _, has in pairs])
        logits: Tensor = self.top(joined)
        return logits


def parts_of(network: nn.Module) -> tuple[Parts | None, Missing | None]:
    """Returns how samples are divided for a network, and its rule for missing ones."""
    network = uncompiled(network)
    if isinstance(network, VerticalNetwork):
        return network.parts, network.missing
    return None, None


def vertical_network(
    make: Callable[[], nn.Module],
    cut_layer: str | int,
    parts: Parts,
    input_shape: Sequence[int],
    join: JoinName = "concat",
    missing: Missing | None = None,
) -> VerticalNetwork:
    """Makes a network over parts of samples, of any network and cut layer.

    The layers up to the cut are each holder's bottom, from a network made for it, so
    that each begins with weights of its own; those behind it, of the first, the top.
    `nn.Linear` layers that get another number of features than in the network, because
    a part is smaller or the joined values larger, are made anew in that width.

    Args:
        make: Makes the network, once for each holder.
        cut_layer: The layer that bottoms end with; one value crosses there.
        parts: How samples are divided among holders.
        input_shape: The shape of a sample, `(C, H, W)`.
        join: How the holders' values become one: `concat` (where the parts were),
            `sum`, `mean` or `attention`.
        missing: What the join takes of a holder that lacks a sample: `zeros`, or none
            (`skip`, where it is a mean); `None`: none lacks any.

    Raises:
        ValueError: If a holder would have nothing, or shapes do not fit.

    >>> from split_lightning.models import DigitsCNN
    >>> from split_lightning.models.parts import Tiles
    >>> network = vertical_network(DigitsCNN, "maxpool", Tiles(1, 2), (1, 8, 8))
    >>> network(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    parts.check(input_shape)
    halves = [split(make(), cut_layer) for _ in range(len(parts))]
    bottoms, (top, *_) = [b for b, _ in halves], [t for _, t in halves]
    example = parts(torch.zeros(2, *input_shape))
    with torch.no_grad(), _said_what_to_do(parts, cut_layer, join):
        values = [
            _fitted(f"bottoms.{holder}", bottom, part)
            for holder, (bottom, part) in enumerate(zip(bottoms, example, strict=True))
        ]
        if not all(isinstance(value, Tensor) for value in values):
            raise ValueError("several values cross there, and only one can be joined.")
    joining = join_of(join, parts, values[0].shape[1], missing)
    with torch.no_grad(), _said_what_to_do(parts, cut_layer, join):
        _fitted("top", top, joining(values))
    return VerticalNetwork(parts, bottoms, joining, top, missing)


def _fitted(name: str, network: nn.Module, example: Tensor) -> Tensor:
    """Returns what a network returns, once its linear layers take what comes."""

    def fit(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        width = inputs[0].shape[-1]
        if width == layer.in_features:
            return
        _logger.info(
            "%s.%s takes %d features instead of %d.",
            name,
            paths[layer],
            width,
            layer.in_features,
        )
        layer.in_features = width
        layer.weight = nn.Parameter(torch.empty(layer.out_features, width))
        layer.reset_parameters()

    paths = {m: path for path, m in network.named_modules() if type(m) is nn.Linear}
    hooks = [layer.register_forward_pre_hook(fit) for layer in paths]
    found: Tensor = network.eval()(example)
    for hook in hooks:
        hook.remove()
    network.train()
    return found


@contextmanager
def _said_what_to_do(parts: Parts, cut_layer: str | int, join: str) -> Iterator[None]:
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"Expected a network whose layers up to `{cut_layer}` (`cut_layer`) take "
            f"the parts of {parts}, and whose others take what {join!r} (`join`) makes "
            f"of what they return, but: {error} Use another cut layer, join or number "
            "of parts, or build a `VerticalNetwork` of bottoms and a top that fit."
        ) from error
