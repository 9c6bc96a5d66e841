"""A cut through a trace: what each side runs, and what crosses."""

from __future__ import annotations

from torch import fx

from split_lightning.models.trace import Trace, is_pick


class Cut:
    """A trace, cut after the last operation of a layer.

    Args:
        trace: The network's operations.
        cut_layer: The path of a layer that runs in the trace.

    Attributes:
        client: The operations of the client segment.
        server: The operations of the server segment.
        crossing: Those of the client's whose results the server needs.
    """

    def __init__(self, trace: Trace, cut_layer: str) -> None:
        self.trace = trace
        client = set(trace.nodes[: trace.ends[cut_layer] + 1])
        # A parameter is held where it is used, not where it was first touched.
        held = [node for node in client if node.op == "get_attr"]
        client -= {node for node in held if not client & node.users.keys()}
        # Which element of a tuple goes on is chosen where the tuple is made.
        client |= {n for n in trace.nodes if is_pick(n) and _only_picked(n, client)}
        self.client = [node for node in trace.nodes if node in client]
        self.server = [node for node in trace.nodes if node not in client]
        needed = {i for n in (*self.server, trace.output) for i in n.all_input_nodes}
        self.crossing = [n for n in self.client if n in needed and n.op != "get_attr"]

    def problem(self) -> str | None:
        """Says why the network cannot be trained in this cut, or returns `None`."""
        held, needed = self._parameters(self.client), self._parameters(self.server)
        if not held:
            return "leaves the client segment empty (no parameters)"
        if not needed:
            return "leaves the server segment empty (no parameters)"
        if shared := {held[tensor] for tensor in held.keys() & needed.keys()}:
            return f"would put `{'`, `'.join(sorted(shared))}` on both sides"
        sent = set(self.crossing) - self.trace.numbers
        if not sent:
            return "leaves nothing to send: the server segment needs no result of it"
        if not sent <= self.trace.weighted:
            return "would send raw inputs, which the layers behind it need too"
        return None

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
            if node not in self.trace.numbers:
                # A layer that works in place must neither write into the client's
                # memory nor meet a leaf of autograd.
                copies[node] = graph.call_method("clone", (copies[node],))
        server = set(self.server)
        held = [node for node in self.client if node.op == "get_attr"]
        both = [node for node in held if server & node.users.keys()]
        _copy(graph, [*both, *self.server, self.trace.output], copies)
        return graph

    def _parameters(self, nodes: list[fx.Node]) -> dict[int, str]:
        parameters: dict[int, str] = {}
        for node in nodes:
            parameters.update(self.trace.parameters[node])
        return parameters


def _copy(
    graph: fx.Graph, nodes: list[fx.Node], copies: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Appends copies of operations to a graph, given the copies of earlier ones."""
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return copies


def _only_picked(pick: fx.Node, client: set[fx.Node]) -> bool:
    """Tells whether a pick is from a tuple of the client that is only picked from."""
    (source, *_) = pick.all_input_nodes
    return source in client and all(is_pick(user) for user in source.users)
