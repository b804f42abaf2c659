"""Batches of an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.data import epoch_batches
from fedsplit.errors import ConfigError, DataError


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 700),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    bucket=st.booleans(),
)
def test_every_slot_exactly_once(
    n: int, batch_size: int, seed: int, epoch: int, bucket: bool
) -> None:
    lengths = np.random.default_rng(n).integers(1, 64, n) if bucket else None
    batches = epoch_batches(n, batch_size, seed, epoch, lengths)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size
    assert len(batches) == -(-n // batch_size)
    again = epoch_batches(n, batch_size, seed, epoch, lengths)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert all(batch.dtype == np.int64 for batch in batches)


def test_epochs_and_seeds_differ() -> None:
    pairs = ((0, 0), (0, 1), (1, 0))
    orders = [np.concatenate(epoch_batches(100, 7, s, e)).tolist() for s, e in pairs]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_bucketing_saves_padding() -> None:
    lengths = np.random.default_rng(0).geometric(0.05, 4000)

    def padded(batches: list[np.ndarray]) -> int:
        return sum(int(lengths[batch].max()) * len(batch) for batch in batches)

    plain = padded(epoch_batches(4000, 32, 0, 0))
    bucketed = padded(epoch_batches(4000, 32, 0, 0, lengths))
    assert bucketed < 1.25 * lengths.sum() < plain


def test_bucketed_batches_come_in_no_order_of_length() -> None:
    lengths = np.arange(3200)
    longest = [int(batch.max()) for batch in epoch_batches(3200, 32, 0, 0, lengths)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("n", "batch_size", "epoch", "name"),
    [(0, 1, 0, "n=0"), (1, 0, 0, "batch_size=0"), (1, 1, -1, "epoch=-1")],
)
def test_bounds(n: int, batch_size: int, epoch: int, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        epoch_batches(n, batch_size, 0, epoch)


def test_one_length_for_each_sample() -> None:
    with pytest.raises(DataError, match=r"shape=\(2,\): must be \(3,\)"):
        epoch_batches(3, 1, 0, 0, [1, 2])
