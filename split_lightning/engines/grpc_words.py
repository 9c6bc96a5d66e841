"""Asks a server what was typed for its run, before a site builds its part."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc

from split_lightning.credentials import read_credentials
from split_lightning.engines.grpc_sites import MOST_OF_WORDS, SERVICE, WORDS, options
from split_lightning.engines.patience import PAUSE, Patience
from split_lightning.engines.wire import FrameError, decoded


def words_of_run(
    name: str, server: str, certificates: str | Path, patience: float
) -> list[str]:
    """Returns what was typed for a server's run.

    Args:
        name: The site that asks, such as `client-3`.
        server: The server's address.
        certificates: The folder with the site's credentials.
        patience: For how many seconds to wait for the server.

    Raises:
        ConnectionError: If the server does not answer.
        FrameError: If what it answers is no frame.
    """
    credentials = grpc.ssl_channel_credentials(*read_credentials(certificates, name))
    waiting, most = Patience(name, server, patience), options(MOST_OF_WORDS)
    while True:
        try:
            with grpc.secure_channel(server, credentials, most) as channel:
                ask: Any = channel.unary_unary(f"/{SERVICE}/{WORDS}")
                words = decoded(ask(b"")).value
                if not isinstance(words, list):
                    raise FrameError("expected the words of a run")
                return [str(word) for word in words]
        except grpc.RpcError as error:
            waiting.after(error)
        time.sleep(PAUSE)
