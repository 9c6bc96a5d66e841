"""Kinds of clients: who of them computes which stretches of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import nn

from split_lightning.models.segment import Segment
from split_lightning.models.split import CutLayer, in_order, listed, path_of, split
from split_lightning.route import Party, Stage, route_of

# The layer after which to cut, or several in order; the first may be a list of its own,
# which is dealt out to the clients.
CutLayers: TypeAlias = CutLayer | Sequence[str | int | Sequence[str | int]]

CLIENT, SERVER, BETWEEN = "client", "server", "between"


class Stop(NamedTuple):
    """A stretch of the network, as a batch of one kind of clients meets it.

    Attributes:
        party: Who computes it.
        piece: The name of the layers that it is of.
        stretch: Which of their stretches.
        is_cut: Whether what it returns crosses a cut.
        num_holders: Number of holders that compute it side by side, each from its part
            of the samples: a stretch each, from that one on.
    """

    party: Party
    piece: str
    stretch: int
    is_cut: bool
    num_holders: int = 1

    @property
    def stretches(self) -> range:
        """Which of the piece's stretches are computed here."""
        return range(self.stretch, self.stretch + self.num_holders)


Route: TypeAlias = tuple[Stop, ...]


class ClientKinds:
    """Deals clients out to kinds, which differ in what of a network a client holds.

    Client `k` has entry `k * num_entries // num_clients`: as many entries as clients
    are one each, fewer are groups of neighbours.

    Args:
        routes: Of each kind the stops of a batch, in the order of the network. All
            have as many.
        entries: The kind of each entry.
        argument: What messages call the list of entries.

    >>> alone = Stop("client", "client", 0, is_cut=False)
    >>> kinds = ClientKinds([(alone,), (alone,)], entries=[0, 1])
    >>> [kinds.kind_of(k, num_clients=5) for k in range(5)]
    [0, 0, 0, 1, 1]
    """

    def __init__(
        self,
        routes: Sequence[Route],
        entries: Sequence[int] = (0,),
        argument: str = "cut_layer",
    ) -> None:
        self.routes = tuple(routes)
        self.entries = tuple(entries)
        self.argument = argument

    @property
    def are_several(self) -> bool:
        """Whether clients differ."""
        return len(self.routes) > 1

    @property
    def have_networks(self) -> bool:
        """Whether clients differ in their networks, not only in where they cut."""
        pieces = {frozenset(stop.piece for stop in route) for route in self.routes}
        return len(pieces) > 1

    def kind_of(self, client_id: int, num_clients: int) -> int:
        """Returns the kind of a client."""
        if len(self.entries) == 1:
            return self.entries[0]
        return self.entries[client_id * len(self.entries) // num_clients]

    def route_of(self, client_id: int, num_clients: int) -> Route:
        """Returns the stops of a client's batches."""
        return self.routes[self.kind_of(client_id, num_clients)]

    def holders_of(self, piece: str) -> list[Party]:
        """Returns who may hold a piece, depending on the client."""
        stops = {
            stop.party for route in self.routes for stop in route if stop.piece == piece
        }
        return sorted(stops)

    def check(self, num_clients: int) -> None:
        """Stops where there are more entries than clients.

        Raises:
            ValueError: Says how many there may be.
        """
        if len(self.entries) > num_clients:
            raise ValueError(
                f"Expected at most one entry of `{self.argument}` for each client "
                f"(`num_clients`: {num_clients}), but got {len(self.entries)}. Fewer "
                "are for groups of neighbours."
            )


def stages_of(route: Route) -> list[list[Stop]]:
    """Returns the stops of a route from cut to cut: what a party computes at once."""
    stages: list[list[Stop]] = [[]]
    for stop in route:
        stages[-1].append(stop)
        if stop.is_cut:
            stages.append([])
    return stages


def named(route: Route) -> list[Stage]:
    """Returns the stages of a route: who computes from cut to cut, and its how-manieth.

    >>> [
    ...     stage.name
    ...     for stage in named(
    ...         (
    ...             Stop("client", "client", 0, True),
    ...             Stop("server", "between", 0, False),
    ...             Stop("server", "server", 0, False),
    ...         )
    ...     )
    ... ]
    ['client', 'server']
    """
    passed: Counter[Party] = Counter()
    stages = []
    for party in (stops[0].party for stops in stages_of(route)):
        stages.append(Stage(party, passed[party]))
        passed[party] += 1
    return stages


def places_of(route: Route) -> list[Stage]:
    """Returns of each stop of a route the stage that it belongs to."""
    return [
        stage._replace(is_cut=stop.is_cut)
        for stage, stops in zip(named(route), stages_of(route), strict=True)
        for stop in stops
    ]


def kinds_of(
    network: nn.Module, cut_layer: CutLayers, labels: Party, num_holders: int = 1
) -> tuple[dict[str, Segment], ClientKinds]:
    """Cuts a network after all layers after which any client cuts it.

    What all clients hold is one piece (`client`), what no client holds another
    (`server`). Each stretch between two of the clients' cuts is a piece of its own
    (`between`): at a client that cuts behind it, else at the server.

    Args:
        network: The network, which is left as it is.
        cut_layer: The layer after which to cut it, or several in order, the first of
            which may be a list of its own, dealt out to the clients.
        labels: Who has the labels in training.
        num_holders: Number of holders of a client, each with a part of its samples.

    Returns:
        The pieces by name, and the kinds of clients.

    Raises:
        ValueError: If the network cannot be cut there.
    """
    first, *others = _listed(cut_layer)
    rest = [layer for layers in others for layer in layers]
    entries, own = [0], first
    if len(first) > 1:
        if num_holders > 1:
            raise ValueError(
                "Expected argument `cut_layer` to begin with one layer where a client "
                f"is a group of holders, whose lower layers end there, but got {first}."
            )
        own = in_order(network, first)
        entries = [own.index(path_of(network, layer)) for layer in first]
    base = route_of(1 + len(rest), labels)
    behind = [stage.party for stage in base[1:]]
    holders = [[*_held(depth, len(own)), *behind] for depth in range(len(own))]
    places, names = _places(holders, num_holders)
    parties = [names.index(name) for name, _ in places]
    segments = split(network, [*own, *rest], parties, num_holders)
    last = len(places) - 1
    routes: list[Route] = [
        tuple(
            Stop(
                party,
                *places[i],
                is_cut=i < last and (i == depth or i >= len(own)),
                num_holders=num_holders if i == 0 else 1,
            )
            for i, party in enumerate(held)
        )
        for depth, held in enumerate(holders)
    ]
    return dict(zip(names, segments, strict=True)), ClientKinds(routes, entries)


def _held(depth: int, num_stretches: int) -> list[Party]:
    """Returns who computes each stretch up to the deepest client's cut."""
    clients: list[Party] = ["client"] * (depth + 1)
    servers: list[Party] = ["server"] * (num_stretches - depth - 1)
    return [*clients, *servers]


def _listed(cut_layer: CutLayers) -> list[list[str | int]]:
    """Returns of each cut the layers after which clients cut there.

    Raises:
        ValueError: If other cuts than the first differ.
    """
    found = listed(cut_layer)  # type: ignore[arg-type]
    layers = [own if isinstance(own, list | tuple) else [own] for own in found]
    if not layers[0] or any(len(several) != 1 for several in layers[1:]):
        raise ValueError(
            "Expected argument `cut_layer` to be a layer, or several in order, of "
            "which the first may be a list of its own, one entry for each client or "
            f"group: only the first cut may differ; but got {cut_layer!r}."
        )
    return layers


def _places(
    holders: Sequence[Sequence[Party]], num_holders: int
) -> tuple[list[tuple[str, int]], list[str]]:
    """Returns of each stretch its piece, and which of the piece's it is.

    Args:
        holders: Of each kind who computes each stretch.
        num_holders: How many stretches the first comes apart into.

    Returns:
        The places, and the names of the pieces: clients', servers', and both's.
    """
    counts: Counter[str] = Counter()
    names: list[str] = []
    places = []
    for parties in zip(*holders, strict=True):
        name: str = parties[0]
        if len(set(parties)) > 1:
            number = sum(n.startswith(BETWEEN) for n in names) + 1
            name = BETWEEN if number == 1 else f"{BETWEEN}_{number}"
        if name not in names:
            names.append(name)
        places.append((name, counts[name]))
        counts[name] += 1 if len(places) > 1 else num_holders
    order = sorted(names, key=lambda n: (n != CLIENT, n != SERVER))
    return places, order
