"""The costs of each cut of a network: client, server and link."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from split_lightning.message import as_values, num_bytes
from split_lightning.models.flops import flop_counter
from split_lightning.models.split import cut_layers as all_cut_layers
from split_lightning.models.split import split

# Batches that are measured; what they differ by is a sample's. (One image alone would
# be too few for BatchNorm where it has one pixel left.)
_BATCH_SIZES = (2, 3)


class CutCost(NamedTuple):
    """The costs of training where a network is cut after a layer, in fp32.

    FLOPs are those of matrix products and convolutions, as `torch.utils.flop_counter`
    has them: a multiplication and an addition are two.

    Attributes:
        cut_layer: The path of the layer.
        client_parameters: Number of the client segment's parameters.
        client_bytes: Bytes of its state, parameters and buffers: those of a hand-off.
        client_forward_flops: FLOPs of the client's forward, a sample.
        client_backward_flops: FLOPs of its backward from the gradient at the cut, a
            sample. Images need no gradient.
        server_forward_flops: FLOPs of the server's forward, a sample.
        server_backward_flops: FLOPs of its backward down to the cut, a sample.
        client_activation_bytes: Bytes that the client keeps from its forward for its
            backward, a sample: each memory once, the image where a layer needs it,
            parameters not.
        uplink_bytes: Bytes of smashed data and label, up to the server, a sample.
        downlink_bytes: Bytes of the gradient at the cut, down to the client, a sample.
        uplink_bytes_per_batch: Further bytes up for each batch of any size:
            sizes that cross.
    """

    cut_layer: str
    client_parameters: int
    client_bytes: int
    client_forward_flops: int
    client_backward_flops: int
    server_forward_flops: int
    server_backward_flops: int
    client_activation_bytes: int
    uplink_bytes: int
    downlink_bytes: int
    uplink_bytes_per_batch: int

    @property
    def client_flops(self) -> int:
        """FLOPs of the client's forward and backward, a sample."""
        return self.client_forward_flops + self.client_backward_flops

    @property
    def server_flops(self) -> int:
        """FLOPs of the server's forward and backward, a sample."""
        return self.server_forward_flops + self.server_backward_flops

    @property
    def link_bytes(self) -> int:
        """Bytes up and down, a sample."""
        return self.uplink_bytes + self.downlink_bytes

    def is_dominated(self, others: Iterable[CutCost]) -> bool:
        """Returns whether another cut is better in one cost and worse in none.

        Costs are those of the client and the link: FLOPs, bytes that cross,
        activations kept, and the segment's state.
        """
        own = self._demands()
        return any(
            theirs != own and all(t <= o for t, o in zip(theirs, own, strict=True))
            for theirs in (other._demands() for other in others)
        )

    def _demands(self) -> tuple[int, ...]:
        return (
            self.client_flops,
            self.link_bytes,
            self.client_activation_bytes,
            self.client_bytes,
        )


def cut_costs(
    network: nn.Module,
    image_shape: Sequence[int],
    cut_layers: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[CutCost]:
    """Returns the costs of training at each cut of a network, in order.

    The segments take a step as in training, on a CPU. Nothing is computed where the
    shapes of the tensors are enough to know what it takes (torch's fake tensors).

    Args:
        network: Any network that `split` can cut; it stays unchanged.
        image_shape: The shape of a sample, such as `(C, H, W)`.
        cut_layers: The paths of the layers; `None`: all after which it can be cut.
        dtype: The type of a sample: int64 for ids.

    Raises:
        ValueError: If the network cannot be cut after one of the layers, or does not
            take images of that shape.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2))
    >>> (cost,) = cut_costs(network, (1, 4, 4))
    >>> cost.cut_layer, cost.client_parameters, cost.client_bytes
    ('1', 51, 204)
    >>> cost.client_forward_flops, cost.client_backward_flops, cost.uplink_bytes
    (96, 96, 20)
    """
    sketch, sample = _on_meta(network), torch.empty(*image_shape, dtype=dtype)
    if cut_layers is None:
        cut_layers = all_cut_layers(sketch)
    costs = []
    for layer in cut_layers:
        client, server = split(sketch, layer)
        parameters = sum(p.numel() for p in client.parameters())
        state = num_bytes(client.state_dict().values())
        try:
            with _silent("torch._subclasses.fake_tensor"):
                found = _imagined(client, server, sample)
        except Exception:  # what depends on values; or else it fails once more
            found = _computed(network, layer, sample)
        costs.append(CutCost(layer, parameters, state, **found))
    return costs


def _on_meta(network: nn.Module) -> nn.Module:
    """Returns a copy whose parameters and buffers have a shape, and no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for p in network.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in network.buffers()}
    return copy.deepcopy(network, memo)


def _imagined(client: nn.Module, server: nn.Module, sample: Tensor) -> dict[str, int]:
    """Measures segments with fake tensors of a CPU, which have no numbers.

    (Those of `meta` do not: attention keeps other things there.)
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        client.to_empty(device="cpu")
        server.to_empty(device="cpu")
        return _measured(client, server, sample)


def _computed(network: nn.Module, layer: str, sample: Tensor) -> dict[str, int]:
    """Measures a cut with the numbers themselves."""
    client, server = split(network, layer)
    try:
        with next(client.parameters()).device:
            return _measured(client, server, sample)
    except (IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            "Expected argument `network` to take images of shape "
            f"{tuple(sample.shape)}, but: {error}"
        ) from error


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Silences a logger: the attempt may fail."""
    logger = logging.getLogger(name)
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _measured(client: nn.Module, server: nn.Module, sample: Tensor) -> dict[str, int]:
    """Returns what a sample takes, by the fields of `CutCost`."""
    few, more = _BATCH_SIZES
    first, second = (
        _step(client.train(), server.train(), sample.new_zeros(size, *sample.shape))
        for size in _BATCH_SIZES
    )
    found = {key: (second[key] - first[key]) // (more - few) for key in first}
    found["uplink_bytes_per_batch"] = (
        first["uplink_bytes"] - few * found["uplink_bytes"]
    )
    return found


def _step(client: nn.Module, server: nn.Module, images: Tensor) -> dict[str, int]:
    """Takes a step of training, without the optimizers'; returns what it took."""
    found: dict[str, int] = {}
    with _flops(found, "client_forward_flops"), _saved(found):
        activations = as_values(client(images))
    smashed = tuple(
        v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in activations
    )
    labels = torch.zeros(len(images), dtype=torch.int64)
    with _flops(found, "server_forward_flops"):
        logits = server(*smashed)
    with _flops(found, "server_backward_flops"):
        logits.sum().backward()
    gradients = [getattr(v, "grad", None) for v in smashed]
    pairs = [
        (v, g) for v, g in zip(activations, gradients, strict=True) if g is not None
    ]
    with _flops(found, "client_backward_flops"):
        if pairs:  # unless nothing of the client trains
            torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])
    found["uplink_bytes"] = num_bytes([*smashed, labels])
    found["downlink_bytes"] = num_bytes(gradients)
    return found


@contextmanager
def _flops(found: dict[str, int], name: str) -> Iterator[None]:
    """Counts the FLOPs of what is done inside."""
    with flop_counter() as counter:
        yield
    found[name] = counter.get_total_flops()


@contextmanager
def _saved(found: dict[str, int]) -> Iterator[None]:
    """Counts the bytes that autograd keeps of what is done inside.

    Parameters too: they are no sample's, and go with the difference of two batches.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        kept[memory._cdata] = memory.nbytes()  # once
        return tensor.detach()  # an output itself would keep itself alive

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
    found["client_activation_bytes"] = sum(kept.values())
