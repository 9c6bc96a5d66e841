"""Certificates for the sites of a run, from an authority of its own."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CLOCKS_DIFFER = timedelta(minutes=5)


class Authority:
    """Signs certificates. Its key is in memory only: nothing is signed later.

    Args:
        days: For how many days certificates are valid.
    """

    def __init__(self, days: float = 365) -> None:
        now = datetime.now(timezone.utc)
        self.valid = now - _CLOCKS_DIFFER, now + timedelta(days=days)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named("split_lightning authority")
        builder = self._builder(self._name, self._key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
        self.certificate = builder.sign(self._key, hashes.SHA256())

    def issue(
        self,
        folder: Path,
        name: str,
        hosts: Sequence[str] = (),
        ends: datetime | None = None,
    ) -> None:
        """Writes a party's certificate, its key, and the authority's certificate.

        Args:
            folder: Where to write `NAME.crt`, `NAME.key` and `authority.crt`.
            name: The party, such as `server` or `client-3`.
            hosts: The names and addresses under which a server is reached.
            ends: Until when it is valid; `None`: as long as the authority's.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usage = (
            ExtendedKeyUsageOID.SERVER_AUTH
            if hosts
            else ExtendedKeyUsageOID.CLIENT_AUTH
        )
        names = x509.SubjectAlternativeName([*map(_host, hosts or [name])])
        builder = self._builder(_named(name), key.public_key(), ends)
        builder = builder.add_extension(
            x509.BasicConstraints(False, None), critical=True
        )
        builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        folder.mkdir(parents=True, exist_ok=True)
        pem = serialization.Encoding.PEM
        secret = key.private_bytes(
            pem,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
        (folder / "authority.crt").write_bytes(self.certificate.public_bytes(pem))
        _write_secret(folder / f"{name}.key", secret)

    def _builder(
        self, subject: x509.Name, public_key: Any, ends: datetime | None = None
    ) -> x509.CertificateBuilder:
        begins, last = self.valid
        return x509.CertificateBuilder(
            self._name,
            subject,
            public_key,
            x509.random_serial_number(),
            begins,
            ends or last,
        )


def write_certificates(
    folder: str | Path, sites: Sequence[str], hosts: Sequence[str], days: float = 365
) -> list[Path]:
    """Writes a folder of certificates for each party of a run.

    Args:
        folder: Gets a folder `server`, and one for each site.
        sites: The names of the sites, such as `client-0`.
        hosts: The names and addresses under which the server is reached.
        days: For how many days they are valid.

    Returns:
        The folders.
    """
    authority, root = Authority(days), Path(folder)
    authority.issue(root / "server", "server", hosts)
    for site in sites:
        authority.issue(root / site, site)
    return [root / name for name in ("server", *sites)]


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_secret(path: Path, secret: bytes) -> None:
    """Writes a file that only its user can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
    ) as f:
        f.write(secret)
