"""Writes certificates: `python -m split_lightning.certificates --clients NUMBER`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> None:
    """Writes the certificates of a server and of its clients.

    Args:
        words: What is typed; `None`: from the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m split_lightning.certificates",
        description="Writes certificates for mutual TLS, from an authority of their "
        "own. Each party gets a folder; give it to this party alone.",
    )
    add = parser.add_argument
    add("--clients", type=int, required=True, help="number of clients")
    add(
        "--host",
        action="append",
        default=None,
        help="a name or an address of the server; may be repeated",
    )
    add("--out", default="certs", help="the folder (default: certs)")
    add("--days", type=float, default=365, help="how long they are valid")
    add("--holders", type=int, default=1, help="parties of each client (vertical)")
    options = parser.parse_args(words)
    if options.clients < 1 or options.holders < 1 or options.days <= 0:
        parser.error("--clients, --holders and --days must be positive")
    from split_lightning.engines.certificates import write_certificates

    sites = [
        f"client-{client}" + (f".{holder}" if options.holders > 1 else "")
        for client in range(options.clients)
        for holder in range(options.holders)
    ]
    hosts = options.host or ["localhost", "127.0.0.1"]
    for folder in write_certificates(options.out, sites, hosts, options.days):
        print(folder)
