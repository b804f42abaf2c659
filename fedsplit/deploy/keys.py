"""The folder of a federation's keys, as ``fedsplit keys init`` makes it.

::

    DIR/ca.pem                      0644  the authority: for everybody
    DIR/ca.key                      0600  signs certificates; move it off the machine, bring it back
                                          to renew
    DIR/server/server.pem, .key     0644, 0600  SuperLink and session server (one machine)
    DIR/owners/NAME/                0700  handed to that owner, by a way that keeps it secret
        ca.pem                      0644
        node.key, node.pub          0600, 0644  node authentication (P-384, OpenSSH)
        client.pem, client.key      0644, 0600  where client certificates were asked for

Nothing here is an owner's noise secret: that is drawn on the owner's own machine and never leaves.
"""

from __future__ import annotations

import datetime
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedsplit import storage
from fedsplit.deploy.certificates import (
    LOOPBACK,
    Issued,
    hosts_of,
    is_signed_by,
    issue,
    load_certificate,
    load_private_key,
    make_authority,
    make_node_key,
)
from fedsplit.errors import ConfigError, check

PUBLIC, PRIVATE, FOLDER = 0o644, 0o600, 0o700
WARN_DAYS = 30.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Folder and stem of the server's and of a client's certificate.
SERVER = Path("server", "server")


@dataclass(frozen=True)
class Finding:
    """One file of a key folder, explained.

    Attributes:
        path: relative to the folder.
        what: what it is and who may have it.
        fault: what is wrong with it, empty if nothing is.
        grave: whether the fault must be mended before anything starts.
    """

    path: str
    what: str
    fault: str = ""
    grave: bool = True


def _as_one(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` make a folder's content and put it in place in one step.

    Raises:
        ConfigError: the folder holds something already, or cannot be made.
    """
    folder = folder.absolute()
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already, and keys are never overwritten")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with storage.new_folder(folder, durable=True, concurrent=True) as draft:
            fill(draft)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error}") from None
    return folder


def make_keys(
    folder: Path,
    hosts: Sequence[str],
    owners: Sequence[str] = (),
    *,
    days: float = 365.0,
    client_certificates: bool = False,
) -> Path:
    """Make a federation's keys; the folder appears whole or not at all.

    Args:
        folder: must not hold anything.
        hosts: names and addresses by which owners reach SuperLink and session server; the loopback
            ones are added.
        owners: names of data owners to make node keys for.
        days: validity of all certificates.
        client_certificates: also make each owner a certificate for mutual TLS.

    Raises:
        ConfigError: the folder exists, a host or name is not one, or ``days`` is out of range.
    """
    check(len(hosts) > 0, "--host", tuple(hosts), "at least one host name or IP address")
    _check_names(owners)
    authority = make_authority(days)
    server = issue(authority, hosts[0], days, [*hosts, *LOOPBACK])

    def fill(draft: Path) -> None:
        storage.create(draft / "ca.pem", authority.certificate, PUBLIC)
        storage.create(draft / "ca.key", authority.key, PRIVATE)
        (draft / "server").mkdir(mode=FOLDER)
        _write_issued(draft / SERVER, server)
        (draft / "owners").mkdir(mode=FOLDER)
        for name in owners:
            _fill_owner(draft / "owners" / name, name, authority, days, client_certificates)

    return _as_one(folder, fill)


def add_owner(
    folder: Path, name: str, *, days: float = 365.0, client_certificates: bool = False
) -> Path:
    """Make one more owner's folder in a folder of keys.

    Raises:
        ConfigError: the owner is there already, or the authority's key is not.
    """
    _check_names([name])
    authority = _authority(folder)

    def fill(draft: Path) -> None:
        draft.rmdir()
        _fill_owner(draft, name, authority, days, client_certificates)

    return _as_one(folder / "owners" / name, fill)


def make_node(folder: Path) -> Path:
    """Make a node's key pair alone: an owner that does so hands out ``node.pub`` and no secret.

    Raises:
        ConfigError: the folder holds something already.
    """
    private, public = make_node_key()

    def fill(draft: Path) -> None:
        storage.create(draft / "node.key", private, PRIVATE)
        storage.create(draft / "node.pub", public, PUBLIC)

    return _as_one(folder, fill)


def renew_server(folder: Path, *, days: float = 365.0) -> list[str]:
    """Issue the server's certificate anew, for the same names and under the same authority.

    Owners change nothing.  The files are replaced one after the other, the key first: a server
    that starts in between fails to load them and says so.

    Returns:
        The names it is valid for.

    Raises:
        ConfigError: the authority's key is not there, or a file cannot be read.
    """
    authority = _authority(folder)
    stem = folder / SERVER
    old = load_certificate(_read(stem.with_suffix(".pem")), str(stem.with_suffix(".pem")))
    hosts = hosts_of(old)
    new = issue(authority, hosts[0], days, hosts)
    for suffix, content, mode in ((".key", new.key, PRIVATE), (".pem", new.certificate, PUBLIC)):
        storage.write(stem.with_suffix(suffix), content, mode=mode)
    return hosts


def _check_names(owners: Sequence[str]) -> None:
    for name in owners:
        good = _NAME.fullmatch(name) is not None
        check(good, "--owner", name, "1 to 64 letters, digits, - and _")
    check(len(set(owners)) == len(owners), "--owner", tuple(owners), "different names")


def _write_issued(stem: Path, issued: Issued) -> None:
    storage.create(stem.with_suffix(".pem"), issued.certificate, PUBLIC)
    storage.create(stem.with_suffix(".key"), issued.key, PRIVATE)


def _fill_owner(folder: Path, name: str, authority: Issued, days: float, client: bool) -> None:
    folder.mkdir(mode=FOLDER)
    private, public = make_node_key()
    storage.create(folder / "ca.pem", authority.certificate, PUBLIC)
    storage.create(folder / "node.key", private, PRIVATE)
    storage.create(folder / "node.pub", public, PUBLIC)
    if client:
        _write_issued(folder / "client", issue(authority, name, days))


def _authority(folder: Path) -> Issued:
    return Issued(_read(folder / "ca.pem"), _read(folder / "ca.key"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: must be readable: {error.strerror}") from None


# ---- explaining ------------------------------------------------------------------------------


def days_left(pem: bytes, what: str) -> tuple[float, datetime.datetime]:
    """Return the days until a certificate ends (negative: it has), and that moment (UTC).

    Raises:
        ConfigError: if it is no certificate.
    """
    end = load_certificate(pem, what).not_valid_after_utc
    return (end - datetime.datetime.now(datetime.UTC)) / datetime.timedelta(days=1), end


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 fingerprint of a folder's authority, as ``openssl x509`` prints it.

    Raises:
        ConfigError: there is no ``ca.pem``, or it is no certificate.
    """
    path = folder / "ca.pem"
    return load_certificate(_read(path), str(path)).fingerprint(hashes.SHA256()).hex(":").upper()


def mode_fault(path: Path) -> str:
    """Return what is wrong with a private file's owner and mode; empty if nothing is."""
    try:
        info = path.stat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    mode = stat.S_IMODE(info.st_mode)
    if mode & 0o077:
        return f"mode {mode:04o}: must be 0600, others can read it"
    if info.st_uid not in (0, os.geteuid()):
        return f"belongs to user {info.st_uid}: must belong to you or root"
    return ""


def explain(folder: Path) -> list[Finding]:
    """Return what every file of a key folder is, and what is wrong with it.

    Works for the whole folder and for the one that an owner was given.

    Raises:
        ConfigError: there is no ``ca.pem`` in it.
    """
    ca_pem = _read(folder / "ca.pem")
    left, end = days_left(ca_pem, str(folder / "ca.pem"))
    authority = load_certificate(ca_pem, "ca.pem")
    fault = _expiry(left, end)
    found = [Finding("ca.pem", "the authority, for everybody", fault, left <= 0)]
    if (folder / "ca.key").exists():
        what = "signs certificates; keep it off this machine until you renew"
        found.append(_private(folder, "ca.key", what))
    found += _pair(folder, "server/server", "SuperLink's and sessions'", authority)
    for owner in sorted((folder / "owners").glob("*/")):
        found += _node(folder, f"owners/{owner.name}", authority)
    return found + _node(folder, ".", authority)


def _expiry(left: float, end: datetime.datetime) -> str:
    if left <= 0:
        return f"expired {end:%Y-%m-%d %H:%M} UTC"
    return f"expires {end:%Y-%m-%d}, in {left:.0f} days" if left < WARN_DAYS else ""


def _private(folder: Path, name: str, what: str) -> Finding:
    return Finding(name, what, mode_fault(folder / name))


def _pair(folder: Path, stem: str, whose: str, authority: x509.Certificate) -> list[Finding]:
    """Explain a certificate and its key, if they are there."""
    certificate, key = folder / f"{stem}.pem", folder / f"{stem}.key"
    if not certificate.exists() and not key.exists():
        return []
    pem = _read(certificate)
    left, end = days_left(pem, str(certificate))
    loaded = load_certificate(pem, str(certificate))
    fault, grave = _expiry(left, end), left <= 0
    if not is_signed_by(loaded, authority):
        fault, grave = "not signed by ca.pem", True
    names = ", ".join(hosts_of(loaded))
    what = f"{whose} certificate for {names}, until {end:%Y-%m-%d}"
    secret = _private(folder, f"{stem}.key", f"{whose} private key")
    if not secret.fault:
        mine = load_private_key(_read(key), str(key)).public_key()
        if mine != loaded.public_key():
            secret = Finding(secret.path, secret.what, f"is not the key of {stem}.pem")
    return [Finding(f"{stem}.pem", what, fault, grave), secret]


def _node(folder: Path, inner: str, authority: x509.Certificate) -> list[Finding]:
    base = folder / inner
    prefix = "" if inner == "." else f"{inner}/"
    if not (base / "node.pub").exists() and not (base / "node.key").exists():
        return []
    name = "an owner's" if inner == "." else f"{base.name}'s"
    found = []
    if (base / "node.key").exists():
        what = f"{name} node key; that owner alone needs it"
        found.append(_private(folder, f"{prefix}node.key", what))
    found.append(Finding(f"{prefix}node.pub", f"{name} public node key, registered at SuperLink"))
    if prefix and (base / "ca.pem").exists() and _read(base / "ca.pem") != _read(folder / "ca.pem"):
        found.append(Finding(f"{prefix}ca.pem", "the authority", "is not this folder's ca.pem"))
    return found + _pair(folder, f"{prefix}client", f"{name} client", authority)
