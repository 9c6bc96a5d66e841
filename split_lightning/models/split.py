"""Cutting a network into the parties' segments, and joining them."""

from __future__ import annotations

import copy
import difflib
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, nn

from split_lightning.models.branches import branches_of
from split_lightning.models.cut import Cut
from split_lightning.models.segment import Segment, Stretch, adopt
from split_lightning.models.trace import Trace
from split_lightning.models.tracing import Traced, traced

# A layer after which to cut, or several: paths, or indices of children.
CutLayer: TypeAlias = str | int | Sequence[str | int]


def split(
    network: nn.Module, cut_layer: CutLayer, num_holders: int = 1
) -> tuple[Segment, ...]:
    """Cuts a network after one of its layers, or after several.

    With one cut the client segment runs every operation up to the last one of the cut
    layer, in the order in which the network runs them; the server segment runs the
    rest. Each further cut cuts the rest in the same way. Where several values cross (a
    cut inside a residual block), the segment before the cut returns a tuple and the one
    after it takes its elements as positional arguments. Sizes that it needs
    (`x.shape[0]` of an earlier tensor) cross as ints.

    The segments hold copies: the network is left as it is. Layers that the network
    has but never runs go to the second segment.

    Args:
        network: Any network that `torch.fx` can trace.
        cut_layer: The layer after which to cut: a module path (`"layer2.0.conv1"`), or
            the index of a child (3). A layer that runs several times: after its last.
            Several layers in the order in which the network runs them: after each.
        num_holders: Number of branches, which share nothing, that the network has up
            to the first cut: each becomes a segment of its own (see `branches_of`).

    Returns:
        The segments in order: with one cut the client's and the server's. Their state
        dicts have the network's own keys, each key in one of them (but for a buffer
        that both sides read).

    Raises:
        ValueError: If there is no such layer, if cutting after it would leave a side
            without parameters, send raw inputs or put a parameter on both sides (names
            the nearest valid cut layers), or if the network cannot be traced.

    >>> import torch
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> client, server = split(network, 1)
    >>> x = torch.rand(5, 4)
    >>> torch.equal(server(client(x)), network(x))
    True
    >>> list(client.state_dict()), list(server.state_dict())
    (['0.weight', '0.bias'], ['2.weight', '2.bias'])
    """
    done = traced(network)
    network, stretches = done.network, _cut(done, listed(cut_layer))
    if num_holders > 1:
        stretches[:1] = branches_of(network, stretches[0], num_holders)
    first, *others = (Segment(network, stretch) for stretch in stretches)
    _hold_the_rest(network, first, others[num_holders - 1 :], others)
    # Copied, so that a layer without parameters that several run is not shared.
    return (first, *map(copy.deepcopy, others))


def listed(cut_layer: CutLayer) -> list[str | int]:
    """Returns the layers after which to cut, of one or several.

    Raises:
        ValueError: If there is none.
    """
    layers = [cut_layer] if isinstance(cut_layer, str | int) else list(cut_layer)
    if not layers:
        raise ValueError(
            "Expected argument `cut_layer` to be a layer, or several, but got none."
        )
    return layers


def _cut(done: Traced, cut_layers: Sequence[str | int]) -> list[Stretch]:
    """Returns the operations from each cut to the next."""
    network, stretches, before = done.network, list[Stretch](), ""
    traces = _traces(done)
    for cut_layer in cut_layers:
        path = _path_of(network, cut_layer, traces)
        if before and path not in traces[True].ends:
            raise ValueError(
                "Expected argument `cut_layer` to name layers in the order in which "
                f"the network runs them, but `{path}` does not run after `{before}`. "
                f"{_nearest(network, traces, path)}"
            )
        if problem := _problem(traces, path):
            raise ValueError(
                "Expected argument `cut_layer` to be a layer with parts of the network "
                f"before and after it, but cutting after `{path}` {problem}. "
                f"{_nearest(network, traces, path)}"
            )
        cuts = {mode: Cut(trace, path) for mode, trace in traces.items()}
        graphs = {mode: cut.client_graph() for mode, cut in cuts.items()}
        stretches.append(Stretch(graphs, sends=True))
        traces = {
            mode: Trace(network, mode, cut.server_graph(), done.whole, takes_raw=False)
            for mode, cut in cuts.items()
        }
        before = path
    graphs = {mode: trace.graph for mode, trace in traces.items()}
    return [*stretches, Stretch(graphs, sends=False)]


def in_order(network: nn.Module, layers: Sequence[str | int]) -> list[str | int]:
    """Returns layers, each once, in the order in which the network runs them.

    Raises:
        ValueError: If one of them is no layer that runs in training.

    >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> in_order(network, [1, "0", 1])
    ['0', '1']
    """
    done = traced(network)
    network, traces = done.network, _traces(done)
    ends = traces[True].ends
    paths = {_path_of(network, layer, traces) for layer in layers}
    for path in paths - ends.keys():
        raise ValueError(
            "Expected argument `cut_layer` to be a layer with parts of the network "
            f"before and after it, but `{path}` does not run. "
            f"{_nearest(network, traces, path)}"
        )
    return [*sorted(paths, key=lambda path: ends[path])]


def path_of(network: nn.Module, layer: str | int) -> str:
    """Returns the path of a layer that is named by a path or a child's index.

    >>> path_of(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), 1)
    '1'
    """
    done = traced(network)
    return _path_of(done.network, layer, _traces(done))


def merge(*segments: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of the unsplit network from its segments.

    The tensors are the segments' own, not copies.

    >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> network.load_state_dict(merge(*split(network, 0)))
    <All keys matched successfully>
    """
    states = [segment.state_dict() for segment in segments]
    merged = OrderedDict(entry for state in states for entry in state.items())
    # The layers' versions, which `load_state_dict` reads: an attribute, as in torch.
    metadata = [getattr(state, "_metadata", {}) for state in states]
    versions = {path: version for own in metadata for path, version in own.items()}
    merged._metadata = versions  # type: ignore[attr-defined]
    return merged


def cut_layers(network: nn.Module) -> list[str]:
    """Returns the paths of all layers after which the network can be cut, in order.

    >>> cut_layers(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    ['0', '1']
    """
    return _valid(_traces(traced(network)))


def _traces(done: Traced) -> dict[bool, Trace]:
    return {
        training: Trace(done.network, training, graph, done.whole)
        for training, graph in done.graphs.items()
    }


def _path_of(
    network: nn.Module, cut_layer: str | int, traces: dict[bool, Trace]
) -> str:
    """Returns the first path of a layer that is named by a path or a child's index."""
    children = [name for name, child in network._modules.items() if child is not None]
    modules = dict(network.named_modules(remove_duplicate=False))
    if isinstance(cut_layer, int):
        expected = f"the index of a child (0 to {len(children) - 1})"
        path = dict(enumerate(children)).get(cut_layer, "")
    else:
        expected = "the path of a layer"
        path = str(cut_layer)
    if not path or path not in modules or isinstance(cut_layer, bool):
        raise ValueError(
            f"Expected argument `cut_layer` to be {expected} of "
            f"{type(network).__name__}, but got {cut_layer!r}. "
            f"{_nearest(network, traces, str(cut_layer))}"
        )
    named = network.named_modules()  # the first path of each module
    first: str = next(name for name, module in named if module is modules[path])
    return first


def _problem(traces: dict[bool, Trace], path: str) -> str | None:
    """Returns why the network cannot be cut after a layer, or `None`."""
    for training, trace in traces.items():
        if path not in trace.ends:
            if around := trace.operation_around(path):
                return around
            mode = "train" if training else "eval"
            return f"cuts nothing: that layer does not run in {mode} mode"
    cuts = [Cut(trace, path) for trace in traces.values()]
    if problem := next(filter(None, (cut.problem() for cut in cuts)), None):
        return problem
    held = {k: path for cut in cuts for k, path in cut.client_state().items()}
    needed = {k for cut in cuts for k in cut.server_state()}
    if shared := {held[tensor] for tensor in held.keys() & needed}:
        return f"would put `{'`, `'.join(sorted(shared))}` on both sides"
    return None


def _valid(traces: dict[bool, Trace]) -> list[str]:
    """Returns the valid cut layers, in the order in which they end."""
    ends = traces[True].ends
    ordered = sorted(filter(None, ends), key=lambda path: ends[path])
    return [path for path in ordered if _problem(traces, path) is None]


def _nearest(network: nn.Module, traces: dict[bool, Trace], path: str) -> str:
    """Names up to five valid cut layers: the nearest by position, else by name."""
    valid, ends = _valid(traces), traces[True].ends
    if not valid:
        return f"{type(network).__name__} has no valid cut layer."
    if path in ends:
        near = sorted(valid, key=lambda other: abs(ends[other] - ends[path]))[:5]
    else:
        near = difflib.get_close_matches(path, valid, n=5, cutoff=0.5)
        near = near or sorted(valid, key=lambda other: other.count("."))[:5]
    return f"Nearest valid cut layers: `{'`, `'.join(near)}`."


def _hold_the_rest(
    network: nn.Module, first: Segment, upper: list[Segment], others: list[Segment]
) -> None:
    """Gives segments what the network has under a second path, or never runs.

    Args:
        network: The network.
        first: The first segment.
        upper: The segments behind the first cut; the first gets what never runs.
        others: All segments but the first.
    """
    segments = (first, *others)
    holders = {
        id(tensor): segment
        for segment in reversed(segments)
        for tensor in segment.state_dict(keep_vars=True).values()
    }
    state = network.state_dict(keep_vars=True)
    kept = {key for segment in segments for key in segment.state_dict()}
    for path in [key for key in state if key not in kept]:
        adopt(holders.get(id(state[path]), upper[0]), network, path)
