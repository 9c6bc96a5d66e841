"""`ServerMap`: which server replica serves which client."""

from __future__ import annotations


class ServerMap:
    """Deals clients out to servers, each of which holds a replica of the segment.

    Clients `k` with the same `k * num_servers // num_clients` share a server: groups
    of neighbours, as equal in number as can be.

    Args:
        num_servers: Number of servers; `None`: one for each client.

    Raises:
        ValueError: If `num_servers` is not positive.

    >>> [ServerMap(2).server_of(k, num_clients=5) for k in range(5)]
    [0, 0, 0, 1, 1]
    """

    def __init__(self, num_servers: int | None = 1) -> None:
        if num_servers is not None and num_servers < 1:
            raise ValueError(
                "Expected argument `num_servers` to be a positive integer, or null for "
                f"one server for each client, but got {num_servers}."
            )
        self.num_servers = num_servers

    @property
    def is_single(self) -> bool:
        """Whether one server serves all clients."""
        return self.num_servers == 1

    @property
    def is_one_each(self) -> bool:
        """Whether each client has a server of its own."""
        return self.num_servers is None

    def server_of(self, client_id: int, num_clients: int) -> int:
        """Returns the server of a client.

        Args:
            client_id: The client.
            num_clients: Number of all clients.

        Raises:
            ValueError: If there are more servers than clients.
        """
        if self.num_servers is None:
            return client_id
        if self.num_servers > num_clients:
            raise ValueError(
                "Expected argument `num_servers` to be at most `num_clients` "
                f"({num_clients}), but got {self.num_servers}."
            )
        return client_id * self.num_servers // num_clients
