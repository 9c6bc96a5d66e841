"""`ClientNetwork`: a network of a client's own, in front of the server's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from split_lightning.models.adapter import Adapter
from split_lightning.models.split import split


class ClientNetwork:
    """A network whose lower layers are a client's segment.

    Args:
        network: Any network: images `(B, C, H, W)` to activations.
        cut_layer: The layer up to which the client computes; `None`: all of it.
        adapter: Whether an `Adapter` is put behind it where what it sends has another
            shape than what the server takes. It is part of the client's segment.

    Example::

        SplitLightningModule(
            resnet18(num_classes=10),
            "layer1",
            sgd,
            sgd,
            num_classes=10,
            client_networks=[None, ClientNetwork(vgg11(), "features.5", adapter=True)],
            image_shape=(3, 32, 32),
        )
    """

    def __init__(
        self,
        network: nn.Module,
        cut_layer: str | int | None = None,
        adapter: bool = False,
    ) -> None:
        self.network = network
        self.cut_layer = cut_layer
        self.adapter = adapter

    def segment(self, image_shape: Sequence[int], taken: Sequence[int]) -> nn.Module:
        """Returns the client's segment.

        Args:
            image_shape: The shape of an image: `(C, H, W)`.
            taken: The shape of a sample's activations that the server takes.

        Raises:
            ValueError: If what it sends does not fit, and is not adapted.
        """
        body = self.network
        if self.cut_layer is not None:
            body, _ = split(self.network, self.cut_layer)
        sent = shape_sent(body, image_shape, type(self.network).__name__)
        if sent == tuple(taken):
            return ClientSegment(body)
        if not self.adapter:
            raise ValueError(
                "Expected each of `client_networks` to send what the server takes, "
                f"activations of shape {tuple(taken)} for a sample, but what "
                f"{type(self.network).__name__} sends is of shape {sent}. Cut it after "
                "another layer, or put an adapter behind it (adapter=true)."
            )
        return ClientSegment(body, Adapter(sent, taken))


class ClientSegment(nn.Module):
    """The lower layers of a network of a client's own, and what adapts their outputs.

    Args:
        body: The layers.
        adapter: What is behind them; `None`: nothing.
    """

    def __init__(self, body: nn.Module, adapter: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.adapter = adapter

    def forward(self, *inputs: Any) -> Any:
        """Returns the activations that the client sends."""
        outputs = self.body(*inputs)
        return outputs if self.adapter is None else self.adapter(outputs)


def shape_sent(
    segment: nn.Module, image_shape: Sequence[int], name: str
) -> tuple[int, ...]:
    """Returns the shape of what a segment sends for a sample.

    Args:
        segment: A client's segment.
        image_shape: The shape of an image: `(C, H, W)`.
        name: What messages call the network.

    Raises:
        ValueError: If it does not take such images, or sends more than one tensor.
    """
    was_training = segment.training
    try:
        with torch.no_grad():
            outputs = segment.eval()(torch.zeros(2, *image_shape))
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"Expected {name} to take images of shape {tuple(image_shape)}, but: "
            f"{error}"
        ) from error
    finally:
        segment.train(was_training)
    if not isinstance(outputs, Tensor) or len(outputs) != 2:
        raise ValueError(
            f"Expected one tensor to cross the cut of {name} where clients have "
            "networks of their own (`client_networks`). Cut after another layer."
        )
    return tuple(outputs.shape[1:])
