"""A segment: what of a network one party holds."""

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
    """Some of a network's operations, with just the layers that they use.

    The layers keep their paths, so that the keys of the segment's state dict are the
    network's own. They are the network's layers themselves, not copies.

    A party may hold several stretches of the network, between which others compute (the
    first and the last in a U-shape): then the segment has several, and one state dict.

    Args:
        network: The network that the layers are taken from.
        stretches: What it runs, in the order of the network.

    Raises:
        ValueError: In `forward`, if a tuple of tensors would cross as one value.
    """

    def __init__(self, network: nn.Module, stretches: Sequence[Stretch]) -> None:
        super().__init__()
        graphs = [graph for stretch in stretches for graph in stretch.graphs.values()]
        nodes = [node for graph in graphs for node in graph.nodes]
        used = {str(n.target) for n in nodes if n.op in ("call_module", "get_attr")}
        for path in sorted(used):  # a layer before what is in it
            adopt(self, network, path)
        self.training = network.training
        self._version = network._version
        self._paths = [
            {
                str(node.target)
                for graph in stretch.graphs.values()
                for node in graph.nodes
                if node.op in ("call_module", "get_attr")
            }
            for stretch in stretches
        ]
        self._sends = [
            stretch.sends and _num_results(stretch.graphs[True])
            for stretch in stretches
        ]
        self._codes = [
            {training: Code(graph) for training, graph in stretch.graphs.items()}
            for stretch in stretches
        ]

    @property
    def code(self) -> list[str]:
        """What it runs, as text."""
        return [code.text for stretch in self._codes for code in stretch.values()]

    def forward(self, *inputs: Any, stretch: int | Sequence[int] = 0) -> Any:
        """Runs a stretch of operations, in the order of the unsplit network.

        Args:
            inputs: The network's inputs for its first stretch; else what the stretch
                before returned (each element of a tuple).
            stretch: Which of the segment's; several: side by side, each from the same
                inputs, and what is returned is all that they return.

        Returns:
            The activations at the cut, a tensor, or a tuple where several values cross;
            the last stretch of the network: what the network returns (of a mapping,
            such as those of Hugging Face, the `logits`).
        """
        if not isinstance(stretch, int):
            several = [self(*inputs, stretch=own) for own in stretch]
            return several[0] if len(several) == 1 else tuple(_flat(several))
        results = self._codes[stretch][self.training](self, *inputs)
        if not self._sends[stretch]:
            return logits_in(results)
        for value in (results,) if self._sends[stretch] == 1 else results:
            _require_whole(value)
        return results

    def parameters_of(self, *stretches: int) -> list[nn.Parameter]:
        """Returns the parameters that stretches of operations use."""
        named = self.named_parameters()
        return [p for name, p in named if self._is_used(name, stretches)]

    def state_of(self, *stretches: int) -> dict[str, Tensor]:
        """Returns what of the state dict stretches of operations use."""
        state = self.state_dict()
        return {k: v for k, v in state.items() if self._is_used(k, stretches)}

    def _is_used(self, name: str, stretches: Sequence[int]) -> bool:
        paths = (path for stretch in stretches for path in self._paths[stretch])
        return any(name == path or name.startswith(f"{path}.") for path in paths)


class Stretches(nn.Module):
    """Stretches of segments, one after the other, as a module of its own.

    Args:
        segments: The segments; their layers are their own.
        stretches: Which stretch of each, or several side by side.
    """

    def __init__(
        self,
        segments: Sequence[nn.Module],
        stretches: Sequence[int | Sequence[int]],
    ) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        self.stretches = list(stretches)

    def forward(self, *inputs: Any) -> Any:
        """Runs the stretches: see `Segment.forward`."""
        results: Any = inputs
        for segment, stretch in zip(self.segments, self.stretches, strict=True):
            values = results if isinstance(results, tuple) else (results,)
            results = segment(*values, stretch=stretch)
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


def _flat(several: Sequence[Any]) -> list[Any]:
    """Returns what stretches returned, a tensor or a tuple each, as one list."""
    tuples = [own if isinstance(own, tuple) else (own,) for own in several]
    return [value for own in tuples for value in own]


def _num_results(graph: fx.Graph) -> int:
    (results,) = next(reversed(graph.nodes)).args
    return len(results) if isinstance(results, tuple) else 1


def _require_whole(value: Any) -> None:
    """Refuses a value that is made of several."""
    if isinstance(value, tuple | list | Mapping):
        raise ValueError(
            "Expected tensors to cross the cut, but a layer before it returns "
            f"{described(value)}, which those after it use as a whole. Cut one layer "
            "earlier or later."
        )
