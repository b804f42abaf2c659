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

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedsplit.data import (
    choices,
    conversations,
    docstring_questions,
    docstrings,
    files,
    hub,
    tagged,
)
from fedsplit.data.batches import balanced_batches, epoch_batches
from fedsplit.data.dataset import TextDataset, build, check_text
from fedsplit.data.label_column import ClassColumn, LabelColumn
from fedsplit.data.labels import (
    names_digest,
    numerals,
    parse_class_names,
)
from fedsplit.data.partition import (
    MIN_ROWS,
    PARTITIONS,
    balanced_groups,
    partition,
    train_test_split,
)
from fedsplit.data.split_files import canonical
from fedsplit.data.table import SEPARATOR, MissingColumn, Request, Source, Table, Value
from fedsplit.errors import DataError, check
from fedsplit.registry import pick
from fedsplit.seeding import numpy_generator

__all__ = [
    "DATASETS",
    "MIN_ROWS",
    "PARTITIONS",
    "SEPARATOR",
    "ClassColumn",
    "LabelColumn",
    "Request",
    "Source",
    "Table",
    "TextDataset",
    "Value",
    "balanced_batches",
    "balanced_groups",
    "docstrings_are_public",
    "epoch_batches",
    "load_dataset",
    "load_splits",
    "names_digest",
    "numerals",
    "only_split",
    "parse_class_names",
    "partition",
    "read_rows",
    "train_test_split",
]

DATASETS: dict[str, Source] = {
    "choices": choices.SOURCE,
    "docstrings": docstrings.SOURCE,
    "docstring-questions": docstring_questions.SOURCE,
    "file": files.SOURCE,
    "hub": hub.SOURCE,
    "instructions": conversations.SOURCE,
    "tagged": tagged.SOURCE,
}
"""kind -> its source; a new kind is a file and a row here."""

HELD_OUT = ("test", "dev", "valid", "validation", "val", "eval")

log = logging.getLogger(__name__)


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
    label_names: Sequence[str] = (),
    classes: int = 0,
    delimiter: str = "",
    header: bool = True,
    quotes: bool = True,
    column: LabelColumn | None = None,
) -> TextDataset:
    """Load one split of a data set.

    Labels of any type become indices into ``label_names``, by value (:mod:`fedsplit.data.labels`).
    Where none are given, names are taken from all splits, so that a label has the same index in
    each; they differ from those of another party's data set, so parties must agree on a list.

    Args:
        kind: a name in :data:`DATASETS`.
        path: see :func:`fedsplit.data.files.read` and :func:`fedsplit.data.hub.read`; empty for
            ``docstrings``.
        text_column: column with the texts, or several with commas
            (:func:`fedsplit.data.table.join_parts`).
        label_column: column with the labels; empty for language modelling (no labels).
        split: name of the split.
        columns: further columns to keep, for partitions or attacks on private attributes.
        limit: keep at most this many rows, drawn without replacement, in their order; none: all.
        seed: decides which rows ``limit`` keeps; nothing else.
        passage_words: words in a passage, for plain text only.
        label_names: the agreed classes, in order; a label of no such name gets one after them,
            which :meth:`TextDataset.within` refuses.
        classes: number of classes where nobody named them: labels that are all integers below it
            are then their own indices.
        delimiter, header, quotes: see :func:`fedsplit.data.delimited.read_delimited`.
        column: how labels are read; none: one class per text, of ``label_names`` and ``classes``.

    Raises:
        ConfigError: if the kind is unknown or a number out of its range.
        DataError: if something is missing or malformed.
    """
    source = pick(DATASETS, kind, "dataset")
    request = Request(
        path, text_column, label_column, tuple(columns), passage_words, delimiter, header, quotes
    )
    column = column or ClassColumn(tuple(label_names), classes)
    tables = [_read(source, request, split)]
    names = _names(source, request, tables, {split}, column)
    return _limited(build(tables[0], names, column), limit, seed)


def load_splits(
    kind: str,
    *,
    path: str = "",
    text_column: str = "text",
    label_column: str = "label",
    split: str = "train",
    test_split: str = "",
    test_path: str = "",
    columns: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    passage_words: int = 128,
    label_names: Sequence[str] = (),
    classes: int = 0,
    delimiter: str = "",
    header: bool = True,
    quotes: bool = True,
    column: LabelColumn | None = None,
) -> tuple[TextDataset, TextDataset | None]:
    """Load the split to train on and the one to test on; arguments as in :func:`load_dataset`.

    ``limit`` bounds the rows of each split.  The rows to test on are those of ``test_path``, of
    ``test_split``, of both; with neither, of the first of :data:`HELD_OUT` whose labels are there
    (a split whose labels are kept back, or missing, is left out with a warning).

    Returns:
        Both splits with the same label names; none for the second where there is none: hold out a
        part of each owner's rows with :func:`train_test_split`.

    Raises:
        ConfigError: if the kind is unknown or a number out of its range.
        DataError: if something is missing or malformed.
    """
    source = pick(DATASETS, kind, "dataset")
    request = Request(
        path, text_column, label_column, tuple(columns), passage_words, delimiter, header, quotes
    )
    column = column or ClassColumn(tuple(label_names), classes)
    tables, read = [_read(source, request, split)], {split}
    if test_path:
        own = replace(request, path=test_path)
        tables.append(_read(source, own, test_split or _only_split(source, own)))
    elif test_split:
        tables.append(_read(source, request, test_split))
        read.add(test_split)
    else:
        for name in HELD_OUT:
            if name == split or name not in source.splits(request):
                continue
            read.add(name)
            table = _labelled(source, request, name, column)
            if table is not None:
                tables.append(table)
                break
            log.warning("%s: split %r has no labels: it is not tested on", path, name)
    names = _names(source, request, tables, read, column)
    train, *test = [_limited(build(table, names, column), limit, seed) for table in tables]
    return train, test[0] if test else None


def read_rows(
    path: str,
    text_column: str = "text",
    *,
    words: bool = False,
    delimiter: str = "",
    header: bool = True,
) -> Table:
    """Read a file's texts for inference: every row, blank ones too, each line of plain text.

    Training leaves blank rows out and joins lines to passages; whoever asks for answers wants one
    for each row.

    Args:
        path: of one file.
        text_column: column with the texts.
        words: whether it is words that are asked about: CoNLL files and lists are then read too.
        delimiter: of a CSV file; empty: found.
        header: whether a CSV file begins with its columns' names.

    Raises:
        DataError: ``path`` is a folder of splits, or something is missing or malformed.
    """
    request = Request(path, text_column, "", passage_words=0, delimiter=delimiter, header=header)
    listed = text_column in tagged.WORDS or Path(path).suffix.lower() in tagged.CONLL[:-1]
    source = DATASETS["tagged" if words and listed else "file"]
    splits = source.splits(request)
    if splits != ("train",):
        raise DataError(f"{path}: must be one file, not a folder with splits {', '.join(splits)}")
    table = source.read(request, "train")
    for place, text in zip(table.places, table.texts, strict=True):
        if text.strip():
            check_text(place, text)
    return table


def _read(source: Source, request: Request, split: str) -> Table:
    there = source.splits(request)
    wanted = split if split in there else canonical(split)
    if wanted not in there:
        name = request.path or "this data set"
        raise DataError(f"split={split!r}: must be one of {', '.join(there)} in {name}")
    return source.read(request, wanted)


def only_split(kind: str, path: str) -> str:
    """Return the split of a path that was named to be tested on: the one to test on, or the only.

    Raises:
        DataError: there are several and none of :data:`HELD_OUT`, or nothing can be read.
    """
    return _only_split(pick(DATASETS, kind, "dataset"), Request(path))


def _only_split(source: Source, request: Request) -> str:
    """Return the split of a path that was named to be tested on."""
    there = source.splits(request)
    found = [name for name in HELD_OUT if name in there] or there
    if len(there) > 1 and found == there:
        raise DataError(f"{request.path}: must name one of the splits {', '.join(there)}")
    return found[0]


def _names(
    source: Source, request: Request, tables: list[Table], read: set[str], column: LabelColumn
) -> tuple[str, ...]:
    """Return the names of all classes: of all splits, where nothing fixes them."""
    if not request.label_column:
        return ()

    def more() -> list[Table]:
        rest = [name for name in source.splits(request) if name not in read]
        found = (_labelled(source, request, name, column) for name in rest)
        return [table for table in found if table is not None]

    return column.names(tables, more)


def _labelled(source: Source, request: Request, split: str, column: LabelColumn) -> Table | None:
    """Return a split that nobody asked for by name; none where it has no labels."""
    try:
        table = source.read(request, split)
    except MissingColumn:
        source.read(replace(request, label_column=""), split)  # it is the labels' column
        return None
    return table if not request.label_column or column.is_labelled(table) else None


def _limited(dataset: TextDataset, limit: int | None, seed: int) -> TextDataset:
    check(limit is None or limit >= 1, "limit", limit, ">= 1 (rows) or none")
    if limit is None or limit >= len(dataset):
        return dataset
    rows = numpy_generator(seed, "limit").permutation(len(dataset))[:limit]
    return dataset.select(sorted(rows.tolist()))
