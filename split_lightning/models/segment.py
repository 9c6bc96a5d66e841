"""A segment: the part of a network that one party holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from split_lightning.models.trace import find


class Segment(nn.Module):
    """Some of a network's operations, with just the layers that they use.

    The layers keep their paths, so that the keys of the segment's state dict are the
    network's own. They are the network's layers themselves, not copies.

    Args:
        network: The network that the layers are taken from.
        graphs: The segment's operations in train mode (`True`) and eval mode
            (`False`), over the network's layers.
        sends: Whether what it returns crosses a cut.

    Raises:
        ValueError: In `forward`, if a tuple of tensors would cross as one value.
    """

    def __init__(
        self, network: nn.Module, graphs: dict[bool, fx.Graph], sends: bool = False
    ) -> None:
        super().__init__()
        nodes = [node for graph in graphs.values() for node in graph.nodes]
        used = {str(n.target) for n in nodes if n.op in ("call_module", "get_attr")}
        for path in sorted(used):  # a layer before what is in it
            adopt(self, network, path)
        self.training = network.training
        self._version = network._version
        self._sends = sends
        self._forwards: dict[bool, Callable[..., Any]] = {
            training: type(fx.GraphModule(network, graph)).forward
            for training, graph in graphs.items()
        }

    def forward(self, *inputs: Any) -> Any:
        """Runs the segment's operations, in the order of the unsplit network.

        Args:
            inputs: The network's inputs for the client segment; for the server
                segment what the client segment returned (each element of a tuple).

        Returns:
            The client segment: the activations at the cut, a tensor, or a tuple where
            several values cross. The server segment: what the network returns.
        """
        results = self._forwards[self.training](self, *inputs)
        if self._sends:
            _refuse_nested(results)
        return results


def adopt(segment: nn.Module, network: nn.Module, path: str) -> None:
    """Hangs what the network has at a path on the segment, at the same path."""
    *parents, name = path.split(".")
    source, owner = network, segment
    for parent in parents:
        source = source.get_submodule(parent)
        if parent not in dict(owner.named_children()):
            owner.add_module(parent, nn.Module())
            # State dicts carry it: some layers load older versions in another way.
            owner.get_submodule(parent)._version = source._version
        owner = owner.get_submodule(parent)
    value = find(source, name)
    if isinstance(value, nn.Module):
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    elif isinstance(value, Tensor):
        # Tracing's own constants are no buffers of the network: never in a state dict.
        saved = network.state_dict(keep_vars=True).keys()
        owner.register_buffer(name, value, persistent=path in saved)
    else:
        setattr(owner, name, value)


def _refuse_nested(results: Any) -> None:
    if isinstance(results, list) or (
        isinstance(results, tuple)
        and any(isinstance(value, tuple | list | dict) for value in results)
    ):
        raise ValueError(
            "Expected tensors to cross the cut, but the layers before it return a "
            "tuple that those after it use as a whole. Cut one layer earlier or later."
        )
