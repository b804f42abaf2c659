"""Data sets in local files: CSV, TSV, JSON lines, Parquet, and plain text cut into passages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from fedsplit.data.delimited import read_delimited
from fedsplit.data.split_files import data_files, is_unsplit
from fedsplit.data.table import (
    EVERY,
    SOURCE_COLUMN,
    Cell,
    Request,
    Source,
    Table,
    Value,
    join_parts,
    missing_column,
)
from fedsplit.errors import DataError

MAX_LINE = 1 << 20  # bytes of one line; a field of a CSV file is bounded by csv's own 131,072
Row = tuple[str, Mapping[str, Any]]  # (where it is: "file:line", the values by column)


def splits(request: Request) -> tuple[str, ...]:
    """Return the splits at ``request.path``: the files' own, or the one split ``train``.

    Raises:
        DataError: if there is no such file or folder, or no data file in the folder.
    """
    return tuple(_files(request))


def read(request: Request, split: str) -> Table:
    """Read one split.

    ``request.path`` is a file or a folder, whose splits are those of
    :func:`fedsplit.data.split_files.data_files`.  A folder without splits has a column ``source``
    that holds each row's file name, so that one file can be one natural owner.  Delimited text is
    read as :func:`fedsplit.data.delimited.read_delimited` says.

    Plain text has no labels and no columns: it is cut at line ends into passages of at least
    ``passage_words`` words (the last may be shorter), a longer line at words.

    Raises:
        DataError: if the file, the split or a column is missing, or a line is malformed; names
            file and line, and lists what was found.
    """
    found = _files(request)
    if split not in found:
        raise DataError(
            f"split={split!r}: must be one of those in {request.path}: {', '.join(found)}"
        )
    files = found[split]
    texts: list[str] = []
    labels: list[Cell] = []
    by_file = is_unsplit(Path(request.path), READERS)
    names = [*request.columns, *([SOURCE_COLUMN] if by_file else [])]
    columns: dict[str, list[Value]] = {column: [] for column in names}
    places: list[str] = []
    for file in files:
        for where, row in READERS[file.suffix.lower()](file, request):
            texts.append(_text(where, row, request.text_columns))
            if request.label_column:
                labels.append(cell_of(where, row, request.label_column))
            for column, values in columns.items():
                own = by_file and column == SOURCE_COLUMN and column not in row
                values.append(file.stem if own else value_of(where, row, column))
            places.append(where)
    if not texts:
        raise DataError(f"{', '.join(str(file) for file in files)}: rows=0: must be >= 1")
    return Table(
        tuple(texts),
        tuple(labels),
        {c: tuple(v) for c, v in columns.items()},
        request.path,
        places=tuple(places),
    )


def is_there(request: Request) -> bool:
    """Return whether ``request.path`` is a file or folder of this machine."""
    return bool(request.path) and Path(request.path).exists()


def rows(request: Request, split: str) -> Iterator[Row]:
    """Yield (place, values by column) of every row of a split, with all of its columns.

    Raises:
        DataError: as :func:`read`.
    """
    found = _files(request)
    if split not in found:
        raise DataError(
            f"split={split!r}: must be one of those in {request.path}: {', '.join(found)}"
        )
    for file in found[split]:
        yield from READERS[file.suffix.lower()](file, replace(request, text_column=EVERY))


def passages(lines: Iterable[str], words: int) -> Iterator[str]:
    """Yield the lines' text in passages of at least ``words`` words, the last perhaps fewer.

    Line ends inside a passage are kept; joined by white space, the passages have the same words in
    the same order as the lines.
    """
    held: list[str] = []
    count = 0
    for line in lines:
        for piece in _pieces(line, words):
            held.append(piece)
            count += len(piece.split())
            if count >= words:
                yield "".join(held).strip()
                held, count = [], 0
    if count:
        yield "".join(held).strip()


def _pieces(line: str, words: int) -> Iterator[str]:
    """Yield the line, or parts of ``words`` words each where it is longer."""
    split = line.split()
    if len(split) <= words:
        yield line
        return
    for start in range(0, len(split), words):
        yield " ".join(split[start : start + words]) + "\n"


def _files(request: Request) -> dict[str, list[Path]]:
    """Return the data files of each split."""
    if not request.path:
        raise DataError("path='': must be a data file or a folder")
    return data_files(Path(request.path), READERS)


def lines_of_file(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end), UTF-8, each at most ``MAX_LINE`` bytes."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE:
                raise DataError(f"{path}:{number}: line longer than {MAX_LINE} bytes")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {error.start}: must be UTF-8 ({error.reason}); "
                    f"{_instead_of_utf8(raw if number == 1 else b'')}"
                ) from None


def _instead_of_utf8(first: bytes) -> str:
    """Return what to do about a file that is not UTF-8, by its first bytes."""
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16: save it as UTF-8"
    if first.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return "the file is compressed: unpack it"
    return "save the file as UTF-8, such as with iconv -f WINDOWS-1252 -t UTF-8"


def _read_json_lines(path: Path, request: Request) -> Iterator[Row]:
    for number, line in lines_of_file(path):
        if not line.strip():
            continue
        try:
            row = json.loads(
                line, parse_constant=_refuse_constant, object_pairs_hook=_distinct_names
            )
        except (ValueError, RecursionError) as error:
            if isinstance(error, ValueError) and line.lstrip().startswith("["):
                raise _array(path, number) from None
            told = str(error).partition(";")[0]
            raise DataError(
                f"{path}:{number}: must be one JSON object on a line ({told})"
            ) from None
        if isinstance(row, list):
            raise _array(path, number)
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {type(row).__name__}: must be a JSON object")
        yield f"{path}:{number}", row


def _array(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}:{number}: list: must be a JSON object, one on each line (JSON lines); "
        "jq -c '.[]' FILE makes them of an array"
    )


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r:.80} is there twice: names must be distinct")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_csv(path: Path, request: Request) -> Iterator[Row]:
    return read_delimited(path, lambda: (line for _, line in lines_of_file(path)), request)


def _read_parquet(path: Path, request: Request) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"pyarrow: {error}: pip install 'fedsplit[data]'") from None
    wanted = list(request.wanted)
    every = request.text_column == EVERY
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise DataError(f"{path}: columns={names}: names must be distinct")
            for column in wanted:
                if column not in names and column != SOURCE_COLUMN:
                    raise missing_column(str(path), column, names)
            there = [column for column in wanted if column in names]
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=None if every else there):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: must be a Parquet file ({error})") from None


def _read_text(path: Path, request: Request) -> Iterator[Row]:
    if request.label_column or set(request.columns) - {SOURCE_COLUMN}:
        asked = [request.label_column, *request.columns]
        raise DataError(
            f"{path}: columns={list(filter(None, asked))}: plain text has none; "
            "set label_column='' for language modelling"
        )
    if not request.passage_words:
        for number, line in lines_of_file(path):
            yield f"{path}:{number}", {request.text_column: line.rstrip("\r\n")}
        return
    texts = passages((line for _, line in lines_of_file(path)), request.passage_words)
    for number, text in enumerate(texts, start=1):
        yield f"{path}:passage {number}", {request.text_column: text}


READERS: dict[str, Callable[[Path, Request], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _get(where: str, row: Mapping[str, Any], column: str) -> Any:
    try:
        return row[column]
    except KeyError:
        raise missing_column(where, column, row) from None


def _text(where: str, row: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    parts = []
    for column in columns:
        value = value_of(where, row, column)
        if value is None:
            return ""  # dropped without labels, refused with them: see dataset.build
        if not isinstance(value, str):
            raise DataError(f"{where}: {column}={value!r:.80}: must be a text")
        parts.append(value)
    return join_parts(where, parts)


def value_of(where: str, row: Mapping[str, Any], column: str) -> Value:
    """Return one value of a row.

    Raises:
        DataError: there is no such column, or its value is a list or an object.
    """
    value = _get(where, row, column)
    if isinstance(value, str) and not value.strip():
        return None  # CSV has no other way to leave a cell empty
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Decimal):  # of a Parquet file: all its digits count
        return str(value)
    more = ""
    if isinstance(value, date | time):
        more = "; write dates and times as text"
    elif isinstance(value, Mapping):
        more = f"; lift one of its fields ({', '.join(map(str, value))[:80]}) to a column"
    raise DataError(
        f"{where}: {column}={value!r:.80}: must be a string, a number or a boolean{more}"
    )


def cell_of(where: str, row: Mapping[str, Any], column: str) -> Cell:
    """Return one label of a row: as :func:`value_of`, or a list of such values as a tuple.

    Raises:
        DataError: there is no such column, or its value holds a list or an object.
    """
    value = _get(where, row, column)
    if isinstance(value, list):
        return tuple(value_of(where, {column: part}, column) for part in value)
    return value_of(where, row, column)


SOURCE = Source(splits, read)
