"""Certificates made on the spot, for tests of TLS."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsplit.wire.stream import ServerTls

DAY = datetime.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@dataclass
class Authority:
    """A certificate authority: its PEM and what it signs."""

    name: str

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.pem = self._sign(self.name, self._key, ca=True)

    def _sign(
        self, subject: str, key: ec.EllipticCurvePrivateKey, *, ca: bool = False, expired=False
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = [x509.DNSName(subject)]
        if subject == "127.0.0.1":
            names = [x509.IPAddress(ipaddress.ip_address(subject))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now - DAY if expired else now + DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, subject: str, *, expired: bool = False) -> tuple[bytes, bytes]:
        """Return (certificate, key) in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._sign(subject, key, expired=expired), _pem(key)

    def server(self, subject: str = "127.0.0.1", *, expired: bool = False) -> ServerTls:
        """Return what a session server needs."""
        return ServerTls(*self.issue(subject, expired=expired))
