"""`Parties`: the clients and the servers, and the ways in which weights go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from split_lightning.channel import Traffic
from split_lightning.data.loader import StepBatch
from split_lightning.kinds import CLIENT, SERVER, ClientKinds, Route, Stop
from split_lightning.piece import Entering, Optimizers, Piece
from split_lightning.replicas import SHARED, Replicas, State
from split_lightning.resumed_options import StateFitter
from split_lightning.route import Party
from split_lightning.server_map import ServerMap
from split_lightning.spill import SpillFolder


class PartyListener(Protocol):
    """Is told of what parties do with each other, when they do it."""

    def stepped(self, samples: Mapping[int, int], server: int) -> None:
        """Clients made a step on some samples each, with a server."""

    def handed_over(
        self, sender: int | None, receiver: int | None, num_bytes: int, server: int
    ) -> None:
        """A client took weights over from another; `None` is its server."""

    def began_turn(self, client_id: int, num_bytes: int) -> None:
        """A client began a turn from the newest weights, of so many bytes."""

    def handed_in(self, client_id: int, num_bytes: int) -> None:
        """A client that is done with its turn handed in so many bytes of weights."""

    def averaged(self, party: Party, sent: Mapping[int, int]) -> None:
        """Parties sent so many bytes of weights each, and got the mean back."""

    def exchanged(self, sent: Mapping[int, int]) -> None:
        """Clients sent so many bytes of something else each, and got a mean back."""


class Parties:
    """Who holds which weights, and where they go.

    A client's weights go along a line of its own, or along one that it shares with
    all clients of its server. Where there are several servers each has a line.

    Args:
        pieces: The layers that stay together, wherever they are held.
        kinds: Which of them are at a client, and which at its server.
        server_map: Which server serves which client.
        spill: Where what waits is kept; `None`: in memory.

    Attributes:
        pieces: By name.
        num_clients: Number of all clients.
        is_counting: Whether this process counts what is handed over.
        servers_are_remote: Whether averaging what servers hold costs bytes.
        traffic: The bytes that would have travelled so far.
        listeners: Are told of what the parties do with each other.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        kinds: ClientKinds | None = None,
        server_map: ServerMap | None = None,
        spill: SpillFolder | None = None,
    ) -> None:
        self.pieces = {piece.name: piece for piece in pieces}
        self.kinds = kinds or ClientKinds([(Stop("client", CLIENT, 0, False),)])
        self.server_map = server_map or ServerMap()
        self.spill = spill
        self.num_clients = 1
        self.is_counting = True
        self.servers_are_remote = False
        self.traffic = Traffic()
        self.listeners: list[PartyListener] = []
        self._shown: int | None = None

    @property
    def clients(self) -> Replicas:
        """What clients alone hold: of the first kind, where that differs."""
        return self.pieces[CLIENT].of("client")

    @property
    def servers(self) -> Replicas | None:
        """What servers alone hold; `None`: there is no server."""
        return self.pieces[SERVER].of("server") if SERVER in self.pieces else None

    def acting(self) -> list[int]:
        """Returns the clients whose turn it is."""
        return self._clients_of(lambda replicas: replicas.seated)

    def route_of(self, client_id: int) -> Route:
        """Returns who computes what of a client's batches."""
        return self.kinds.route_of(client_id, self.num_clients)

    def route_shown(self) -> Route:
        """Returns who holds what of the network that is evaluated now."""
        return self.route_of(next(iter(self._in_place()), 0))

    def _in_place(self) -> list[int]:
        return self.acting() if self._shown is None else [self._shown]

    def holder_of(self, piece: Piece, client_id: int) -> Party | None:
        """Returns who holds a piece when a client's batches are computed."""
        stops = (s for s in self.route_of(client_id) if s.piece == piece.name)
        return next((stop.party for stop in stops), None)

    def shown(self, piece: Piece) -> nn.Module:
        """Returns of a piece what is live, or shown, to be evaluated."""
        holders = (s.party for s in self.route_shown() if s.piece == piece.name)
        return piece.of(next(holders, next(iter(piece.live)))).live

    def set_pools(self, is_one: bool) -> None:
        """Says whether layers that clients and servers hold go from these to those."""
        for piece in self.pieces.values():
            piece.pool(is_one)

    def forget(self) -> None:
        """Goes back to before the first turn; the live weights stay."""
        self.traffic.load_state_dict(Traffic().state_dict())
        holders = {stop.piece: stop.party for stop in self.route_shown()}
        for name, piece in self.pieces.items():
            piece.forget(holders.get(name, next(iter(piece.live))))

    def open(self) -> None:
        """Makes room for what is to wait.

        Raises:
            ValueError: If the folder for it cannot be written.
        """
        if self.spill is not None:
            self.spill.open()

    def close(self) -> None:
        """Forgets all, and leaves nothing behind in a folder."""
        self.forget()
        if self.spill is not None:
            self.spill.close()

    def hand_over(self, client_id: int, optimizers: Optimizers) -> None:
        """Gives the turn to a client, which goes on from the last one's weights.

        What the last one held and this one does not goes to the server, and what the
        server held and this one holds comes from it.
        """
        moved: Counter[tuple[int | None, int | None]] = Counter()
        for piece in self.pieces.values():
            entering = self._entering(piece, [client_id], is_shared=True)
            before = {
                party: piece.of(party).last_on(line)
                for party, lines in entering.items()
                for line in lines.values()
            }
            sent = piece.enter(entering, optimizers)
            for party, sender in before.items() if sent else ():
                receiver = client_id if party == "client" else None
                moved[self._as_client(piece, sender), receiver] += sent
        for (giver, receiver), count in moved.items():
            for listener in self.listeners:
                listener.handed_over(giver, receiver, count, self.server_of(client_id))
        if self.is_counting:
            between_clients = [n for pair, n in moved.items() if None not in pair]
            self.traffic.handoff_bytes += sum(between_clients)
            self.traffic.handoffs += len(between_clients)
            self.traffic.layer_bytes += moved.total() - sum(between_clients)

    def begin_turn(
        self, client_id: int, optimizers: Optimizers, is_sent: bool = True
    ) -> None:
        """Lets a client begin from the newest weights that were handed in.

        Args:
            client_id: Which client.
            optimizers: Those of the parties.
            is_sent: Whether it has a use for them.
        """
        sent = self.clients.begin(client_id, optimizers["client"])
        for listener in self.listeners:
            listener.began_turn(client_id, is_sent * self.clients.weight_bytes)
        if self.is_counting and is_sent and sent:
            self.traffic.handoff_bytes += sent
            self.traffic.handoffs += 1

    def hand_in(self, client_id: int, share: float, optimizers: Optimizers) -> None:
        """Mixes so much of a client's weights into the newest; 0 leaves those be."""
        sent = self.clients.mix(client_id, share, optimizers["client"])
        for listener in self.listeners:
            listener.handed_in(client_id, sent)

    def switch_to(self, client_ids: list[int], optimizers: Optimizers) -> None:
        """Gives the turn to clients, each of which goes on from its own weights."""
        for piece in self.pieces.values():
            piece.enter(self._entering(piece, client_ids, is_shared=False), optimizers)

    def share(self, client_ids: list[int], optimizers: Optimizers) -> None:
        """Gives the turn to clients that act together on the same weights."""
        for piece in self.pieces.values():
            entering = self._entering(piece, client_ids, is_shared=True)
            piece.enter(entering, optimizers, together=True)

    def server_of(self, client_id: int) -> int:
        """Returns the server of a client."""
        if self.server_map.is_single:
            return 0
        return self.server_map.server_of(client_id, self.num_clients)

    def _shared_line(self, client_id: int) -> int:
        """Returns the line that the clients of a server share."""
        if self.server_map.is_single:
            return SHARED
        return SHARED - 1 - self.server_of(client_id)

    def number_of(self, piece: Piece, party: Party, client_id: int) -> int:
        """Returns the number of a client, or of its server, among a piece's holders.

        Where both may be, the servers' numbers follow the clients'.
        """
        if party == "client":
            return client_id
        return self.server_of(client_id) + self.num_clients * piece.is_between

    def _as_client(self, piece: Piece, number: int | None) -> int | None:
        """Returns the client that has a number among a piece's holders, or `None`."""
        if number is not None and piece.is_between and number >= self.num_clients:
            return None
        return number

    def _entering(
        self, piece: Piece, client_ids: list[int], is_shared: bool
    ) -> Entering:
        """Returns the lines of those who hold a piece in the next step.

        Of one server alone there is no other that it could differ from.
        """
        entering: dict[Party, dict[int, int]] = {}
        for client_id in client_ids:
            party = self.holder_of(piece, client_id)
            if party is None:
                continue
            number = line = self.number_of(piece, party, client_id)
            if is_shared and (party == "client" or piece.is_one_pool):
                line = self._shared_line(client_id)
            if party == "client" or piece.is_between or not self.server_map.is_single:
                entering.setdefault(party, {})[number] = line
        if len(entering.get("server", {})) > 1:
            raise ValueError(
                "Expected the clients of a step to share a server, but those of "
                f"{client_ids} are {sorted(map(self.server_of, client_ids))}. Give the "
                "data module the same `servers` as the module."
            )
        return entering

    def stepped(self, batch: StepBatch) -> None:
        """Tells listeners that a step took place, whatever became of its numbers."""
        counts = _samples_of(batch)
        for listener in self.listeners:
            listener.stepped(counts, self.server_of(batch.parts[0].client_id))

    def trained(self, batch: StepBatch) -> None:
        """Notes on how many samples the parties that act were trained."""
        counts = _samples_of(batch)
        for piece in self.pieces.values():
            for party, lines in self._entering(piece, list(counts), False).items():
                samples: Counter[int] = Counter()
                for client_id, count in counts.items():
                    if self.holder_of(piece, client_id) == party:
                        samples[self.number_of(piece, party, client_id)] += count
                piece.of(party).trained({n: samples[n] for n in lines})

    def collect(
        self, party: Party, client_ids: list[int], optimizers: Optimizers
    ) -> None:
        """Adds what clients that are done for the round hold alone to the mean.

        What clients and servers hold in one pool is averaged with the clients' layers.
        """
        for piece in self._averaged_with(party):
            numbers = [
                self.number_of(piece, holder, client_id)
                for client_id in client_ids
                for holder in [self.holder_of(piece, client_id)]
                if holder is not None
                and (holder == "client" or self.server_map.is_one_each)
            ]
            piece.collect(party, numbers, optimizers)

    def average(
        self, party: Party, optimizers: Optimizers, is_remote: bool = True
    ) -> int:
        """Lets all of a party go on from the mean; returns the bytes to it and back."""
        sent: dict[Party, Counter[int]] = {"client": Counter(), "server": Counter()}
        for piece in self._averaged_with(party):
            for number, count in piece.spread(party, optimizers).items():
                if self._as_client(piece, number) is None:
                    sent["server"][number - self.num_clients] += count
                else:
                    sent[party][number] += count
        others = sent["server"] if party == "client" else Counter[int]()
        self.averaged(party, _if(is_remote, sent[party]))
        self.averaged("server", _if(self.servers_are_remote, others))
        if self.is_counting and self.servers_are_remote:
            self.traffic.server_averaging_bytes += 2 * others.total()
        return 2 * sent[party].total()

    def _averaged_with(self, party: Party) -> list[Piece]:
        """Returns the pieces of which the mean is made with a party's."""
        return [
            piece
            for piece in self.pieces.values()
            if party in piece.live and not (party == "server" and piece.is_one_pool)
        ]

    def averaged(self, party: Party, sent: Mapping[int, int]) -> None:
        """Tells listeners who was averaged, and the bytes that each sent and got."""
        for listener in self.listeners if sent else ():
            listener.averaged(party, sent)

    def exchanged(self, sent: Mapping[int, int]) -> None:
        """Tells listeners that clients averaged something else than weights."""
        for listener in self.listeners:
            listener.exchanged(sent)

    def representatives(self) -> list[int]:
        """Returns one client for each network that differs; none if there is one."""
        apart = any(piece.are_apart for piece in self.pieces.values())
        if not apart and not self.kinds.have_networks:
            return []
        found: dict[Any, int] = {}
        for client_id in self.known() or range(self.num_clients):
            lines = [
                (name, replicas.line_of(number))
                for name, replicas, number in self._held_by(client_id)
            ]
            found.setdefault(tuple(lines), client_id)
        return sorted(found.values())

    def known(self) -> list[int]:
        """Returns the clients that ever acted."""
        return self._clients_of(lambda replicas: replicas.known())

    def _clients_of(self, numbers: Callable[[Replicas], Iterable[int]]) -> list[int]:
        """Returns the clients among those that are told by the pieces' replicas."""
        found = {
            self._as_client(piece, number)
            for piece in self.pieces.values()
            if "client" in piece.live
            for number in numbers(piece.of("client"))
        }
        return sorted(client_id for client_id in found if client_id is not None)

    def _held_by(self, client_id: int) -> list[tuple[str, Replicas, int]]:
        """Returns where each piece of a client's network is: its name, whose, which."""
        return [
            (name, piece.of(party), self.number_of(piece, party, client_id))
            for name, piece in self.pieces.items()
            for party in [self.holder_of(piece, client_id)]
            if party is not None
        ]

    def holds(self, client_id: int, segment: nn.Module) -> bool:
        """Tells whether a live segment is part of a client's network."""
        pieces = (self.pieces[stop.piece] for stop in self.route_of(client_id))
        live = (s for piece in pieces for own in piece.live.values() for s in own)
        return any(segment is own for own in live)

    def differ_in(self, segment: nn.Module) -> bool:
        """Tells whether clients' networks may differ in a live segment's weights."""
        return any(
            piece.are_apart
            for piece in self.pieces.values()
            for own in piece.live.values()
            if any(segment is live for live in own)
        )

    def hold(
        self, clients: Sequence[int], own: Mapping[nn.Module, Mapping[int, State]]
    ) -> None:
        """Lets clients stand at weights from elsewhere, to be evaluated.

        Args:
            clients: One client for each network.
            own: For each live segment in which they differ the weights of each.
        """
        for piece in self.pieces.values():
            weights: dict[Party, dict[int, State | None]] = {p: {} for p in piece.live}
            live = [segment for held in piece.live.values() for segment in held]
            states = next((own[s] for s in live if s in own), {})
            for client_id in clients:
                party = self.holder_of(piece, client_id)
                if party is not None:
                    number = self.number_of(piece, party, client_id)
                    weights[party][number] = states.get(client_id)
            piece.hold(weights)

    def show(self, client_id: int) -> None:
        """Puts a client's weights, and its server's, in place to be evaluated."""
        self._shown = client_id
        for _, replicas, number in self._held_by(client_id):
            replicas.show(number)

    def show_live(self) -> None:
        """Puts the weights of those who act back in place."""
        self._shown = None
        for piece in self.pieces.values():
            for replicas in piece.pools():
                replicas.show_live()

    def fit_optimizer_states(self, fitter: StateFitter) -> None:
        """Fits optimizer states that wait to optimizers with other options."""
        for piece in self.pieces.values():
            for replicas in piece.pools():
                replicas.fit_optimizer_states(fitter)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is remembered, in plain containers and tensors."""
        return {name: piece.state_dict() for name, piece in self.pieces.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        for name, piece in self.pieces.items():
            piece.load_state_dict(state[name])


def _samples_of(batch: StepBatch) -> dict[int, int]:
    """Returns the number of samples of each client of a step."""
    return {part.client_id: part.num_samples_of_all for part in batch.parts}


def _if(costs: bool, sent: Mapping[int, int]) -> Mapping[int, int]:
    """Returns the bytes of each, or none where nothing travels."""
    return sent if costs else dict.fromkeys(sent, 0)
