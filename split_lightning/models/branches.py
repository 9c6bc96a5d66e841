"""Branches: operations that share nothing but the inputs, apart."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from split_lightning.models.segment import Stretch
from split_lightning.models.trace import find


def branches_of(network: nn.Module, stretch: Stretch, count: int) -> list[Stretch]:
    """Returns the branches of a stretch, in the order of what they return.

    Args:
        network: The network of these operations.
        stretch: Operations from the inputs to a cut.
        count: Number of branches that there have to be.

    Raises:
        ValueError: If there are more or fewer, or two of them share a layer.
    """
    found = {mode: _apart(graph) for mode, graph in stretch.graphs.items()}
    for graphs in found.values():
        if len(graphs) != count:
            raise ValueError(
                f"Expected as many branches of the network as there are holders "
                f"({count}), which share nothing but the inputs and end at the first "
                f"cut, but there are {len(graphs)}. Build the network with "
                "`VerticalNetwork` or `vertical_network`, and name `bottoms` as the "
                "first of `cut_layer`."
            )
        if shared := _shared(network, graphs):
            raise ValueError(
                "Expected holders to share no layer, but two of them use "
                f"`{shared}`. Give each a module of its own."
            )
    return [
        Stretch({mode: graphs[branch] for mode, graphs in found.items()}, stretch.sends)
        for branch in range(count)
    ]


def _apart(graph: fx.Graph) -> list[fx.Graph]:
    """Returns a graph for each set of operations that are joined to each other.

    Joined is what uses the same results: an operation in place changes what others use,
    and no other may use its own.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    root: dict[fx.Node, fx.Node] = {node: node for node in nodes}

    def root_of(node: fx.Node) -> fx.Node:
        while root[node] is not node:
            node = root[node]
        return node

    for node in nodes:
        for source in node.all_input_nodes:
            if source in root:
                root[root_of(node)] = root_of(source)
    branch_of = {node: root_of(node) for node in nodes}
    (returned,) = next(node for node in graph.nodes if node.op == "output").args
    values: Any = returned if isinstance(returned, tuple) else (returned,)
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value in values:
        ends.setdefault(branch_of[value], []).append(value)
    assert [value for own in ends.values() for value in own] == list(values)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return [
        _only([*inputs, *(node for node in nodes if branch_of[node] is branch)], own)
        for branch, own in ends.items()
    ]


def _only(nodes: list[fx.Node], values: list[fx.Node]) -> fx.Graph:
    """Returns a graph of some operations, that returns some of their results."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    returned = tuple(copies[value] for value in values)
    graph.output(returned[0] if len(returned) == 1 else returned)
    return graph


def _shared(network: nn.Module, graphs: list[fx.Graph]) -> str | None:
    """Returns the path of a layer, parameter or buffer that two graphs use."""
    seen: dict[int, int] = {}
    for number, graph in enumerate(graphs):
        for node in graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            held = find(network, str(node.target))
            tensors = [held]
            if isinstance(held, nn.Module):
                tensors = [*held.parameters(), *held.buffers()]
            for tensor in tensors:
                if seen.setdefault(id(tensor), number) != number:
                    return str(node.target)
    return None
