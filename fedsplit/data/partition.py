"""Who owns which rows: Flower Datasets' partitioners, from a seed, with every row owned once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.data.dataset import TextDataset
from fedsplit.data.labels import class_name
from fedsplit.data.table import Value
from fedsplit.errors import DataError, check
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed, numpy_generator

Indices = npt.NDArray[np.int64]

MIN_ROWS = 2  # of an owner that has to hold some out
MIN_ALPHA = 1e-6  # a Dirichlet draw stays finite between these
MAX_ALPHA = 1e6


def partition(
    dataset: TextDataset,
    owners: int,
    scheme: str,
    *,
    seed: int,
    alpha: float = 0.5,
    column: str = "",
    min_size: int = 1,
) -> list[Indices]:
    """Divide the rows among the owners.

    Each row has exactly one owner, each owner at least ``min_size`` rows, and the same arguments
    give the same division (for one version of flwr-datasets and NumPy).

    Args:
        dataset: the rows.
        owners: number of owners.
        scheme: a name in :data:`PARTITIONS`: ``iid`` (sizes differ by at most one), ``dirichlet``
            (each label's rows in proportions drawn from Dirichlet(alpha)), ``column`` (rows that
            share a value, such as an author, have the same owner; sizes are balanced) or
            ``column-shards`` (the same; of fewer values than owners, each owner has rows of one
            value, and a value with more rows has more owners).
        seed: the run's root seed.
        alpha: concentration for ``dirichlet``: 100 is nearly even, 0.1 gives most owners few of
            the labels.  Drawn anew up to ten times while an owner has fewer than ``min_size`` rows.
        column: name of the column for ``column`` and ``column-shards``.
        min_size: rows that every owner must have.

    Returns:
        One ascending array of row numbers for each owner.

    Raises:
        ConfigError: if the scheme is unknown or a number out of its range.
        DataError: if an owner is left with fewer than ``min_size`` rows (named, with all sizes),
            or labels or the column are missing.
    """
    check(owners >= 1, "owners", owners, ">= 1")
    check(min_size >= 1, "min_size", min_size, ">= 1 (rows)")
    check(MIN_ALPHA <= alpha <= MAX_ALPHA, "alpha", alpha, f"from {MIN_ALPHA} to {MAX_ALPHA}")
    divide = pick(PARTITIONS, scheme, "partition")
    if owners * min_size > len(dataset):
        raise DataError(
            f"owners={owners}: must be <= {len(dataset) // min_size}, as {dataset.name} has "
            f"{len(dataset)} rows and every owner must have {min_size}"
        )
    parts = divide(dataset, owners, seed, alpha, column, min_size)
    sizes = [len(part) for part in parts]
    for owner, size in enumerate(sizes):
        if size < min_size:
            raise DataError(
                f"{scheme} partition of {dataset.name}: owner {owner}: rows={size}: must be >= "
                f"{min_size}; sizes of all owners: {sizes}"
            )
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def train_test_split(
    indices: Sequence[int] | npt.NDArray[Any],
    labels: Sequence[int] | npt.NDArray[Any],
    share: float,
    seed: int,
) -> tuple[Indices, Indices]:
    """Hold out a share of one owner's rows, each label in proportion.

    Of each label's rows ``floor(share * count)`` are held out, then one more of the labels with the
    largest remainders until ``round(share * m)`` rows are, at least one and never all.  A label
    with a single row keeps it for training unless nothing else is left to hold out.

    Args:
        indices: (m,) row numbers of the owner.
        labels: kinds of label of the whole data set (:meth:`TextDataset.strata`), indexed by row
            number; empty: not stratified.
        share: share to hold out, between 0 and 1.
        seed: seed of the owner.

    Returns:
        Ascending row numbers to train and to test on; together they are ``indices``.

    Raises:
        ConfigError: if the share is out of its range.
        DataError: if there are fewer than :data:`MIN_ROWS` rows, or a row number occurs twice or
            has no label.
    """
    check(0.0 < share < 1.0, "share", share, "> 0 and < 1")
    rows = np.unique(np.asarray(indices, dtype=np.int64))
    if len(rows) != len(indices):
        raise DataError(f"indices: {len(indices) - len(rows)} of {len(indices)} occur twice")
    if len(labels) and len(rows) and not 0 <= rows[0] <= rows[-1] < len(labels):
        raise DataError(
            f"indices={rows[0]}..{rows[-1]}: must be from 0 to {len(labels) - 1}, the labelled rows"
        )
    if len(rows) < MIN_ROWS:
        raise DataError(f"rows={len(rows)}: must be >= {MIN_ROWS} to hold some out")
    wanted = min(max(round(share * len(rows)), 1), len(rows) - 1)
    order = numpy_generator(seed, "train_test_split").permutation(rows)
    own = np.asarray(labels, dtype=np.int64)[order] if len(labels) else np.zeros_like(order)
    names, counts = np.unique(own, return_counts=True)
    exact = share * counts
    quota = np.floor(exact).astype(np.int64)
    by_remainder = sorted(
        range(len(names)),
        key=lambda k: (quota[k] + 1 >= counts[k], quota[k] - exact[k], names[k]),
    )
    for position in by_remainder[: wanted - int(quota.sum())]:
        quota[position] += 1
    test = np.concatenate([order[own == name][:k] for name, k in zip(names, quota, strict=True)])
    return np.setdiff1d(rows, test), np.sort(test)


def balanced_groups(values: Sequence[Value], owners: int, seed: int) -> Indices:
    """Assign whole groups of equal values to owners, largest group first to the smallest owner.

    Values are equal as labels are: ``1``, ``1.0`` and ``"1"`` are one group.  An owner's size
    exceeds the mean by less than the largest group (Graham 1969, list scheduling).

    Args:
        values: (n,) the group of each row.
        owners: number of owners.
        seed: decides between groups of the same size.

    Returns:
        (n,) the owner of each row.

    Raises:
        DataError: if a value is missing, or there are fewer groups than owners.
    """
    rows = _rows_of(values)
    sizes = {name: len(found) for name, found in rows.items()}
    if len(sizes) < owners:
        found = ", ".join(f"{value!r}: {size}" for value, size in list(sizes.items())[:20])
        raise DataError(f"owners={owners}: must be <= {len(sizes)}, the number of groups ({found})")
    groups = sorted(sizes)
    order = numpy_generator(seed, "balanced_groups").permutation(len(groups))
    loads = [0] * owners
    owner_of: dict[str, int] = {}
    for position in sorted(order, key=lambda position: -sizes[groups[position]]):
        owner = loads.index(min(loads))
        owner_of[groups[position]] = owner
        loads[owner] += sizes[groups[position]]
    owners_of_rows = np.empty(len(values), dtype=np.int64)
    for name, owner in owner_of.items():
        owners_of_rows[rows[name]] = owner
    return owners_of_rows


def shards_of_groups(values: Sequence[Value], owners: int, seed: int) -> Indices:
    """Share out groups of equal values, each owner having rows of one group alone.

    Each group has one owner at least; every further one goes to the group with the most rows for
    each of its owners (highest averages, as seats are given to parties).  A group's rows are dealt
    evenly among its owners, and which owners these are is drawn.

    Args:
        values: (n,) the group of each row.
        owners: number of owners, at least that of the groups.
        seed: decides who has which group, and which of its rows.

    Returns:
        (n,) the owner of each row.

    Raises:
        DataError: a value is missing.
    """
    rows = _rows_of(values)
    counts = dict.fromkeys(sorted(rows), 1)
    for _ in range(owners - len(counts)):
        counts[max(counts, key=lambda name: len(rows[name]) / counts[name])] += 1
    generator = numpy_generator(seed, "shards_of_groups")
    free = generator.permutation(owners).tolist()
    owner_of = np.empty(len(values), dtype=np.int64)
    for name, count in counts.items():
        mine, free = free[:count], free[count:]
        for turn, row in enumerate(generator.permutation(rows[name])):
            owner_of[row] = mine[turn % count]
    return owner_of


def _rows_of(values: Sequence[Value]) -> dict[str, list[int]]:
    """Return the rows of each group of equal values.

    Raises:
        DataError: a value is missing.
    """
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        name = class_name(value)
        if name in ("", "nan"):
            raise DataError(f"row {row}: group={value!r}: must be a value")
        rows.setdefault(name, []).append(row)
    return rows


def _iid(
    dataset: TextDataset, owners: int, seed: int, alpha: float, column: str, min_size: int
) -> list[list[int]]:
    order = numpy_generator(seed, "partition", "iid").permutation(len(dataset))
    partitioner = _flower().IidPartitioner(num_partitions=owners)
    return _apply(partitioner, owners, {"row": order.tolist()})


def _dirichlet(
    dataset: TextDataset, owners: int, seed: int, alpha: float, column: str, min_size: int
) -> list[list[int]]:
    kinds = dataset.strata()
    if not kinds:
        raise DataError(f"{dataset.name}: labels=(): must be there for a dirichlet partition")
    rows = {"row": list(range(len(dataset))), "label": list(kinds)}
    for least in (min_size, 0):  # 0: the first draw, so that the caller can name its sizes
        partitioner = _flower().DirichletPartitioner(
            num_partitions=owners,
            partition_by="label",
            alpha=alpha,
            min_partition_size=least,
            self_balancing=False,
            seed=derive_seed(seed, "partition", "dirichlet"),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one warning for each draw that is refused
            try:
                return _apply(partitioner, owners, rows)
            except ValueError as error:
                reason = error
    raise DataError(f"dirichlet partition of {dataset.name}: {reason}")


def _column(
    dataset: TextDataset, owners: int, seed: int, alpha: float, column: str, min_size: int
) -> list[list[int]]:
    return _by_owner(balanced_groups(_values(dataset, column), owners, seed), owners)


def _column_shards(
    dataset: TextDataset, owners: int, seed: int, alpha: float, column: str, min_size: int
) -> list[list[int]]:
    values = _values(dataset, column)
    share = shards_of_groups if len(_rows_of(values)) < owners else balanced_groups
    return _by_owner(share(values, owners, seed), owners)


def _values(dataset: TextDataset, column: str) -> Sequence[Value]:
    if column not in dataset.columns:
        found = ", ".join(sorted(dataset.columns)) or "none"
        raise DataError(f"column={column!r}: must be a column of {dataset.name}; found: {found}")
    return dataset.columns[column]


def _by_owner(owner_of: Indices, owners: int) -> list[list[int]]:
    partitioner = _flower().GroupedNaturalIdPartitioner(
        partition_by="owner", group_size=1, sort_unique_ids=True
    )
    rows = {"row": list(range(len(owner_of))), "owner": owner_of.tolist()}
    return _apply(partitioner, owners, rows)


PARTITIONS: dict[str, Callable[[TextDataset, int, int, float, str, int], list[list[int]]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "column": _column,
    "column-shards": _column_shards,
}

BY_COLUMN = ("column", "column-shards")
"""The schemes that need a column beside the labels."""


def _apply(partitioner: Any, owners: int, rows: dict[str, list[int]]) -> list[list[int]]:
    """Return the ``row`` entries of each partition."""
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict(rows)
    return [list(partitioner.load_partition(owner)["row"]) for owner in range(owners)]


def _flower() -> Any:
    """Return Flower Datasets' partitioners, its telemetry switched off.

    Only ``FederatedDataset`` and plotting report to Flower; the partitioners used here do not.
    The switch is read once, at the first import, so it also holds for the other two.
    """
    with _variable("FLWR_TELEMETRY_ENABLED", "0"):
        try:
            import flwr_datasets.partitioner
        except ImportError as error:
            raise DataError(f"flwr-datasets: {error}: pip install 'fedsplit[data]'") from None
    return flwr_datasets.partitioner


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable and put it back afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
