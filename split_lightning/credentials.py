"""The files with which a party shows that it is the one that it says."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from split_lightning.paths import path_of

_AUTHORITY = "authority.crt"


class Credentials(NamedTuple):
    """The contents of a party's files.

    Attributes:
        authority: The certificate of the authority that signed all certificates.
        key: The party's private key.
        certificate: The party's certificate.
    """

    authority: bytes
    key: bytes
    certificate: bytes


def read_credentials(
    folder: str | Path, party: str, called: str = "argument `certificates`"
) -> Credentials:
    """Returns the credentials of a party.

    Args:
        folder: The folder, with `PARTY.crt`, `PARTY.key` and `authority.crt`.
        party: The party, such as `server` or `client-3`.
        called: What a user knows the folder as.

    Raises:
        ValueError: If a file is missing, or cannot be read; says how to get it.
    """
    files = [path_of(folder) / n for n in (_AUTHORITY, f"{party}.key", f"{party}.crt")]
    found = Credentials(*(_read(file, party, called) for file in files))
    try:
        _load(*files)
    except ssl.SSLError as error:
        why = "has a certificate or a key that is damaged, or not of this party"
        raise ValueError(_wrong(files[0], party, called, why)) from error
    return found


def _load(authority: Path, key: Path, certificate: Path) -> None:
    """Reads files as TLS does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, key, password="")  # never asks for one


def _read(file: Path, party: str, called: str) -> bytes:
    """Returns the content of a file."""
    try:
        return file.read_bytes()
    except OSError as error:
        found = f"has a {file.name} that cannot be read ({error.strerror})"
        if not file.parent.is_dir():
            found = "is no folder"
        elif not file.exists():
            found = f"has no {file.name}"
        raise ValueError(_wrong(file, party, called, found)) from error


def _wrong(file: Path, party: str, called: str, found: str) -> str:
    return (
        f"Expected {called} to be the folder with the certificate and the key of "
        f"{party}, but "
        f"{file.parent} {found}. `split-lightning certificates --clients NUMBER --host "
        "NAME --out certs` writes certs/server, certs/client-0 and so forth."
    )
