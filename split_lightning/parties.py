"""`Parties`: the clients and the servers, and the ways in which weights go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from torch import nn
from torch.optim import Optimizer

from split_lightning.channel import Traffic
from split_lightning.data.loader import StepBatch
from split_lightning.replicas import SHARED, Replicas, State
from split_lightning.route import Party
from split_lightning.server_map import ServerMap
from split_lightning.spill import SpillFolder

Optimizers: TypeAlias = Mapping[str, Optimizer]


class PartyListener(Protocol):
    """Is told of what parties do with each other, when they do it."""

    def stepped(self, samples: Mapping[int, int], server: int) -> None:
        """Clients made a step on some samples each, with a server."""

    def handed_over(self, sender: int, receiver: int, num_bytes: int) -> None:
        """A client took weights over from another."""

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
        clients: The clients' segments.
        servers: The replicas of the server segment; `None`: there is no server.
        server_map: Which server serves which client.
        spill: Where what waits is kept; `None`: in memory.

    Attributes:
        num_clients: Number of all clients.
        is_counting: Whether this process counts what is handed over.
        traffic: The bytes that would have travelled so far.
        listeners: Are told of what the parties do with each other.
    """

    def __init__(
        self,
        clients: Replicas,
        servers: Replicas | None = None,
        server_map: ServerMap | None = None,
        spill: SpillFolder | None = None,
    ) -> None:
        self.clients = clients
        self.servers = servers
        self.server_map = server_map or ServerMap()
        self.spill = spill
        self.num_clients = 1
        self.is_counting = True
        self.traffic = Traffic()
        self.listeners: list[PartyListener] = []

    def forget(self) -> None:
        """Goes back to before the first turn; the live weights stay."""
        self.traffic.load_state_dict(Traffic().state_dict())
        for replicas in self._replicas().values():
            replicas.forget()

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
        """Gives the turn to a client, which goes on from the last one's weights."""
        line = self._shared_line(client_id)
        sender = self.clients.last_on(line)
        sent = self.clients.enter({client_id: line}, optimizers["client"])
        if sent and sender is not None:
            for listener in self.listeners:
                listener.handed_over(sender, client_id, sum(sent))
        if self.is_counting:
            self.traffic.handoff_bytes += sum(sent)
            self.traffic.handoffs += len(sent)
        self._serve([client_id], optimizers)

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
        self.clients.enter({k: k for k in client_ids}, optimizers["client"])
        self._serve(client_ids, optimizers)

    def share(self, client_ids: list[int], optimizers: Optimizers) -> None:
        """Gives the turn to clients that act together on the same weights."""
        lines = {k: self._shared_line(k) for k in client_ids}
        self.clients.enter(lines, optimizers["client"], together=True)
        self._serve(client_ids, optimizers)

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

    def _serve(self, client_ids: list[int], optimizers: Optimizers) -> None:
        """Lets the clients' server act."""
        if self.servers is None or self.server_map.is_single:
            return
        servers = {self.server_of(client_id) for client_id in client_ids}
        if len(servers) > 1:
            raise ValueError(
                "Expected the clients of a step to share a server, but those of "
                f"{client_ids} are {sorted(servers)}. Give the data module the same "
                "`servers` as the module."
            )
        (server,) = servers
        self.servers.enter({server: server}, optimizers["server"])

    def trained(self, batch: StepBatch) -> None:
        """Notes on how many samples the parties that act were trained."""
        counts = {part.client_id: part.num_samples_of_all for part in batch.parts}
        for listener in self.listeners:
            listener.stepped(counts, self.server_of(batch.parts[0].client_id))
        self.clients.trained(counts)
        if self.servers is not None and not self.server_map.is_single:
            server = self.server_of(batch.parts[0].client_id)
            self.servers.trained({server: sum(counts.values())})

    def collect(
        self, party: Party, client_ids: list[int], optimizers: Optimizers
    ) -> None:
        """Adds what clients that are done for the round hold alone to the mean."""
        if party == "client":
            self.clients.collect(client_ids, optimizers[party])
        elif self.servers is not None and self.server_map.is_one_each:
            self.servers.collect(client_ids, optimizers[party])

    def average(
        self, party: Party, optimizers: Optimizers, is_remote: bool = True
    ) -> int:
        """Lets all of a party go on from the mean; returns the bytes to it and back."""
        replicas = self._replicas().get(party)
        sent = {} if replicas is None else replicas.spread(optimizers[party])
        self.averaged(party, sent if is_remote else dict.fromkeys(sent, 0))
        return 2 * sum(sent.values())

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
        if not any(replicas.are_apart for replicas in self._replicas().values()):
            return []
        found: dict[Any, int] = {}
        for client_id in self.clients.known():
            lines = [self.clients.line_of(client_id)]
            if self.servers is not None:
                lines.append(self.servers.line_of(self.server_of(client_id)))
            found.setdefault(tuple(lines), client_id)
        return sorted(found.values())

    def differ_in(self, segment: nn.Module) -> bool:
        """Tells whether clients' networks may differ in a live segment's weights."""
        return any(
            replicas.are_apart
            for replicas in self._replicas().values()
            if replicas.seats[0] is segment
        )

    def hold(
        self, clients: Sequence[int], own: Mapping[nn.Module, Mapping[int, State]]
    ) -> None:
        """Lets clients stand at weights from elsewhere, to be evaluated.

        Args:
            clients: One client for each network.
            own: For each live segment in which they differ the weights of each.
        """
        for party, replicas in self._replicas().items():
            states = own.get(replicas.seats[0], {})
            holders = {
                k: k if party == "client" else self.server_of(k) for k in clients
            }
            replicas.hold({holders[k]: states.get(k) for k in clients})

    def show(self, client_id: int) -> None:
        """Puts a client's weights, and its server's, in place to be evaluated."""
        self.clients.show(client_id)
        if self.servers is not None:
            self.servers.show(self.server_of(client_id))

    def show_live(self) -> None:
        """Puts the weights of those who act back in place."""
        for replicas in self._replicas().values():
            replicas.show_live()

    def _replicas(self) -> dict[str, Replicas]:
        held = {"client": self.clients, "server": self.servers}
        return {party: replicas for party, replicas in held.items() if replicas}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is remembered, in plain containers and tensors."""
        return {party: r.state_dict() for party, r in self._replicas().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        for party, replicas in self._replicas().items():
            replicas.load_state_dict(state[party])
