"""A cut of a trace: the operations of each side, and the values that cross."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from split_lightning.models.trace import Trace, is_pick


class Cut:
    """A trace, cut after the last operation of a layer.

    Args:
        trace: The network's operations.
        cut_layer: The path of a layer that runs in the trace.

    Attributes:
        client: The operations of the client segment.
        server: The operations of the server segment.
        both: The client's operations that the server does again.
        crossing: The client's operations whose results the server needs.
    """

    def __init__(self, trace: Trace, cut_layer: str) -> None:
        self.trace = trace
        client = set(trace.nodes[: trace.ends[cut_layer] + 1])
        # A parameter belongs where it is used, not where it was first touched.
        held = [node for node in client if node.op == "get_attr"]
        client -= {node for node in held if not client & node.users.keys()}
        # The element of a tuple that crosses is chosen where the tuple is made.
        for node in trace.nodes:  # in order: a pick may be from a pick
            if is_pick(node) and _only_picked(node, client):
                client.add(node)
        self.client = [node for node in trace.nodes if node in client]
        self.server = [node for node in trace.nodes if node not in client]
        needed = {i for n in (*self.server, trace.output) for i in n.all_input_nodes}
        again = self._views_to_take_again(client & needed)
        needed |= {source for node in again for source in node.all_input_nodes}
        needed &= client
        again |= self._numbers_to_take_again(needed | again)
        again |= {node for node in needed if node.op == "get_attr"}
        self.both = [node for node in self.client if node in again]
        self.crossing = [n for n in self.client if n in needed and n not in again]

    def _views_to_take_again(self, needed: set[fx.Node]) -> set[fx.Node]:
        """Returns the views of what crosses that the server must take itself.

        Sent apart, views of one tensor are copies, and what the server does to one of
        them in place would no longer be seen in the others.
        """
        changes = self.trace.changes
        changed = {
            self.trace.chain_of(changes[node])[-1]
            for node in self.server
            if node in changes
        }
        chains = [self.trace.chain_of(node) for node in needed]
        roots = Counter(chain[-1] for chain in chains)
        return {
            node
            for chain in chains
            if chain[-1] in changed
            and (roots[chain[-1]] > 1 or chain[-1].op == "get_attr")
            for node in chain[:-1]
        }

    def _numbers_to_take_again(self, needed: set[fx.Node]) -> set[fx.Node]:
        """Returns the sizes that the server can read from what crosses."""
        sent, known = needed - self.trace.numbers, set[fx.Node]()
        for node in self.client:
            inputs = set(node.all_input_nodes)
            if node in self.trace.numbers and inputs <= sent | known:
                known.add(node)
        again, wanted = set[fx.Node](), needed & known
        while wanted:
            again |= wanted
            inputs = {source for node in wanted for source in node.all_input_nodes}
            wanted = inputs & known - again
        return again

    def problem(self) -> str | None:
        """Returns why the network cannot be trained with this cut, or `None`."""
        if not self.trace.trained.intersection(self.client):
            return "leaves the client segment empty (no parameters)"
        if not self.trace.trained.intersection(self.server):
            return "leaves the server segment empty (no parameters)"
        if self.trace.tuples.intersection(self.crossing):
            return "would send a tuple, which the layers behind it use as a whole"
        sent = set(self.crossing) - self.trace.numbers
        if not sent:
            return "leaves nothing to send: the server segment needs no result of it"
        if self.trace.takes_raw and sent & self._raw():
            return "would send raw inputs, which the layers behind it need too"
        return None

    def _raw(self) -> set[fx.Node]:
        """Returns what the client has from the inputs through no parameter."""
        raw: set[fx.Node] = set()
        weighted: set[fx.Node] = set()
        for node in self.client:
            inputs, changed = set(node.all_input_nodes), self.trace.changes.get(node)
            if node in self.trace.trained or weighted & inputs:
                weighted |= {node, changed or node}
                raw.discard(changed or node)
            elif node.op == "placeholder" or raw & inputs - self.trace.numbers:
                raw.add(node)
        return raw - self.trace.numbers

    def client_state(self) -> dict[int, str]:
        """Returns what the client must hold alone: identity and path."""
        return self._state(self.client)

    def server_state(self) -> dict[int, str]:
        """Returns what the server must hold alone: identity and path."""
        return self._state([*self.server, *self.both])

    def client_graph(self) -> fx.Graph:
        """Returns the client's operations as a graph that returns what crosses."""
        graph = fx.Graph()
        copies = _copy(graph, self.client, {})
        crossing = [copies[node] for node in self.crossing]
        graph.output(crossing[0] if len(crossing) == 1 else tuple(crossing))
        return graph

    def server_graph(self) -> fx.Graph:
        """Returns the server's operations as a graph that takes what crosses."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in self.crossing}
        for node in self.crossing:
            # A layer that works in place must neither write into the client's memory
            # nor meet a leaf of autograd.
            copies[node] = graph.call_function(_own, (copies[node],))
        _copy(graph, [*self.both, *self.server, self.trace.output], copies)
        return graph

    def _state(self, nodes: list[fx.Node]) -> dict[int, str]:
        state: dict[int, str] = {}
        for node in nodes:
            state.update(self.trace.state[node])
        return state


def _own(value: Any) -> Any:
    """Returns a copy of a tensor, in the same layout, and a number as it is.

    For another layout some layers compute in another order, and round in another way.
    """
    if not isinstance(value, Tensor):
        return value
    copy = value.clone()
    if copy.stride() == value.stride():
        return copy
    layout = zip(value.shape, value.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in layout):
        return value  # expanded: torch refuses to change it in place
    return torch.empty_strided(  # a slice of something larger
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    ).copy_(value)


def _copy(
    graph: fx.Graph, nodes: list[fx.Node], copies: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Appends copies of operations to a graph, given the copies of earlier ones."""
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return copies


def _only_picked(pick: fx.Node, client: set[fx.Node]) -> bool:
    """Returns whether a pick is from a tuple of the client that is only picked from."""
    (source, *_) = pick.all_input_nodes
    return source in client and all(is_pick(user) for user in source.users)
