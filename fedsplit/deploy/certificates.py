"""X.509 certificates (ECDSA P-256) and node keys (NIST P-384, OpenSSH) of one federation."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsplit.errors import ConfigError, check

# How far a machine's clock may be behind (a wrong time zone, a clock that jumps back) before it
# takes a new certificate for one that is not valid yet.
CLOCK_SKEW = datetime.timedelta(days=1)
# A SuperLink's own SuperExec reaches it over the loopback interface and checks the certificate.
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DNS = re.compile(r"(\*\.)?([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?)+")
ORGANISATION = "fedsplit federation"


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _subject(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),
        ]
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        good = len(host) <= 253 and _DNS.fullmatch(host) is not None
        check(good, "host", host, "a host name or an IP address, without a port")
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
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = _utc_now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def make_authority(days: float) -> Issued:
    """Return a new certificate authority that may sign end certificates only.

    Raises:
        ConfigError: if ``days`` is not in (0, 7300].
    """
    check(0 < days <= 7300, "days", days, "in (0, 7300]")
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject("fedsplit authority")
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Issued(certificate.public_bytes(serialization.Encoding.PEM), _pem_key(key))


def issue(authority: Issued, name: str, days: float, hosts: Sequence[str] = ()) -> Issued:
    """Return a certificate under ``authority``.

    Args:
        authority: the signing certificate and key.
        name: common name.
        days: validity; cut at the authority's own end.
        hosts: names and addresses of a server; empty = a client's certificate.

    Raises:
        ConfigError: an authority that cannot be read or has expired, or a host that is none.
    """
    check(0 < days <= 7300, "days", days, "in (0, 7300]")
    parent = load_certificate(authority.certificate, "authority")
    signer = load_private_key(authority.key, "authority's key")
    left = (parent.not_valid_after_utc - _utc_now()) / datetime.timedelta(days=1)
    check(left > 0, "authority", f"expired {-left:.1f} days ago", "valid")
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    whole = list(dict.fromkeys(hosts))
    names = [_alternative(host) for host in whole] or [x509.DNSName(name)]
    certificate = (
        _builder(_subject(name), parent.subject, key.public_key(), min(days, left))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return Issued(certificate.public_bytes(serialization.Encoding.PEM), _pem_key(key))


def make_node_key() -> tuple[bytes, bytes]:
    """Return (private, public) of a SuperNode's key in OpenSSH format, as Flower asks."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public + b"\n"


def load_certificate(pem: bytes, what: str) -> x509.Certificate:
    """Return the first certificate of a PEM text.

    Raises:
        ConfigError: if there is none.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigError(f"{what}: must be a PEM certificate: {error}") from None


def load_private_key(pem: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    """Return an EC private key in PEM (PKCS8) or OpenSSH format.

    Raises:
        ConfigError: if it is none, or protected by a password.
    """
    ssh = b"OPENSSH PRIVATE KEY" in pem
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    try:
        key = load(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{what}: must be a private key without password: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{what}: {type(key).__name__}: must be an elliptic-curve key")
    return key


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the names and addresses a certificate is valid for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    names = found.get_values_for_type(x509.DNSName)
    return [*names, *(str(x) for x in found.get_values_for_type(x509.IPAddress))]


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority``'s key signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # InvalidSignature, and whatever an unknown kind of key raises
        return False
    return True
