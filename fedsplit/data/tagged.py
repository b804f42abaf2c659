"""Texts whose every word has a tag: CoNLL files, and rows with lists of words and tags.

| form | words and tags |
| --- | --- |
| ``.conll``, ``.iob``, ``.bio``, ``.txt`` | a word on a line with its tag, columns apart by a tab (or by spaces, where no tab is), a blank line between texts |
| ``.jsonl``, ``.json``, ``.parquet``, hub | a row with a list of words and one of tags |
| ``.csv``, ``.tsv`` | the same, lists as JSON (or as Python prints them), or words and tags apart by spaces |

The usual column names (``text``, ``label``) stand for a CoNLL file's first and last column, and for
``tokens`` and ``tags`` of rows (or ``words``, ``ner_tags``, ``labels``).  Other names are taken as
they are; columns of a CoNLL file go by their numbers from 1.

A text is its words joined by one space: that is what identifies it, as it would identify the same
text in a file without tags.  So a word holds no space, and none is empty.
"""  # noqa: E501

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsplit.data import files, hub
from fedsplit.data.split_files import data_files, is_unsplit
from fedsplit.data.table import EVERY, SOURCE_COLUMN, Request, Source, Table, Value, missing_column
from fedsplit.errors import DataError

CONLL = (".conll", ".iob", ".iob2", ".bio", ".txt")
DOCUMENT = "-DOCSTART-"  # a line between documents, in some CoNLL files
USUAL_WORDS, USUAL_TAGS = "text", "label"
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")
MOST_WORDS = 100_000  # of one text

Row = tuple[str, tuple[str, ...], tuple[Value, ...], Mapping[str, Any]]


def splits(request: Request) -> tuple[str, ...]:
    """Return the splits at ``request.path``, a file, a folder, or a hub's ``owner/name``.

    Raises:
        DataError: see :func:`fedsplit.data.split_files.data_files` and
            :func:`fedsplit.data.hub.splits`.
    """
    if files.is_there(request) or not request.path:
        return tuple(_files(request))
    return hub.splits(request)


def read(request: Request, split: str) -> Table:
    """Read one split: a text of words for each row, and its tags where a label column is asked for.

    Raises:
        DataError: the file, the split or a column is missing, a line is malformed, or a row has
            another number of tags than of words; names file and line.
    """
    texts: list[str] = []
    tags: list[tuple[Value, ...]] = []
    places: list[str] = []
    by_file = is_unsplit(Path(request.path), SUFFIXES)
    names = [*request.columns, *([SOURCE_COLUMN] if by_file else [])]
    columns: dict[str, list[Value]] = {column: [] for column in names}
    for where, words, own, row in _rows(request, split):
        texts.append(join_words(where, words))
        places.append(where)
        if request.label_column:
            if len(own) != len(words):
                raise DataError(f"{where}: {len(own)} tags: must be one for each of {len(words)}")
            tags.append(own)
        for column, values in columns.items():
            source = by_file and column == SOURCE_COLUMN and column not in row
            values.append(_stem(where) if source else files.value_of(where, row, column))
    if not texts:
        raise DataError(f"{request.path}: texts=0: must be >= 1")
    kept = {column: tuple(values) for column, values in columns.items()}
    return Table(tuple(texts), tuple(tags), kept, request.path, places=tuple(places))


def join_words(where: str, words: Sequence[Any]) -> str:
    """Return the text of some words: joined by one space.

    Raises:
        DataError: there is none or too many, or one is empty or holds white space; names the place.
    """
    if not 1 <= len(words) <= MOST_WORDS:
        raise DataError(f"{where}: words={len(words)}: must be in [1, {MOST_WORDS}]")
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str) or not word or set(word) & set(" \t\r\n\x1f"):
            raise DataError(f"{where}: word {number}={word!r:.80}: must be a text without spaces")
    return " ".join(words)


def words_of(text: str) -> list[str]:
    """Return the words of a text that :func:`join_words` made."""
    return text.split(" ")


def _rows(request: Request, split: str) -> Iterator[Row]:
    """Yield (place, words, tags, the row's own columns) of a split."""
    if not (files.is_there(request) or not request.path):
        for where, row in hub.rows(request, split):
            yield _listed(where, row, request)
        return
    found = _files(request)
    if split not in found:
        raise DataError(
            f"split={split!r}: must be one of those in {request.path}: {', '.join(found)}"
        )
    for file in found[split]:
        if file.suffix.lower() in CONLL:
            yield from _conll(file, request)
            continue
        reader: Callable[..., Iterator[files.Row]] = files.READERS[file.suffix.lower()]
        for where, row in reader(file, replace(request, text_column=EVERY, label_column="")):
            yield _listed(where, row, request)


SUFFIXES = (*CONLL, *(suffix for suffix in files.READERS if suffix not in CONLL))


def _files(request: Request) -> dict[str, list[Path]]:
    if not request.path:
        raise DataError("path='': must be a data file or a folder")
    return data_files(Path(request.path), SUFFIXES)


def _stem(where: str) -> str:
    return Path(where.rpartition(":")[0]).stem


# ---- CoNLL -------------------------------------------------------------------------------------


def _conll(path: Path, request: Request) -> Iterator[Row]:
    """Yield each text of a CoNLL file; it is where its first word is."""
    words: list[str] = []
    tags: list[Value] = []
    place, width = "", 0
    for number, line in files.lines_of_file(path):
        where = f"{path}:{number}"
        fields = _fields(line.rstrip("\r\n"))
        if not fields or fields[0] == DOCUMENT:
            if words:
                yield place, tuple(words), tuple(tags), {}
            words, tags = [], []
            continue
        width = width or len(fields)
        if len(fields) != width:
            raise DataError(f"{where}: columns={len(fields)}: must be {width}, as before")
        if not words:
            place = where
        word = fields[_number(where, request.text_column, USUAL_WORDS, 0, width)]
        if not word:
            raise DataError(f"{where}: word='': must be a text without spaces")
        words.append(word)
        if request.label_column:
            if width < 2:
                raise DataError(f"{where}: columns=1: must be a word and its tag")
            at = _number(where, request.label_column, USUAL_TAGS, width - 1, width)
            tags.append(fields[at] or None)
    if words:
        yield place, tuple(words), tuple(tags), {}


def _fields(line: str) -> list[str]:
    """Return a line's columns; none where it is blank."""
    if not line.strip(" \t"):
        return []
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return [field for field in line.split(" ") if field]


def _number(where: str, column: str, usual: str, default: int, width: int) -> int:
    if column == usual:
        return default
    if not column.isdecimal() or not 1 <= int(column) <= width:
        raise missing_column(where, column, [str(n + 1) for n in range(width)])
    return int(column) - 1


# ---- rows --------------------------------------------------------------------------------------


def _listed(where: str, row: Mapping[str, Any], request: Request) -> Row:
    words = _list(where, row, request.text_column, USUAL_WORDS, WORDS)
    tags: list[Any] = []
    if request.label_column:
        tags = _list(where, row, request.label_column, USUAL_TAGS, TAGS)
        for tag in tags:
            if tag is not None and not isinstance(tag, str | int):
                raise DataError(f"{where}: tag={tag!r:.80}: must be a name")
    return where, tuple(words), tuple(tags), row


def _list(
    where: str, row: Mapping[str, Any], column: str, usual: str, instead: Sequence[str]
) -> list[Any]:
    names = (column,) if column != usual else (*instead, usual)
    name = next((name for name in names if name in row), None)
    if name is None:
        raise missing_column(where, names[0], map(str, row))
    value = row[name]
    if isinstance(value, str):
        value = _unpacked(value)
    if not isinstance(value, list):
        raise DataError(f"{where}: {name}={value!r:.80}: must be a list, one entry for each word")
    return value


def _unpacked(cell: str) -> Any:
    """Return the list that a cell of delimited text holds."""
    if cell.startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(cell)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and all(isinstance(x, str | int) for x in found):
                return found
    return [part for part in cell.split(" ") if part]


SOURCE = Source(splits, read)
