"""Simulated owners' data as rows that they share: the same texts, and no memory for each owner."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.config import DataConfig, RunConfig
from fedsplit.data import load_splits, partition, train_test_split
from fedsplit.errors import DataError
from fedsplit.owners import data_source
from fedsplit.owners.data_source import (
    Shares,
    keep_shares,
    share_key,
    simulated_data,
    simulated_shares,
)
from fedsplit.seeding import derive_seed
from tests.tiny_models import save_texts

SEED, OWNERS = 3, 5


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    path = save_texts(tmp_path / "texts.jsonl", 60)
    return DataConfig(kind="file", path=str(path), owners=OWNERS, partition="iid")


@pytest.mark.parametrize("own_test_set", [False, True])
def test_every_owner_has_the_rows_that_partition_and_split_give(
    config: DataConfig, tmp_path: Path, own_test_set: bool
) -> None:
    if own_test_set:
        other = save_texts(tmp_path / "other.jsonl", 20, seed=9)
        config = DataConfig(**{**vars(config), "test_path": str(other)})
    shares = simulated_shares(config, SEED, True)

    train, test = load_splits(
        "file", path=config.path, test_path=config.test_path, seed=derive_seed(SEED, "limit")
    )
    rows = partition(train, OWNERS, "iid", seed=derive_seed(SEED, "partition"))
    for owner, (mine, held_out) in enumerate(shares):
        if test is None:
            pair = train_test_split(
                rows[owner], train.labels, config.test_share, derive_seed(SEED, "test", owner)
            )
            wanted = train.select(pair[0]), train.select(pair[1])
        else:
            tests = partition(test, OWNERS, "iid", seed=derive_seed(SEED, "test"))
            wanted = train.select(rows[owner]), test.select(tests[owner])
        assert (mine.digest, held_out.digest) == (wanted[0].digest, wanted[1].digest)
    assert len(shares) == OWNERS
    assert shares[-1][0].texts == shares[OWNERS - 1][0].texts
    assert [a.texts for a, _ in shares[1:3]] == [shares[1][0].texts, shares[2][0].texts]
    with pytest.raises(IndexError):
        shares[OWNERS]


def test_data_is_read_once_however_many_owners_ask_at_once(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counted(*args: Any, **options: Any) -> Any:
        read.append(1)
        return load_splits(*args, **options)

    monkeypatch.setattr(data_source, "load_splits", counted)
    found: list[Shares] = []
    threads = [
        threading.Thread(target=lambda: found.append(simulated_shares(config, SEED + 1, True)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 1
    assert len({id(shares) for shares in found}) == 1


def test_shares_that_another_process_made_are_not_made_again(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunConfig(data=config, seed=SEED + 2)
    made = simulated_shares(*share_key(run))
    data_source._shared.clear()
    keep_shares(share_key(run), made)
    monkeypatch.setattr(data_source, "load_splits", None)
    train, test = simulated_data(run, 1)
    assert (train.digest, test.digest) == (made[1][0].digest, made[1][1].digest)


def test_a_few_data_sets_are_kept_and_no_more(config: DataConfig) -> None:
    for seed in range(5):
        simulated_shares(config, 100 + seed, True)
    assert len(data_source._shared) <= data_source.SHARED_AT_ONCE


def test_owners_share_the_texts_themselves(config: DataConfig) -> None:
    shares = simulated_shares(config, SEED, True)
    whole = {id(text) for text in shares._train.texts}
    assert {id(text) for train, test in shares for text in (*train.texts, *test.texts)} <= whole


def test_too_many_owners_are_refused(config: DataConfig) -> None:
    many = DataConfig(**{**vars(config), "owners": 31})
    with pytest.raises(DataError, match="owners=31: must be <= 30"):
        simulated_shares(many, SEED, True)


def test_held_out_rows_do_not_depend_on_how_labels_are_given() -> None:
    labels = [0, 1, 2] * 8
    rows = np.arange(3, 20)
    one, other = (train_test_split(rows, x, 0.3, 5) for x in (labels, np.asarray(labels)))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
