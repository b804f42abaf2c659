"""Partitions: disjoint, covering, reproducible, and never silently empty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.data import (
    PARTITIONS,
    TextDataset,
    balanced_groups,
    partition,
    train_test_split,
)
from fedsplit.data.partition import shards_of_groups
from fedsplit.errors import ConfigError, DataError

pytest.importorskip("flwr_datasets")


def make(n: int, classes: int, groups: int, seed: int = 0) -> TextDataset:
    rng = np.random.default_rng(seed)
    author = [f"author {g}" for g in [*range(groups), *rng.integers(0, groups, n - groups)]]
    return TextDataset(
        texts=tuple(f"text {row}" for row in range(n)),
        labels=tuple(rng.integers(0, classes, n).tolist()),
        label_names=tuple(f"class {k}" for k in range(classes)),
        columns={"author": tuple(author)},
        name="made",
    )


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from(sorted(PARTITIONS)),
    n=st.integers(60, 200),
    owners=st.integers(1, 4),
    classes=st.integers(1, 5),
    alpha=st.floats(1.0, 100.0),
    seed=st.integers(0, 2**63 - 1),
)
def test_disjoint_covering_deterministic(
    scheme: str, n: int, owners: int, classes: int, alpha: float, seed: int
) -> None:
    dataset = make(n, classes, 12)
    parts = partition(dataset, owners, scheme, seed=seed, alpha=alpha, column="author")
    assert len(parts) == owners
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    again = partition(dataset, owners, scheme, seed=seed, alpha=alpha, column="author")
    for part, same in zip(parts, again, strict=True):
        assert len(part) >= 1
        assert part.dtype == np.int64
        assert np.array_equal(part, same)
        assert np.all(np.diff(part) > 0)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
def test_another_seed_is_another_partition(scheme: str) -> None:
    dataset = make(200, 4, 10)
    first, second = (partition(dataset, 3, scheme, seed=s)[0].tolist() for s in (0, 1))
    assert first != second


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(part) for part in partition(make(103, 2, 5), 4, "iid", seed=0)]
    assert sorted(sizes) == [25, 26, 26, 26]


def test_dirichlet_is_more_uneven_for_smaller_alpha() -> None:
    dataset = make(2000, 5, 10)

    def skew(alpha: float) -> float:
        parts = partition(dataset, 5, "dirichlet", seed=3, alpha=alpha)
        counts = [dataset.select(part).label_counts() for part in parts]
        return float(np.mean([c.max() / c.sum() for c in counts]))

    assert skew(100.0) < 0.3 < 0.5 < skew(0.1)


def test_column_gives_each_group_one_owner_and_balances() -> None:
    dataset = make(400, 2, 30)
    parts = partition(dataset, 4, "column", seed=0, column="author")
    authors = [set(dataset.select(part).columns["author"]) for part in parts]
    assert sum(len(a) for a in authors) == len(set.union(*authors)) == 30
    largest = max(dataset.columns["author"].count(a) for a in set(dataset.columns["author"]))
    assert max(len(part) for part in parts) < 400 / 4 + largest


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 10), st.integers(0, 99))
def test_balanced_groups_bound(values: list[int], owners: int, seed: int) -> None:
    if len(set(values)) < owners:
        with pytest.raises(DataError, match=f"owners={owners}: must be <= {len(set(values))}"):
            balanced_groups(values, owners, seed)
        return
    owner_of = balanced_groups(values, owners, seed)
    loads = np.bincount(owner_of, minlength=owners)
    assert loads.min() >= 1
    assert loads.max() < len(values) / owners + max(values.count(v) for v in values)
    assert all(len(set(owner_of[np.array(values) == v])) == 1 for v in set(values))


def test_one_owner_for_each_group_when_there_are_as_many() -> None:
    dataset = make(100, 2, 6)
    parts = partition(dataset, 6, "column", seed=0, column="author")
    assert all(len(set(dataset.select(part).columns["author"])) == 1 for part in parts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=20, max_size=80), st.integers(6, 10), st.integers(0, 9))
def test_of_fewer_values_than_owners_each_owner_has_one(
    values: list[int], owners: int, seed: int
) -> None:
    owner_of = shards_of_groups(values, owners, seed)
    assert set(owner_of) == set(range(owners)) or min(map(values.count, set(values))) < owners
    sizes = np.bincount(owner_of, minlength=owners)
    for value in set(values):
        mine = set(owner_of[np.array(values) == value])
        assert mine.isdisjoint(owner_of[np.array(values) != value])
        assert max(sizes[o] for o in mine) - min(sizes[o] for o in mine) <= 1


def test_a_value_with_more_rows_has_more_owners() -> None:
    owner_of = shards_of_groups(["a"] * 600 + ["b"] * 300 + ["c"] * 100, 10, 0)
    assert [len(set(owner_of[s])) for s in (slice(600), slice(600, 900), slice(900, None))] == [
        6,
        3,
        1,
    ]
    assert (
        shards_of_groups(["a"] * 9 + ["b"], 5, 0) != shards_of_groups(["a"] * 9 + ["b"], 5, 1)
    ).any()


def test_owner_left_empty_is_named_with_all_sizes() -> None:
    dataset = TextDataset(("a",) * 20, (0,) * 20, ("only",))
    with pytest.raises(DataError, match=r"owner \d+: rows=\d+: must be >= 5; sizes of all owners:"):
        partition(dataset, 4, "dirichlet", seed=0, alpha=0.001, min_size=5)


@pytest.mark.parametrize("alpha", [1e-6, 1e6])
def test_dirichlet_at_the_bounds_of_alpha(alpha: float) -> None:
    parts = partition(make(300, 40, 3), 2, "dirichlet", seed=0, alpha=alpha)
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"owners": 0}, ConfigError, "owners=0"),
        ({"owners": 21}, DataError, "owners=21: must be <= 20"),
        ({"scheme": "shards"}, ConfigError, "must be one of column, column-shards, dirichlet, iid"),
        ({"scheme": "dirichlet", "alpha": 0.0}, ConfigError, "alpha=0.0"),
        ({"scheme": "dirichlet", "alpha": float("nan")}, ConfigError, "alpha=nan"),
        ({"scheme": "column", "column": "age"}, DataError, "column='age'.*found: author"),
        ({"scheme": "column", "column": "author", "owners": 6}, DataError, "must be <= 5"),
        ({"min_size": 0}, ConfigError, "min_size=0"),
    ],
)
def test_what_cannot_be_divided(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    asked: dict[str, object] = {"owners": 2, "scheme": "iid", "seed": 0} | arguments
    with pytest.raises(error, match=message):
        partition(make(20, 2, 5), **asked)  # type: ignore[arg-type]


def test_no_labels_no_dirichlet_but_iid() -> None:
    dataset = TextDataset(tuple("abcdef"), columns={"author": ("x", None, "y", "x", "y", "y")})
    with pytest.raises(DataError, match=r"labels=\(\)"):
        partition(dataset, 2, "dirichlet", seed=0)
    with pytest.raises(DataError, match="row 1: group=None"):
        partition(dataset, 2, "column", seed=0, column="author")
    assert [len(part) for part in partition(dataset, 2, "iid", seed=0)] == [3, 3]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=200),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_split_is_stratified_and_covers(labels: list[int], share: float, seed: int) -> None:
    indices = np.arange(len(labels))[::-1]
    wanted = min(max(round(share * len(labels)), 1), len(labels) - 1)
    train, test = train_test_split(indices, labels, share, seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    assert len(test) == wanted
    held_out = [labels[row] for row in test]
    for name in set(labels):
        assert abs(held_out.count(name) - share * labels.count(name)) < 1 + 1e-9
    again = train_test_split(indices[::-1], labels, share, seed)
    assert np.array_equal(again[0], train)
    assert np.array_equal(again[1], test)


def test_split_of_one_owners_rows_of_a_larger_set() -> None:
    labels = [0, 1] * 50
    owned = np.arange(40, 60)
    train, test = train_test_split(owned, labels, 0.2, 7)
    assert set(train) | set(test) == set(owned.tolist())
    assert sorted(labels[row] for row in test) == [0, 0, 1, 1]
    train, test = train_test_split(owned, (), 0.25, 7)
    assert (len(train), len(test)) == (15, 5)


@pytest.mark.parametrize(
    ("indices", "message"),
    [([1, 1, 2], "1 of 3 occur twice"), ([1, 9], "from 0 to 3"), ([1], "rows=1: must be >= 2")],
)
def test_split_of_wrong_rows(indices: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_test_split(indices, [0, 1, 0, 1], 0.5, 0)


def test_telemetry_is_off_and_nothing_is_left_behind() -> None:
    script = (
        "import os, sys\n"
        "from fedsplit.data import TextDataset, partition\n"
        "assert not {'datasets', 'flwr_datasets', 'pyarrow'} & set(sys.modules)\n"
        "d = TextDataset(tuple('abcd'), columns={'who': ('x', 'y', 'x', 'y')})\n"
        "partition(d, 2, 'column', seed=0, column='who')\n"
        "from flwr_datasets.common import telemetry\n"
        "assert telemetry.FLWR_TELEMETRY_ENABLED == '0'\n"
        "assert 'FLWR_TELEMETRY_ENABLED' not in os.environ\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FLWR_TELEMETRY_ENABLED"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
