"""The owner's secret and its streams: who can read it, what follows from it."""

from __future__ import annotations

import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secret import OwnerSecret, SecretStream, encode_context

PARTS = st.lists(st.binary(max_size=6) | st.text(max_size=6) | st.integers(), max_size=4)


@settings(deadline=None)
@given(PARTS, PARTS)
def test_contexts_encode_without_collision(a: list[bytes | str | int], b: list[bytes | str | int]):
    same = [(type(x), x) for x in a] == [(type(x), x) for x in b]

    assert (encode_context(*a) == encode_context(*b)) == same


def test_context_refuses_other_types():
    with pytest.raises(PrivacyError, match="context\\[1\\]=bool"):
        encode_context("a", True)


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8))
def test_stream_is_the_same_however_it_is_cut(chunks: list[int]):
    whole = SecretStream(bytes(32)).normal(sum(chunks))
    stream = SecretStream(bytes(32))

    cut = np.concatenate([stream.normal(n) for n in chunks])

    assert np.array_equal(whole, cut)


def test_stream_has_known_values():
    """Bit for bit for ever: a change here would draw new noise for samples already sent."""
    stream = OwnerSecret.for_simulation(7, "owner-0").stream("context", b"\x00", 1)

    assert stream.uniform(2).tolist() == [0.5330714655459, 0.007416951297470775]
    assert stream.normal(1)[0] == pytest.approx(-0.6804366110599571, rel=1e-14)
    assert stream.gamma(384.0, 1)[0] == pytest.approx(382.45476151076826, rel=1e-12)


def test_uniforms_are_uniform_and_never_reach_the_ends():
    u = SecretStream(b"u" * 32).uniform(200_000)

    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert np.array_equal(np.round(u * 2**53) % 2, np.ones_like(u))  # odd multiples of 2**-53


def test_extreme_words_stay_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch):
    class Ends:
        def update(self, data: bytes) -> bytes:
            return bytes(8) + b"\xff" * 8

    stream = SecretStream(bytes(32))
    monkeypatch.setattr(stream, "_encryptor", Ends())

    low, high = stream.uniform(2)

    assert 0 < low < 1e-15
    assert high == 1 - 2**-53


def test_normals_are_normal():
    x = SecretStream(b"n" * 32).normal((500, 400))

    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("shape", [1.0, 2.0, 64.0, 384.0, 1024.0, 4096.0])
def test_gamma_is_the_inverse_distribution_function(shape: float):
    u = SecretStream(b"g" * 32).uniform(5_000)

    x = SecretStream(b"g" * 32).gamma(shape, 5_000)

    assert np.allclose(x, stats.gamma.ppf(u, shape), rtol=1e-12)
    assert np.allclose(stats.gamma.cdf(x, shape), u, rtol=1e-9)
    assert stats.kstest(x, stats.gamma(shape).cdf).pvalue > 1e-3


def test_other_contexts_secrets_and_owners_are_independent():
    a, b = OwnerSecret.for_simulation(0, "a"), OwnerSecret.for_simulation(0, "b")
    streams = [a.stream("x"), a.stream("y"), b.stream("x"), OwnerSecret(bytes(32)).stream("x")]

    draws = np.stack([s.normal(20_000) for s in streams])

    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)


def test_secret_is_created_private_and_kept(tmp_path: Path):
    path = tmp_path / "home" / "noise.key"

    first = OwnerSecret.load_or_create(path).stream("x").uniform(4)
    again = OwnerSecret.load_or_create(path).stream("x").uniform(4)

    assert np.array_equal(first, again)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == 32
    assert [p.name for p in path.parent.iterdir()] == ["noise.key"]  # no draft left behind


def test_creators_at_once_agree(tmp_path: Path):
    path = tmp_path / "noise.key"
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda _: OwnerSecret.load_or_create(path), range(16)))

    assert len({s.stream("x").uniform(1)[0] for s in secrets}) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_readable_secret_is_refused(tmp_path: Path, mode: int):
    path = tmp_path / "noise.key"
    OwnerSecret.load_or_create(path)
    path.chmod(mode)

    with pytest.raises(PrivacyError, match=f"mode={mode:04o}: must be 0600"):
        OwnerSecret.load_or_create(path)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_secret_of_wrong_length_is_refused(tmp_path: Path, length: int):
    path = tmp_path / "noise.key"
    path.touch(mode=0o600)
    path.write_bytes(bytes(length))

    with pytest.raises(PrivacyError, match=f"length={length}: must be 32 bytes"):
        OwnerSecret.load_or_create(path)


def test_directory_in_place_of_secret_is_refused(tmp_path: Path):
    with pytest.raises((PrivacyError, IsADirectoryError)):
        OwnerSecret.load_or_create(tmp_path)


def test_secret_is_never_shown_or_serialised():
    secret = OwnerSecret(b"S" * 32)

    assert "S" * 4 not in repr(secret) + str(secret) + f"{secret}"
    with pytest.raises(PrivacyError, match="must not be copied"):
        pickle.dumps(secret)


def test_os_randomness_is_used(tmp_path: Path):
    a = OwnerSecret.load_or_create(tmp_path / "a").stream("x").uniform(1)
    b = OwnerSecret.load_or_create(tmp_path / "b").stream("x").uniform(1)

    assert a != b
    assert os.path.exists(tmp_path / "a")
