"""An owner's noise secret, and the deterministic random streams that come out of it.

Noise that protects text must be unpredictable to everyone else and, at the same time, the same for
ever for the same sample: a server that sees two draws of noise on one representation averages them
(error falls by the square root of the number of draws).  Both follow from a keyed pseudorandom
function: 32 secret bytes on the owner's disk, and a context that says what the noise is for.

    key    = BLAKE2b-256(key=secret, data=encode(context))
    stream = ChaCha20(key, nonce=0), read as little-endian 64-bit words
    u      = (2 (word >> 12) + 1) / 2**53           in (0, 1), never 0 or 1, exact in float64

Every draw consumes exactly one word (inverse distribution functions, no rejection), so a stream
gives the same numbers however the calls are cut up.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from scipy.special import gammaincinv, ndtri

from fedsplit import storage
from fedsplit.errors import PrivacyError

SECRET_BYTES = 32
Context = bytes | str | int
Floats = npt.NDArray[np.float64]


def encode_context(*context: Context) -> bytes:
    """Encode ``context`` so that no two different contexts give the same bytes.

    Every part is a type letter, its length as 8 little-endian bytes, and its content.

    Raises:
        PrivacyError: for a part that is not bytes, str or int (bool is refused: it equals 0 or 1).
    """
    parts: list[bytes] = []
    for i, part in enumerate(context):
        if isinstance(part, bytes):
            tag, body = b"b", part
        elif isinstance(part, str):
            tag, body = b"s", part.encode()
        elif isinstance(part, int) and not isinstance(part, bool):
            tag, body = b"i", part.to_bytes(part.bit_length() // 8 + 1, "little", signed=True)
        else:
            raise PrivacyError(
                f"context[{i}]={type(part).__name__}: must be bytes, str or int (no bool)"
            )
        parts += [tag, len(body).to_bytes(8, "little"), body]
    return b"".join(parts)


class SecretStream:
    """Numbers that only the holder of the key can predict.

    Not safe to share between threads: each call moves the position.

    Args:
        key: 32 bytes; two streams with different keys are independent.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != SECRET_BYTES:
            raise PrivacyError(f"key={len(key)} bytes: must be {SECRET_BYTES} bytes")
        cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None)
        self._encryptor: CipherContext = cipher.encryptor()

    def uniform(self, n: int) -> Floats:
        """Return ``n`` numbers uniform on the odd multiples of 2**-53, shape ``(n,)``."""
        if n < 0:
            raise PrivacyError(f"n={n}: must be >= 0 (numbers)")
        words = np.frombuffer(self._encryptor.update(bytes(8 * n)), dtype="<u8")
        u = (words >> np.uint64(12)).astype(np.float64)  # 52 bits, so that + 0.5 stays exact
        u += 0.5
        u *= 2.0**-52
        return u

    def normal(self, shape: int | tuple[int, ...]) -> Floats:
        """Return standard normal numbers of ``shape`` (inverse distribution function)."""
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        u = self.uniform(math.prod(size))
        ndtri(u, out=u)
        return u.reshape(size)

    def gamma(self, shape_param: float, n: int) -> Floats:
        """Return ``n`` numbers Gamma-distributed with that shape and rate 1, shape ``(n,)``.

        Raises:
            PrivacyError: if ``shape_param`` is not positive and finite.
        """
        if not (shape_param > 0 and math.isfinite(shape_param)):
            raise PrivacyError(f"shape_param={shape_param!r}: must be > 0 and finite")
        return np.asarray(gammaincinv(shape_param, self.uniform(n)), dtype=np.float64)


class OwnerSecret:
    """32 secret bytes from which all of one owner's noise follows.

    Whoever reads the file can subtract the noise from everything that ever left; whoever loses it
    will draw new noise for samples already sent, which costs privacy (see
    :mod:`fedsplit.privacy.perturb`).  Back it up like a private key, never send it.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise PrivacyError(f"secret={len(secret)} bytes: must be {SECRET_BYTES} bytes")
        self._secret = bytes(secret)

    def __repr__(self) -> str:
        return "OwnerSecret(<hidden>)"

    def __reduce__(self) -> str:
        raise PrivacyError("OwnerSecret: must not be copied or serialised; pass the file's path")

    @classmethod
    def load_or_create(cls, path: str | Path) -> OwnerSecret:
        """Read the secret at ``path``, or draw one from the operating system and store it there.

        The file is created with mode 0600 and appears complete or not at all; if two processes
        create it at once, both return the one that won.

        Raises:
            PrivacyError: if the file is readable or writable by group or others, is not a regular
                file of this user, or has the wrong length.
        """
        path = Path(path)
        try:
            return cls._load(path)
        except FileNotFoundError:
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            storage.create(path, secrets.token_bytes(SECRET_BYTES))
        return cls._load(path)

    @classmethod
    def _load(cls, path: Path) -> OwnerSecret:
        fd = os.open(path, os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise PrivacyError(f"secret file {path}: must be a regular file")
            mode = stat.S_IMODE(info.st_mode)
            if mode & 0o077:
                raise PrivacyError(
                    f"secret file {path}: mode={mode:04o}: must be 0600 (no access for others)"
                )
            if hasattr(os, "getuid") and info.st_uid != os.getuid():
                raise PrivacyError(
                    f"secret file {path}: owner uid={info.st_uid}: must be {os.getuid()}"
                )
            secret = file.read(SECRET_BYTES + 1)
        if len(secret) != SECRET_BYTES:
            raise PrivacyError(
                f"secret file {path}: length={info.st_size}: must be {SECRET_BYTES} bytes"
            )
        return cls(secret)

    @classmethod
    def for_simulation(cls, seed: int, owner: str | int) -> OwnerSecret:
        """Return a secret that anyone who knows ``seed`` can recompute.  Simulations only."""
        data = encode_context("fedsplit.simulation", seed, owner)
        return cls(hashlib.blake2b(data, digest_size=SECRET_BYTES).digest())

    def stream(self, *context: Context) -> SecretStream:
        """Return the stream that belongs to ``context``; other contexts give independent ones."""
        return SecretStream(self._keyed(b"fedsplit-noise", context))

    def name(self, *context: Context) -> bytes:
        """Return 32 bytes that name ``context`` and tell nothing of it without the secret."""
        return self._keyed(b"fedsplit-names", context)

    def key(self, *context: Context) -> bytes:
        """Return 32 secret bytes for a key that must outlive this process: never to be sent."""
        return self._keyed(b"fedsplit-keys", context)

    def _keyed(self, purpose: bytes, context: tuple[Context, ...]) -> bytes:
        data = encode_context(*context)
        return hashlib.blake2b(
            data, digest_size=SECRET_BYTES, key=self._secret, person=purpose
        ).digest()
