"""Shamir's secret sharing over a prime field (Shamir 1979, CACM 22(11)).

A secret of 32 bytes is the value at 0 of a random polynomial of degree t - 1 over GF(p); a share is
its value at another point.  Any t shares give the secret back, t - 1 of them say nothing of it.
Shares are not verifiable: a false one gives a false secret, which whoever combines them must notice
(here: a mask key has a public half, a mask's seed a commitment).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from fedsplit.errors import PrivacyError

PRIME = 2**256 + 297  # the smallest above all secrets
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Return one share per point.

    Args:
        secret: 32 bytes.
        threshold: shares that give it back, t.
        points: distinct, in [1, 2^32); as many as there are holders.

    Raises:
        PrivacyError: another length, points that are not distinct, or a threshold that they cannot
            reach.
    """
    if len(secret) != SECRET_BYTES:
        raise PrivacyError(f"secret of {len(secret)} bytes: must be {SECRET_BYTES}")
    good = len(set(points)) == len(points) and all(0 < x < 2**32 for x in points)
    if not good:
        raise PrivacyError("points of shares: must be distinct integers in [1, 2^32)")
    if not 1 <= threshold <= len(points):
        raise PrivacyError(f"threshold={threshold}: must be in [1, {len(points)}], the shares")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    found = {}
    for x in points:
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * x % PRIME
        value = (value + int.from_bytes(secret, "big")) % PRIME
        found[x] = value.to_bytes(SHARE_BYTES, "big")
    return found


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret from ``threshold`` of the shares, those of the lowest points.

    Args:
        shares: point -> share.
        threshold: as it was split with.

    Raises:
        PrivacyError: too few shares, a share of another length, or values that no secret has.
    """
    if len(shares) < threshold:
        raise PrivacyError(f"shares={len(shares)}: must be >= {threshold}, the threshold")
    used = sorted(shares)[:threshold]
    values = []
    for x in used:
        if len(shares[x]) != SHARE_BYTES:
            raise PrivacyError(f"share of {len(shares[x])} bytes: must be {SHARE_BYTES}")
        values.append(int.from_bytes(shares[x], "big"))
    total = 0
    for weight, value in zip(_at_zero(used), values, strict=True):
        total = (total + weight * value) % PRIME
    if total >= 2 ** (8 * SECRET_BYTES):
        raise PrivacyError("shares do not belong together: no secret has that value")
    return total.to_bytes(SECRET_BYTES, "big")


def _at_zero(points: Sequence[int]) -> list[int]:
    """Return the weights by which values at these points make the value at 0 (Lagrange)."""
    whole = 1
    for x in points:
        whole = whole * x % PRIME
    below = []
    for x in points:
        product = x
        for other in points:
            if other != x:
                product = product * (other - x) % PRIME
        below.append(product)
    return [whole * inverse % PRIME for inverse in _inverses(below)]


def _inverses(values: Sequence[int]) -> list[int]:
    """Return all inverses with one inversion (Montgomery's trick)."""
    before, product = [], 1
    for value in values:
        before.append(product)
        product = product * value % PRIME
    inverse = pow(product, -1, PRIME)
    found = [0] * len(values)
    for at in reversed(range(len(values))):
        found[at] = inverse * before[at] % PRIME
        inverse = inverse * values[at] % PRIME
    return found
