"""Short-lived certificates and node keys for a federation on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsplit import storage
from fedsplit.deploy import certificates
from fedsplit.errors import check


@dataclass(frozen=True)
class Certificates:
    """Paths of a server's certificate, its private key, and the CA that clients pin (all PEM)."""

    ca: Path
    cert: Path
    key: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a server's session server shows them."""
        return {
            "FEDSPLIT_TLS_CERT": str(self.cert),
            "FEDSPLIT_TLS_KEY": str(self.key),
            "FEDSPLIT_TLS_CA": str(self.ca),
        }


@dataclass(frozen=True)
class NodeKey:
    """Paths of a node's key pair in OpenSSH format (NIST P-384, as Flower's node auth asks)."""

    private: Path
    public: Path


def _write(path: Path, content: bytes, mode: int) -> Path:
    storage.create(path, content, mode)
    return path


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def make_certificates(
    folder: Path,
    hosts: Sequence[str] = certificates.LOOPBACK,
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
    authority = certificates.make_authority(valid_days)
    server = certificates.issue(authority, hosts[0], valid_days, hosts)
    _private(folder)
    return Certificates(
        ca=_write(folder / "ca.pem", authority.certificate, 0o644),
        cert=_write(folder / "server.pem", server.certificate, 0o644),
        key=_write(folder / "server.key", server.key, 0o600),
    )


def make_node_key(folder: Path, name: str) -> NodeKey:
    """Make the key pair with which the node ``name`` authenticates to the SuperLink.

    Raises:
        FileExistsError: if ``folder`` already has a key of that name.
    """
    private, public = certificates.make_node_key()
    _private(folder)
    return NodeKey(
        private=_write(folder / name, private, 0o600),
        public=_write(folder / f"{name}.pub", public, 0o644),
    )
