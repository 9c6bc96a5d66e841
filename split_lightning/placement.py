"""`Placement`: which party has which segment, for each client."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias


class PartyType(NamedTuple):
    """The type of party that has a segment.

    Attributes:
        role: `client` or `server`.
        member: The number of the holder, where a client is a group of holders, or of
            the server, where several compute one after the other.
    """

    role: str
    member: int = 0


# For each segment of the network the party that has it; `None`: none for these clients.
Layout: TypeAlias = tuple[PartyType | None, ...]

CLIENT, SERVER = PartyType("client"), PartyType("server")


class Placement:
    """Maps each client to the party of each segment of the network.

    Clients may differ in their layouts: client `k` of `n` has layout
    `layouts[entries[k * len(entries) // n]]`. A server serves one group of neighbouring
    clients, or all.

    Args:
        layouts: The party of each segment, for each layout.
        entries: The layout of each entry.
        num_clients: Number of clients.
        num_groups: Number of groups of clients, each with servers of its own; `None`:
            each client is a group.
        label_member: Which of a client's holders has the labels.
        argument: What messages call the list of entries.

    Raises:
        ValueError: If there are more entries or groups than clients.

    >>> placement = Placement([(CLIENT, SERVER)], num_clients=4, num_groups=2)
    >>> placement.of(3)
    ('client/3', 'server/1')
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        entries: Sequence[int] = (0,),
        num_clients: int = 1,
        num_groups: int | None = 1,
        label_member: int = 0,
        argument: str = "cut_layer",
    ) -> None:
        if len(entries) > num_clients:
            raise ValueError(
                f"Expected at most one entry of `{argument}` for each client "
                f"(`num_clients`: {num_clients}), but got {len(entries)}. Fewer are "
                "for groups of neighbours."
            )
        if num_groups is not None and not 1 <= num_groups <= num_clients:
            raise ValueError(
                "Expected argument `num_servers` to be an integer from 1 to "
                f"`num_clients` ({num_clients}), but got {num_groups}."
            )
        self.layouts = [tuple(layout) for layout in layouts]
        self.entries = tuple(entries)
        self.num_clients = num_clients
        self.num_groups = num_groups
        self.label_member = label_member
        self.argument = argument
        types = {own for layout in self.layouts for own in layout if own is not None}
        self._members = {
            role: 1 + max(party.member for party in types if party.role == role)
            for role in {party.role for party in types}
        }
        self.of = lru_cache(maxsize=4096)(self._of)

    def with_clients(self, num_clients: int, num_groups: int | None) -> Placement:
        """Returns the same layouts for another number of clients and groups."""
        return Placement(
            self.layouts,
            self.entries,
            num_clients,
            num_groups,
            self.label_member,
            self.argument,
        )

    def layout_number(self, client_id: int) -> int:
        """Returns the number of a client's layout."""
        if len(self.entries) == 1:
            return self.entries[0]
        return self.entries[client_id * len(self.entries) // self.num_clients]

    def layout_of(self, client_id: int) -> Layout:
        """Returns the type of party that has each segment, for a client."""
        return self.layouts[self.layout_number(client_id)]

    def group_of(self, client_id: int) -> int:
        """Returns the group of a client."""
        return group_of(client_id, self.num_clients, self.num_groups)

    def _of(self, client_id: int) -> tuple[str | None, ...]:
        """Returns the party of each segment for a client."""
        return tuple(
            None if party is None else self.name(party, client_id)
            for party in self.layout_of(client_id)
        )

    def name(self, party: PartyType, client_id: int) -> str:
        """Returns the name of a client's party."""
        number = self.group_of(client_id) if party.role == "server" else client_id
        members = self._members[party.role]
        if party.role == "server":
            return f"server/{number * members + party.member}"
        member = f".{party.member}" if members > 1 else ""
        return f"{party.role}/{number}{member}"

    def label_party(self, client_id: int) -> str:
        """Returns the party that has a client's labels."""
        role = "client" if "client" in self._members else "server"
        return self.name(PartyType(role, self.label_member), client_id)

    def roles_of(self, segment: int) -> tuple[str, ...]:
        """Returns the roles of the parties that may have a segment."""
        types = (layout[segment] for layout in self.layouts)
        return tuple(sorted({party.role for party in types if party is not None}))

    @property
    def differ(self) -> bool:
        """Whether clients differ in their layouts."""
        return len(self.layouts) > 1


def client_of(party: str) -> int:
    """Returns the number in a client's name.

    >>> client_of("client/3.1")
    3
    """
    return int(party.partition("/")[2].partition(".")[0])


def group_of(client_id: int, num_clients: int, num_groups: int | None) -> int:
    """Returns the group of a client: groups of neighbours, as equal as can be.

    Args:
        client_id: The client.
        num_clients: Number of clients.
        num_groups: Number of groups; `None`: each client is one.

    >>> [group_of(k, num_clients=5, num_groups=2) for k in range(5)]
    [0, 0, 0, 1, 1]
    """
    return client_id if num_groups is None else client_id * num_groups // num_clients
