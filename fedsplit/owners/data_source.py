"""Where an owner's texts come from: its own node config, or its share of a simulated federation."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from fedsplit.config import DataConfig, RunConfig
from fedsplit.data import (
    MIN_ROWS,
    LabelColumn,
    TextDataset,
    load_splits,
    partition,
    train_test_split,
)
from fedsplit.data.partition import BY_COLUMN, Indices
from fedsplit.errors import ConfigError, DataError, check
from fedsplit.owners.class_names import agreed_classes, keep_first
from fedsplit.owners.home import in_simulation
from fedsplit.owners.naming import owner_name
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.seeding import derive_seed
from fedsplit.tasks import task_of

__all__ = [
    "held_out",
    "own_data",
    "owner_name",
    "read_own",
    "reading",
    "simulated_data",
    "simulated_shares",
]

ShareKey: TypeAlias = tuple[DataConfig, int, bool, LabelColumn | None]
# Settings of the group data that say how a source is read, at a simulated owner and at a real one.
_READING = (
    "text_column",
    "label_column",
    "train_split",
    "test_split",
    "test_path",
    "delimiter",
    "header",
    "quotes",
)
SHARED_AT_ONCE = 2  # data sets that a process keeps shared out
_shared: dict[ShareKey, Shares] = {}
_sharing = threading.RLock()
TEST_SHARE = 0.2  # of an owner that names none in its node config


class Shares(Sequence[tuple[TextDataset, TextDataset]]):
    """(train, test) of every simulated owner, as rows of data that all of them share.

    An owner's texts are put together when they are asked for and kept nowhere, so that memory grows
    with the data and not with the owners.

    Args:
        train: rows to train on.
        rows: of each owner, ascending.
        test: rows to test on; None: each owner's own training rows of ``held_out``.
        held_out: of each owner, ascending.
    """

    def __init__(
        self,
        train: TextDataset,
        rows: Sequence[Indices],
        test: TextDataset | None,
        held_out: Sequence[Indices],
    ) -> None:
        self._train, self._test = train, test
        self._rows, self._held_out = rows, held_out

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, owner: int) -> tuple[TextDataset, TextDataset]: ...

    @overload
    def __getitem__(self, owner: slice) -> Shares: ...

    def __getitem__(self, owner: int | slice) -> tuple[TextDataset, TextDataset] | Shares:
        if isinstance(owner, slice):
            return Shares(self._train, self._rows[owner], self._test, self._held_out[owner])
        test = self._train if self._test is None else self._test
        return self._train.select(self._rows[owner]), test.select(self._held_out[owner])


def simulated_shares(
    config: DataConfig, seed: int, labelled: bool, labels: LabelColumn | None = None
) -> Shares:
    """Return (train, test) of every simulated owner; read and shared out once in a process.

    A source with its own test split is shared out to the owners too, so that the sum of the owners'
    results is the result on that split.

    Args:
        config: which data, and how it is shared out.
        seed: of the run.
        labelled: whether labels are read.
        labels: how they are read; none: one class per text.  Labels of classes that were not
            announced come after the others, for each owner to refuse its own
            (:meth:`~fedsplit.data.TextDataset.within`).

    Raises:
        DataError: unknown source or column, an owner without samples, and see ``load_splits``.
    """
    key = config, seed, labelled, labels
    with _sharing:  # of several threads that ask at once, one reads
        if key not in _shared:
            keep_shares(key, _share_out(*key))
        return _shared[key]


def keep_shares(key: ShareKey, shares: Shares) -> None:
    """Keep what :func:`simulated_shares` returns from now on, which another process has made."""
    while len(_shared) >= SHARED_AT_ONCE:
        _shared.pop(next(iter(_shared)))
    _shared[key] = shares


def _share_out(config: DataConfig, seed: int, labelled: bool, labels: LabelColumn | None) -> Shares:
    kind, asked = reading(config, labelled=labelled)
    train, test = load_splits(
        kind,
        **asked,
        columns=(config.column,) if config.partition in BY_COLUMN and config.column else (),
        limit=config.limit or None,
        seed=derive_seed(seed, "limit"),
        column=labels,
    )
    parts = partition(
        train,
        config.owners,
        config.partition,
        seed=derive_seed(seed, "partition"),
        alpha=config.alpha,
        column=config.column,
        min_size=MIN_ROWS if test is None else 1,
    )
    if test is not None:
        tests = partition(test, config.owners, "iid", seed=derive_seed(seed, "test"))
        return Shares(train, parts, test, tests)
    kinds = np.asarray(train.strata(), dtype=np.int64)
    pairs = [
        train_test_split(rows, kinds, config.test_share, derive_seed(seed, "test", owner))
        for owner, rows in enumerate(parts)
    ]
    return Shares(train, [keep for keep, _ in pairs], None, [out for _, out in pairs])


def share_key(config: RunConfig) -> ShareKey:
    """Return the arguments of :func:`simulated_shares` for a run's owners."""
    task = task_of(config)
    labels = task.column(task.announced(config.model))
    return config.data, config.seed, task.labelled, labels


def simulated_data(config: RunConfig, owner: int) -> tuple[TextDataset, TextDataset]:
    """Return one simulated owner's (train, test).

    Raises:
        DataError: a label is of none of the classes that the run announces; names the owner and
            the row; and as :func:`simulated_shares`.
    """
    train, test = simulated_shares(*share_key(config))[owner]
    names = task_of(config).announced(config.model)
    if not names:
        return train, test
    try:
        return train.within(names), test.within(names)
    except DataError as error:
        raise DataError(f"owner-{owner}: {error}") from None


def own_data(
    config: RunConfig,
    node_config: Mapping[str, object],
    secret: OwnerSecret,
    home: Path | None = None,
    *,
    labelled: bool = True,
) -> tuple[TextDataset, TextDataset]:
    """Return this owner's (train, test).

    Only in a simulation does the run config say which data, and which of it is held out; anywhere
    else it is the owner's node config (keys ``data-kind``, ``data-path``, ``test-share``, and those
    of the group ``data`` from ``text-column`` to ``quotes``): a server must not be able to name a
    file on the owner's disk, nor to move texts between training and evaluation, which different
    rules bound.

    Args:
        config: of the run; its data and seed are used in a simulation alone.
        node_config: the owner's own, from its SuperNode.
        secret: decides which texts are held out, see :func:`held_out`.
        home: the owner's folder, which keeps the first list of classes; none: nothing is kept.
        labelled: whether labels are read, where the task has any.

    Raises:
        ConfigError: no data named in the node config, ``test-share`` out of range, or classes that
            are not the agreed ones.
        DataError: a label outside them, and as :func:`simulated_shares`.
    """
    if in_simulation():
        index = node_config.get("partition-id")
        owners = config.data.owners
        if not isinstance(index, int) or not 0 <= index < owners:
            raise ConfigError(f"partition-id={index!r}: must be in [0, {owners})")
        if not labelled:
            return simulated_shares(config.data, config.seed, False)[index]
        return simulated_data(config, index)
    if not node_config.get("data-path"):
        raise ConfigError("node config data-path: must name this owner's own data")
    task = task_of(config)
    names = agreed_classes(config, node_config) if labelled else ()
    if home is not None:
        keep_first(home, node_config, names, task.terms_setting)
    labels = task.column(names) if labelled else None
    train, test = read_own(node_config, labels, labelled=labels is not None)
    train = train.within(names)
    if test is not None:
        return train, test.within(names)
    keep, out = held_out(train.texts, _test_share(node_config), secret)
    return train.select(keep), train.select(out)


def read_own(
    node_config: Mapping[str, object], labels: LabelColumn | None = None, *, labelled: bool
) -> tuple[TextDataset, TextDataset | None]:
    """Read what the node config names as this owner's data: (train, test), none without a test set.

    Args:
        node_config: the owner's own.
        labels: how labels are read; none: one class per text, whatever their names are.
        labelled: whether labels are read.

    Raises:
        ConfigError: a value of another type.
        DataError: see :func:`fedsplit.data.load_splits`.
    """
    kind, asked = reading(_own_reading(node_config), labelled=labelled)
    return load_splits(kind, **asked, column=labels)


def _own_reading(node_config: Mapping[str, object]) -> DataConfig:
    """Return what the node config says of the owner's data, as a group ``data``.

    Raises:
        ConfigError: a value of another type.
    """
    found: dict[str, Any] = {"kind": "file"}
    defaults = asdict(DataConfig())
    for name in ("kind", "path", *_READING):
        key = f"data-{name}" if name in ("kind", "path") else name.replace("_", "-")
        value = node_config.get(key, found.get(name, defaults[name]))
        kind = type(defaults[name])
        check(type(value) is kind, f"node config {key}", value, f"of type {kind.__name__}")
        found[name] = value
    return DataConfig(**found)


def reading(config: DataConfig, *, labelled: bool) -> tuple[str, dict[str, Any]]:
    """Return (kind, arguments of ``load_splits``): how settings say that data is read.

    Args:
        config: the group ``data``.
        labelled: whether labels are read.
    """
    asked = {name: getattr(config, name) for name in ("path", *_READING)}
    asked["split"] = asked.pop("train_split")
    if not labelled:
        asked["label_column"] = ""
    return config.kind, asked


def held_out(
    texts: Sequence[str], share: float, secret: OwnerSecret
) -> tuple[list[int], list[int]]:
    """Return (training, held-out) indices, each text's side by its own keyed hash.

    A text stays on its side for ever, in every run and however the owner's file grows; equal texts
    are on the same side.

    Args:
        texts: the owner's.
        share: expected share of the different texts that is held out, in (0, 1).
        secret: the owner's.

    Raises:
        DataError: fewer than two different texts.
    """
    mark = {t: float(secret.stream("fedsplit.data.split.v1", t).uniform(1)[0]) for t in texts}
    if len(mark) < MIN_ROWS:
        raise DataError(f"{len(mark)} different texts: must be >= {MIN_ROWS} to hold some out")
    # At least one text on each side, whatever the draws are.
    ordered = sorted(mark, key=lambda text: (mark[text], text))
    count = min(max(sum(m < share for m in mark.values()), 1), len(ordered) - 1)
    out = set(ordered[:count])
    sides: tuple[list[int], list[int]] = ([], [])
    for index, text in enumerate(texts):
        sides[text in out].append(index)
    return sides


def _test_share(node_config: Mapping[str, object]) -> float:
    share = node_config.get("test-share", TEST_SHARE)
    good = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < 1
    check(good, "node config test-share", share, "in (0, 1)")
    return float(share)  # type: ignore[arg-type]
