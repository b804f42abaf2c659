"""Shamir's sharing: any t shares give the secret, fewer say nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secure_aggregation import shamir

secrets_ = st.binary(min_size=32, max_size=32)


@given(secrets_, st.data())
def test_any_threshold_of_the_shares_gives_the_secret(secret: bytes, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = shamir.split(secret, threshold, points)
    held = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, len(points)))]
    assert shamir.combine({x: shares[x] for x in held}, threshold) == secret


def test_the_prime_is_one() -> None:
    # Miller-Rabin to the bases of the first primes: an independent look at the field's size.
    p = shamir.PRIME
    odd, twos = p - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
        x = pow(base, odd, p)
        chain = [x]
        for _ in range(twos - 1):
            chain.append(chain[-1] ** 2 % p)
        assert x == 1 or p - 1 in chain
    assert p > 2**256


@given(secrets_, secrets_)
def test_fewer_shares_fit_every_secret(secret: bytes, other: bytes) -> None:
    # With one share less than needed, each secret has exactly one polynomial through them.
    shares = shamir.split(secret, 3, [1, 2, 3])
    p = shamir.PRIME
    y1, y2 = (int.from_bytes(shares[x], "big") for x in (1, 2))
    y0 = int.from_bytes(other, "big")
    # Lagrange through (0, other), (1, y1), (2, y2), read at 3.
    y3 = (y0 - 3 * y1 + 3 * y2) % p
    made = {1: shares[1], 2: shares[2], 3: y3.to_bytes(33, "big")}
    assert shamir.combine(made, 3) == other


def test_a_share_looks_the_same_whatever_the_secret_is() -> None:
    low, high = bytes(32), b"\xff" * 32
    first = [
        sum(shamir.split(secret, 2, [1, 2])[1][1] >= 128 for _ in range(2000))
        for secret in (low, high)
    ]
    assert all(abs(count - 1000) < 150 for count in first)  # 6.7 standard deviations


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(PrivacyError, match="31 bytes"):
        shamir.split(bytes(31), 1, [1])
    with pytest.raises(PrivacyError, match="distinct"):
        shamir.split(bytes(32), 1, [1, 1])
    with pytest.raises(PrivacyError, match="distinct"):
        shamir.split(bytes(32), 1, [0])  # the point of the secret itself
    with pytest.raises(PrivacyError, match="threshold=3"):
        shamir.split(bytes(32), 3, [1, 2])
    with pytest.raises(PrivacyError, match="shares=1"):
        shamir.combine({1: bytes(33)}, 2)
    with pytest.raises(PrivacyError, match="no secret"):
        shamir.combine({1: (shamir.PRIME - 1).to_bytes(33, "big")}, 1)
