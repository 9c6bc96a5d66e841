"""Writes certificates: `python -m split_lightning.certificates --clients NUMBER`."""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from split_lightning.cli.user_errors import refuse

_OPTIONS = ("clients", "host", "out", "days", "holders", "help")
_MOST_DAYS = 36_500  # 100 years
_HELP = """Writes certificates for a server and its clients, which show to each other by
them that they are of the same run (mutual TLS).

Each party gets a folder: give it to this party alone, on a way that others cannot read.
An authority made for this command signs all, and its key is not kept: nothing can be
added later, and certificates of another run are of no use here.

--clients NUMBER   number of clients, which are client-0, client-1 and so forth
--host NAME        a name or an address at which clients reach the server; may be
                   repeated; default: localhost and 127.0.0.1
--out FOLDER       where to write them; default: certs
--days NUMBER      how long they are valid; default: 365
--holders NUMBER   parties of each client (topology=vertical); default: 1"""


def main(words: Sequence[str] | None = None) -> None:
    """Writes the certificates of a server and of its clients.

    Args:
        words: What is typed; `None`: from the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m split_lightning.certificates",
        usage="%(prog)s --clients NUMBER [--host NAME] [--out FOLDER] ...",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--clients", type=int, required=True, help=argparse.SUPPRESS)
    add("--host", action="append", help=argparse.SUPPRESS)
    add("--out", default="certs", type=Path, help=argparse.SUPPRESS)
    add("--days", type=float, default=365, help=argparse.SUPPRESS)
    add("--holders", type=int, default=1, help=argparse.SUPPRESS)
    words = sys.argv[1:] if words is None else words
    _refuse_unknown(words)
    options = parser.parse_args(words)
    options.host = options.host or ["localhost", "127.0.0.1"]
    try:
        _check(options)
        from split_lightning.engines.certificates import write_certificates

        folders = write_certificates(
            options.out, _sites(options), options.host, options.days
        )
    except (ImportError, ValueError) as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"Cannot write to {options.out}: {error}. Use --out for another folder.")
    else:
        print(*folders, "Give each folder to its party alone.", sep="\n")


def _refuse_unknown(words: Sequence[str]) -> None:
    """Stops where something was typed that is no option; names the nearest one."""
    for word in words:
        name, _, value = word.lstrip("-").partition("=")
        is_option = word.startswith("--")
        if (is_option and name in _OPTIONS) or not (is_option or "=" in word):
            continue
        near = difflib.get_close_matches(name, _OPTIONS, n=1)
        meant = " ".join(["--" + near[0], value]).rstrip() if near else ""
        known = f"Options: --{', --'.join(_OPTIONS)}."
        hint = f"Did you mean `{meant}`?" if near else known
        refuse(f"There is no option `{word}`. {hint}")


def _sites(options: argparse.Namespace) -> list[str]:
    """Returns the names of the clients' sites."""
    clients = [f"client-{number}" for number in range(options.clients)]
    if options.holders == 1:
        return clients
    return [f"{own}.{number}" for own in clients for number in range(options.holders)]


def _check(options: argparse.Namespace) -> None:
    """Stops where something is out of range, or the folder has files.

    Raises:
        ImportError: If a package is missing.
        ValueError: Says what to type.
    """
    if find_spec("cryptography") is None:
        raise ImportError(
            "Certificates need the package cryptography, which is not installed: "
            'pip install "split-lightning[grpc]".'
        )
    for name in ("clients", "holders"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"Expected --{name} to be at least 1, but got {getattr(options, name)}."
            )
    if not 0 < options.days <= _MOST_DAYS:
        raise ValueError(
            f"Expected --days to be above 0 and at most {_MOST_DAYS}, but got "
            f"{options.days:g}."
        )
    for host in options.host:
        if not _is_host(host):
            raise ValueError(
                "Expected --host to be a name or an address at which clients reach the "
                f"server, without a port, such as server.example, but got {host!r}."
            )
    if options.out.is_dir() and any(p.is_file() for p in options.out.rglob("*")):
        raise ValueError(
            f"Expected --out to be an empty folder, or a new one, but {options.out} "
            "has files. The key that signed its certificates was not kept: new ones "
            "would go with none of them, and all parties would need theirs again. "
            f"Choose another folder, or remove {options.out} first."
        )


def _is_host(name: str) -> bool:
    """Returns whether clients may reach a server at a name or an address."""
    try:
        return not ipaddress.ip_address(name).is_unspecified
    except ValueError:
        label = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
        return re.fullmatch(rf"(?=.{{1,253}}$){label}(\.{label})*", name) is not None
