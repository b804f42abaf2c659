"""Ed25519 keys of whoever signs fingerprints and evidence, as PEM files.

The private key is PKCS #8 without a passphrase, as ``openssl genpkey -algorithm ed25519`` writes
it, readable by its owner alone; the public one lies beside it as ``NAME.pub``, 64 hexadecimal
digits that can be published anywhere.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedsplit import storage
from fedsplit.errors import LineageError

MAX_BYTES = 1 << 14


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public half, 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def create_key(path: str | Path) -> Ed25519PrivateKey:
    """Make a key, write it (mode 0600) and its public half beside it.

    Raises:
        LineageError: if the file exists already, or cannot be written.
    """
    where = Path(path)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        storage.create(where, pem)
        public_path(where).write_text(public_hex(key) + "\n")
    except FileExistsError:
        raise LineageError(f"{where}: exists already; a key is never overwritten") from None
    except OSError as error:
        raise LineageError(f"{where}: cannot be written: {error}") from error
    return key


def public_path(path: str | Path) -> Path:
    """Return where the public half of a key file lies."""
    where = Path(path)
    return where.with_name(where.name + ".pub")


def load_key(path: str | Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        LineageError: for a missing file, another format or algorithm, or a passphrase.
    """
    where = Path(path)
    try:
        key = load_pem_private_key(_read(where), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise LineageError(f"{where}: must be an Ed25519 key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise LineageError(f"{where}: {type(key).__name__}: must be an Ed25519 key")
    return key


def load_or_create(path: str | Path) -> Ed25519PrivateKey:
    """Return the key at ``path``, made now if there is none."""
    return load_key(path) if Path(path).exists() else create_key(path)


def read_public(text: str) -> str:
    """Return a public key given as 64 hexadecimal digits, or as a file of them or a PEM.

    Raises:
        LineageError: if it is neither.
    """
    given = text.strip()
    if _is_hex(given):
        return given.lower()
    where = Path(given)
    raw = _read(where)
    found = raw.decode("ascii", "replace").strip()
    if _is_hex(found):
        return found.lower()
    try:
        key = load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise LineageError(f"{where}: must hold an Ed25519 public key (64 hex digits, or PEM)")
    return key.public_bytes_raw().hex()


def _is_hex(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdefABCDEF" for c in text)


def _read(where: Path) -> bytes:
    try:
        return storage.read_bounded(where, MAX_BYTES)
    except OSError as error:
        raise LineageError(f"{where}: no readable key: {error.strerror or error}") from error
