"""`grpc_engine`: the engine of a server whose clients are at other sites."""

from __future__ import annotations

from pathlib import Path

from split_lightning.engine_options import check_options
from split_lightning.engines.engine import Engine
from split_lightning.engines.grpc_sites import GrpcSites


def grpc_engine(
    listen: str | None = None,
    certificates: str | Path | None = None,
    server: str | None = None,
    folder: str | Path | None = None,
    patience: float = 600.0,
) -> Engine:
    """Returns the engine of a server that clients reach over gRPC.

    Args:
        listen: The address and the port to listen on, such as `0.0.0.0:8443`; `None`:
            the command line starts all clients on this machine.
        certificates: The folder with the certificate and the key of this party, and the
            certificate of the authority.
        server: Of a client: the server's address.
        folder: Of a client: where it saves its state.
        patience: Of a client: for how many seconds to wait for the server.

    Raises:
        ValueError: If an option is wrong, or a server has no certificates.
    """
    check_options(
        {
            "listen": listen,
            "certificates": certificates,
            "server": server,
            "folder": folder,
            "patience": patience,
        }
    )
    if listen is not None and certificates is None:
        raise ValueError(
            "Expected argument `certificates` to be a folder where `listen` is set, "
            "but got None. `split-lightning certificates` writes them."
        )
    return Engine(sites=GrpcSites(listen or "127.0.0.1:0", certificates or "."))
