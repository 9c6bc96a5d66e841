"""A segment: a part of a network that is never cut further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, fx, nn

from split_lightning.models.code import Code
from split_lightning.models.logits import described, logits_in
from split_lightning.models.trace import find

# The operations of a stretch of a network, in train mode (`True`) and eval mode.
Graphs: TypeAlias = dict[bool, fx.Graph]


class Stretch(NamedTuple):
    """The operations of a network from one cut to the next.

    Attributes:
        graphs: The operations, over the network's layers.
        sends: Whether what it returns crosses a cut.
    """

    graphs: Graphs
    sends: bool


class Segment(nn.Module):
    """A part of a network that is never cut further, with only the layers it uses.

    The layers keep their paths, so that the keys of the segment's state dict are the
    network's own. They are the network's layers themselves, not copies.

    Args:
        network: The network that the layers are taken from.
        stretch: The operations of the segment.

    Raises:
        ValueError: In `forward`, if a tuple of tensors would cross as one value.
    """

    def __init__(self, network: nn.Module, stretch: Stretch) -> None:
        super().__init__()
        nodes = [node for graph in stretch.graphs.values() for node in graph.nodes]
        used = {str(n.target) for n in nodes if n.op in ("call_module", "get_attr")}
        for path in sorted(used):  # a layer before what is in it
            adopt(self, network, path)
        self.training = network.training
        self._version = network._version
        self._num_sent = _num_results(stretch.graphs[True]) if stretch.sends else 0
        self._codes = {mode: Code(graph) for mode, graph in stretch.graphs.items()}

    @property
    def code(self) -> list[str]:
        """The operations as text, in train mode and eval mode."""
        return [code.text for code in self._codes.values()]

    def forward(self, *inputs: Any) -> Any:
        """Runs the operations in the order of the unsplit network.

        Args:
            inputs: The network's inputs for the first segment; else what the segment
                before returned (each element of a tuple).

        Returns:
            The activations at the cut, a tensor, or a tuple where several values cross;
            the last segment: what the network returns (of a mapping, such as those of
            Hugging Face, the `logits`).
        """
        results = self._codes[self.training](self, *inputs)
        if not self._num_sent:
            return logits_in(results)
        for value in (results,) if self._num_sent == 1 else results:
            if isinstance(value, tuple | list | Mapping):
                raise ValueError(
                    "Expected tensors to cross the cut, but a layer before it returns "
                    f"{described(value)}, which those after it use as a whole. Cut one "
                    "layer earlier or later."
                )
        return results


class Layers(nn.Module):
    """The layers of several segments in one module, at the network's own paths.

    It has their joint state dict, and no `forward`. The layers are the segments' own.

    Args:
        segments: The segments.
    """

    def __init__(self, segments: Sequence[nn.Module]) -> None:
        super().__init__()
        self._version = segments[0]._version
        for segment in segments:
            _graft(self, segment)


def _graft(owner: nn.Module, source: nn.Module) -> None:
    """Adds what one module has to another; shared parents are joined."""
    for name, child in source.named_children():
        there = owner._modules.get(name)
        if there is None:
            owner.add_module(name, child)
        elif there is not child:
            joined = nn.Module()  # neither segment's own: they stay as they are
            joined._version = child._version
            owner._modules[name] = joined
            _graft(joined, there)
            _graft(joined, child)
    owner._parameters.update(source._parameters)
    owner._buffers.update(source._buffers)
    owner._non_persistent_buffers_set |= source._non_persistent_buffers_set


def adopt(segment: nn.Module, network: nn.Module, path: str) -> None:
    """Adds what the network has at a path to the segment, at the same path."""
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


def _num_results(graph: fx.Graph) -> int:
    (results,) = next(reversed(graph.nodes)).args
    return len(results) if isinstance(results, tuple) else 1
