"""Short-lived certificates and node keys for a federation on one machine."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsplit.errors import check

CLOCK_SKEW = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Certificates:
    """Paths of a server's certificate, its private key, and the CA that clients pin (all PEM)."""

    ca: Path
    cert: Path
    key: Path


@dataclass(frozen=True)
class NodeKey:
    """Paths of a node's key pair in OpenSSH format (NIST P-384, as Flower's node auth asks)."""

    private: Path
    public: Path


def _write(path: Path, content: bytes, mode: int) -> Path:
    """Create ``path`` with exactly ``mode``; never overwrites, never readable in between."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    path.chmod(mode)
    return path


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedsplit run"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def make_certificates(
    folder: Path,
    hosts: Sequence[str] = ("localhost", "127.0.0.1", "::1"),
    valid_days: float = 30.0,
) -> Certificates:
    """Make a CA and one server certificate (ECDSA P-256) in ``folder``.

    The CA's private key never touches the disk and is gone when this returns, so no further
    certificate can be issued under the CA that the clients pin.

    Args:
        folder: created with mode 0700 if missing; the private key gets 0600, certificates 0644.
        hosts: host names and IP addresses for which the certificate is valid (SAN).
        valid_days: days until both expire; a run that lasts longer loses new connections.

    Raises:
        ConfigError: if ``hosts`` is empty or ``valid_days`` is not positive.
        FileExistsError: if the folder already holds certificates.
    """
    check(len(hosts) > 0, "hosts", tuple(hosts), "at least one host name or IP address")
    check(valid_days > 0, "valid_days", valid_days, "> 0")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    ca = (
        _builder("fedsplit run CA", "fedsplit run CA", ca_key, valid_days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    names = x509.SubjectAlternativeName([_alternative_name(host) for host in hosts])
    server_only = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    certificate = (
        _builder(hosts[0], "fedsplit run CA", key, valid_days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(issuer, critical=False)
        .add_extension(names, critical=False)
        .add_extension(server_only, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key_bytes = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificates(
        ca=_write(folder / "ca.pem", ca.public_bytes(pem), 0o644),
        cert=_write(folder / "server.pem", certificate.public_bytes(pem), 0o644),
        key=_write(folder / "server.key", key_bytes, 0o600),
    )


def make_node_key(folder: Path, name: str) -> NodeKey:
    """Make the key pair with which the node ``name`` authenticates to the SuperLink.

    Raises:
        FileExistsError: if ``folder`` already has a key of that name.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return NodeKey(
        private=_write(folder / name, private, 0o600),
        public=_write(folder / f"{name}.pub", public + b"\n", 0o644),
    )
