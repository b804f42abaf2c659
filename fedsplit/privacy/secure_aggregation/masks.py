"""Keys, key agreement, masks and sealed shares; all cryptography is that of ``cryptography``.

X25519 (RFC 7748) with HKDF-SHA-256 for every secret between two owners, the ChaCha20 key stream for
masks, ChaCha20-Poly1305 for shares on their way through the server, Ed25519 for signatures.

Flower has such primitives too (``flwr.common.secure_aggregation``), which are not used: in flwr
1.41 ``pseudo_rand_gen`` folds a mask's 32-byte seed into 32 bits for NumPy's Mersenne Twister, so
that trying 2^32 seeds takes a mask off; it never draws the largest value; and stochastic rounding
draws from NumPy's global generator.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, TypeAlias

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsplit.errors import PrivacyError

NDArray: TypeAlias = np.ndarray[Any, Any]
KEY_BYTES, SIGNATURE_BYTES, NONCE_BYTES = 32, 64, 12
_CHUNK = 1 << 20


def new_key() -> bytes:
    """Return 32 bytes from the operating system: a private X25519 key, or a mask's seed."""
    return os.urandom(KEY_BYTES)


def public_key(private: bytes) -> bytes:
    """Return the public half of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """Return the 32-byte secret that two owners share for a purpose.

    Raises:
        PrivacyError: the public key is no point that a key agreement can be made with.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:  # a point of small order would give everybody the same secret
        raise PrivacyError("a peer's key: must be an X25519 public key") from None
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=purpose).derive(shared)


def add_mask(vector: NDArray, seed: bytes, sign: int) -> None:
    """Add (``sign`` = 1) or take off (-1) the mask of a seed, in place, modulo the type's range.

    Args:
        vector: (d,), unsigned integers.
        seed: 32 bytes, used for one vector only.
        sign: 1 or -1.
    """
    stream = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    zeros = bytes(_CHUNK)
    step = _CHUNK // vector.itemsize
    for at in range(0, len(vector), step):
        part = vector[at : at + step]
        words = stream.update(zeros[: part.nbytes])
        mask = np.frombuffer(words, dtype=vector.dtype.newbyteorder("<"))
        if sign > 0:
            part += mask
        else:
            part -= mask


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """Return a text encrypted and bound to what it is about."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Return the text of :func:`seal`.

    Raises:
        PrivacyError: it was changed on its way, or is of another key, round or owner.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about)
    except (InvalidTag, ValueError):
        raise PrivacyError("sealed shares of a peer: cannot be opened") from None


def commit(seed: bytes, about: bytes) -> bytes:
    """Return a commitment to a random 32-byte seed."""
    return hashlib.sha256(b"fedsplit.secagg.seed" + about + seed).digest()


def identity_public(private: bytes) -> bytes:
    """Return the public half of an Ed25519 key."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign(private: bytes, text: bytes) -> bytes:
    """Return the Ed25519 signature of a text."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(text)


def is_signed(public: bytes, signature: bytes, text: bytes) -> bool:
    """Return whether a signature of a text is by the key."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True
