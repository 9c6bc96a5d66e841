"""`grpc_engine`: the engine of a server whose clients are at other sites."""

from __future__ import annotations

from pathlib import Path

from split_lightning.engine_options import check_options
from split_lightning.engines.engine import Engine
from split_lightning.engines.grpc_sites import GrpcSites
from split_lightning.system.absences import Absences


def grpc_engine(
    listen: str | None = None,
    certificates: str | Path | None = None,
    deadline: float | None = None,
    absences: str | Path | None = None,
    server: str | None = None,
    folder: str | Path | None = None,
    patience: float = 600.0,
    own_data: bool = False,
) -> Engine:
    """Returns the engine of a server that clients reach over gRPC.

    Args:
        listen: The address and the port to listen on, such as `0.0.0.0:8443`; `None`:
            the command line starts all clients on this machine.
        certificates: The folder with the certificate and the key of this party, and the
            certificate of the authority.
        deadline: For how many seconds a client may be silent while it is waited for;
            then it is absent from the round. `None`: it is waited for.
        absences: The file in which absences are recorded.
        server: Of a client: the server's address.
        folder: Of a client: where it saves its state.
        patience: Of a client: for how many seconds to wait for the server.
        own_data: Of a client: whether all samples of its source are its own.

    Raises:
        ValueError: If an option is wrong, or a server has no certificates.
    """
    check_options(
        {
            "listen": listen,
            "certificates": certificates,
            "deadline": deadline,
            "absences": absences,
            "server": server,
            "folder": folder,
            "patience": patience,
            "own_data": own_data,
        }
    )
    if listen is not None and certificates is None:
        raise ValueError(
            "Expected argument `certificates` to be a folder where `listen` is set, "
            "but got None. `split-lightning certificates` writes them."
        )
    address, folder = listen or "127.0.0.1:0", certificates or "."
    record = None if deadline is None else Absences(absences)
    return Engine(sites=GrpcSites(address, folder, deadline, record))
