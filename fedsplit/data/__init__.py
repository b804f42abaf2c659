"""Texts and labels of the owners: where they come from, and who has which.

Layer 1.  Nothing is read, downloaded or imported from ``datasets`` until it is asked for.

Examples:
    >>> from fedsplit.data import TextDataset, train_test_split
    >>> data = TextDataset(("good", "bad", "fine", "poor"), (1, 0, 1, 0), ("no", "yes"))
    >>> train, test = train_test_split(range(4), data.labels, 0.5, seed=0)
    >>> len(data.select(train)), len(data.select(test))
    (2, 2)
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.data import conversations, docstrings, files, hub
from fedsplit.data.batches import epoch_batches
from fedsplit.data.dataset import TextDataset, build, label_names
from fedsplit.data.partition import PARTITIONS, balanced_groups, partition, train_test_split
from fedsplit.data.table import Request, Source, Table, Value
from fedsplit.errors import DataError, check
from fedsplit.registry import pick
from fedsplit.seeding import numpy_generator

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "Request",
    "Source",
    "Table",
    "TextDataset",
    "Value",
    "balanced_groups",
    "docstrings_are_public",
    "epoch_batches",
    "load_dataset",
    "load_splits",
    "partition",
    "train_test_split",
]

DATASETS: dict[str, Source] = {
    "docstrings": docstrings.SOURCE,
    "file": files.SOURCE,
    "hub": hub.SOURCE,
    "instructions": conversations.SOURCE,
}
"""kind -> its source; a new kind is a file and a row here."""

HELD_OUT = ("test", "dev", "valid", "validation", "val")


def docstrings_are_public(kind: str) -> bool:
    """Return whether the interpreter's docstrings are public text beside owners' data of a kind."""
    return kind not in DATASETS or not DATASETS[kind].public


def load_dataset(
    kind: str,
    *,
    path: str = "",
    text_column: str = "text",
    label_column: str = "label",
    split: str = "train",
    columns: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    passage_words: int = 128,
) -> TextDataset:
    """Load one split of a data set.

    Labels of any type become indices into their sorted names (sorted as numbers when all of them
    are integers); names are taken from all splits, so that a label has the same index in each.

    Args:
        kind: a name in :data:`DATASETS`.
        path: see :func:`fedsplit.data.files.read` and :func:`fedsplit.data.hub.read`; empty for
            ``docstrings``.
        text_column: column with the texts.
        label_column: column with the labels; empty for language modelling (no labels).
        split: name of the split.
        columns: further columns to keep, for partitions or attacks on private attributes.
        limit: keep at most this many rows, drawn without replacement, in their order; none: all.
        seed: decides which rows ``limit`` keeps; nothing else.
        passage_words: words in a passage, for plain text only.

    Raises:
        ConfigError: if the kind is unknown or a number out of its range.
        DataError: if something is missing or malformed.
    """
    request = Request(path, text_column, label_column, tuple(columns), passage_words)
    return _load(pick(DATASETS, kind, "dataset"), request, (split,), limit, seed)[0]


def load_splits(
    kind: str,
    *,
    path: str = "",
    text_column: str = "text",
    label_column: str = "label",
    split: str = "train",
    test_split: str = "",
    columns: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    passage_words: int = 128,
) -> tuple[TextDataset, TextDataset | None]:
    """Load the split to train on and the one to test on; arguments as in :func:`load_dataset`.

    ``limit`` bounds the rows of each split; ``test_split`` is the name of the one to test on, and
    the first of :data:`HELD_OUT` that there is where it is empty.

    Returns:
        Both splits with the same label names; none for the second where there is none: hold out a
        part of each owner's rows with :func:`train_test_split`.

    Raises:
        ConfigError: if the kind is unknown or a number out of its range.
        DataError: if something is missing or malformed.
    """
    source = pick(DATASETS, kind, "dataset")
    request = Request(path, text_column, label_column, tuple(columns), passage_words)
    if not test_split:
        there = source.splits(request)
        test_split = next((name for name in HELD_OUT if name in there and name != split), "")
    wanted = (split, test_split) if test_split else (split,)
    train, *test = _load(source, request, wanted, limit, seed)
    return train, test[0] if test else None


def _load(
    source: Source, request: Request, wanted: tuple[str, ...], limit: int | None, seed: int
) -> list[TextDataset]:
    """Load the wanted splits with label names from all splits."""
    check(limit is None or limit >= 1, "limit", limit, ">= 1 (rows) or none")
    there = source.splits(request)
    for split in wanted:
        if split not in there:
            name = request.path or "this data set"
            raise DataError(f"split={split!r}: must be one of {', '.join(there)} in {name}")
    tables = {split: source.read(request, split) for split in wanted}
    needs_names = request.label_column and not tables[wanted[0]].label_names
    others = [split for split in there if split not in tables] if needs_names else []
    names = label_names([*tables.values(), *(source.read(request, split) for split in others)])
    return [_limited(build(tables[split], names), limit, seed) for split in wanted]


def _limited(dataset: TextDataset, limit: int | None, seed: int) -> TextDataset:
    if limit is None or limit >= len(dataset):
        return dataset
    rows = numpy_generator(seed, "limit").permutation(len(dataset))[:limit]
    return dataset.select(sorted(rows.tolist()))
