"""Where an owner's texts come from: its own node config, or its share of a simulated federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedsplit.config import DataConfig
from fedsplit.data import TextDataset, load_splits, partition, train_test_split
from fedsplit.errors import ConfigError, DataError, check
from fedsplit.owners.home import in_simulation
from fedsplit.owners.naming import owner_name
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.seeding import derive_seed

__all__ = ["held_out", "own_data", "owner_name", "simulated_shares"]

TEST_SHARE = 0.2  # of an owner that names none in its node config


@lru_cache(maxsize=2)
def simulated_shares(
    config: DataConfig, seed: int, labelled: bool
) -> tuple[tuple[TextDataset, TextDataset], ...]:
    """Return (train, test) of every simulated owner.

    A source with its own test split is shared out to the owners too, so that the sum of the owners'
    results is the result on that split.

    Raises:
        DataError: unknown source or column, an owner without samples, and see ``load_splits``.
    """
    train, test = load_splits(
        config.kind,
        path=config.path,
        text_column=config.text_column,
        label_column=config.label_column if labelled else "",
        columns=(config.column,) if config.partition == "column" and config.column else (),
        limit=config.limit or None,
        seed=derive_seed(seed, "limit"),
    )
    parts = partition(
        train,
        config.owners,
        config.partition,
        seed=derive_seed(seed, "partition"),
        alpha=config.alpha,
        column=config.column,
        min_size=2,
    )
    shares = []
    if test is None:
        for owner, indices in enumerate(parts):
            keep, held_out = train_test_split(
                indices, train.labels, config.test_share, derive_seed(seed, "test", owner)
            )
            shares.append((train.select(keep), train.select(held_out)))
    else:
        tests = partition(test, config.owners, "iid", seed=derive_seed(seed, "test"))
        shares = [(train.select(a), test.select(b)) for a, b in zip(parts, tests, strict=True)]
    return tuple(shares)


def own_data(
    config: DataConfig,
    seed: int,
    labelled: bool,
    node_config: Mapping[str, object],
    secret: OwnerSecret,
) -> tuple[TextDataset, TextDataset]:
    """Return this owner's (train, test).

    Only in a simulation does the run config say which data, and which of it is held out; anywhere
    else it is the owner's node config (keys ``data-kind``, ``data-path``, ``text-column``,
    ``label-column``, ``test-share``): a server must not be able to name a file on the owner's disk,
    nor to move texts between training and evaluation, which different rules bound.

    Args:
        config: of the run; used in a simulation alone.
        seed: of the run; used in a simulation alone.
        labelled: whether labels are read.
        node_config: the owner's own, from its SuperNode.
        secret: decides which texts are held out, see :func:`held_out`.

    Raises:
        ConfigError: no data named in the node config, or ``test-share`` out of range.
        DataError: as :func:`simulated_shares`.
    """
    if in_simulation():
        index = node_config.get("partition-id")
        if not isinstance(index, int) or not 0 <= index < config.owners:
            raise ConfigError(f"partition-id={index!r}: must be in [0, {config.owners})")
        return simulated_shares(config, seed, labelled)[index]
    path = str(node_config.get("data-path", ""))
    if not path:
        raise ConfigError("node config data-path: must name this owner's own data")
    train, test = load_splits(
        str(node_config.get("data-kind", "file")),
        path=path,
        text_column=str(node_config.get("text-column", "text")),
        label_column=str(node_config.get("label-column", "label")) if labelled else "",
    )
    if test is not None:
        return train, test
    keep, out = held_out(train.texts, _test_share(node_config), secret)
    return train.select(keep), train.select(out)


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
    if len(mark) < 2:
        raise DataError(f"{len(mark)} different texts: must be >= 2 to hold some out")
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
