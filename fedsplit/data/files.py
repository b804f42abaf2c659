"""Data sets in local files: CSV, TSV, JSON lines, Parquet, and plain text cut into passages."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from fedsplit.data.table import EVERY, Request, Source, Table, Value
from fedsplit.errors import DataError

MAX_LINE = 1 << 20  # bytes of one line; a field of a CSV file is bounded by csv's own 131,072
SPLITS = ("train", "dev", "valid", "validation", "val", "test")
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})(-\d+-of-\d+)?")

Row = tuple[str, Mapping[str, Any]]  # (where it is: "file:line", the values by column)


def splits(request: Request) -> tuple[str, ...]:
    """Return the splits at ``request.path``: the files' own, or the one split ``train``.

    Raises:
        DataError: if there is no such file or folder, or no data file in the folder.
    """
    return tuple(_files(request))


def read(request: Request, split: str) -> Table:
    """Read one split.

    ``request.path`` is one file, which is the split ``train`` whatever its name, or a folder.  In
    a folder, files named after splits are these splits (``train.jsonl``, ``dev.csv``,
    ``test-00000-of-00002.parquet``).  A folder without such names is one split ``train`` of all its
    data files, with a column ``source`` that holds each row's file name, so that one file can be
    one natural owner.

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
    labels: list[Value] = []
    columns: dict[str, list[Value]] = {column: [] for column in request.columns}
    sources: list[Value] = []
    for file in files:
        for where, row in READERS[file.suffix.lower()](file, request):
            texts.append(_text(where, row, request.text_column))
            if request.label_column:
                labels.append(_label(where, row, request.label_column))
            for column in request.columns:
                columns[column].append(value_of(where, row, column))
            sources.append(file.stem)
    if not texts:
        raise DataError(f"{', '.join(str(file) for file in files)}: rows=0: must be >= 1")
    if "source" not in columns and _is_unsplit_folder(request, files):
        columns["source"] = sources
    return Table(
        tuple(texts), tuple(labels), {c: tuple(v) for c, v in columns.items()}, request.path
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
    path = Path(request.path)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{path}: suffix={path.suffix!r}: must be one of {', '.join(READERS)}")
        return {"train": [path]}
    if not path.is_dir():
        raise DataError(f"path={request.path!r}: must be a file or a folder that is there")
    data = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    if not data:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:20]) or "nothing"
        raise DataError(f"{path}: must hold files with {', '.join(READERS)}; found: {names}")
    by_split: dict[str, list[Path]] = {}
    for file in data:
        match = _SPLIT_FILE.fullmatch(file.stem)
        if match:
            by_split.setdefault(match[1], []).append(file)
    for split, files in by_split.items():
        if len({file.suffix for file in files}) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{path}: split {split!r} in several formats: {names}")
    ordered = {split: by_split[split] for split in SPLITS if split in by_split}
    return ordered or {"train": data}


def _is_unsplit_folder(request: Request, files: list[Path]) -> bool:
    return Path(request.path).is_dir() and not any(_SPLIT_FILE.fullmatch(f.stem) for f in files)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
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
                    f"{path}:{number}: byte {error.start}: must be UTF-8 ({error.reason})"
                ) from None


def _read_json_lines(path: Path, request: Request) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: must be one JSON object on a line ({error})"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {type(row).__name__}: must be a JSON object")
        yield f"{path}:{number}", row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_csv(path: Path, request: Request) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) != len(header):
                    raise DataError(f"{where}: header={header}: names must be distinct")
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{where}: fields={len(fields)}: must be {len(header)}, as in the header"
                )
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _read_parquet(path: Path, request: Request) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"pyarrow: {error}: pip install 'fedsplit[data]'") from None
    wanted = [request.text_column, *filter(None, [request.label_column]), *request.columns]
    every = request.text_column == EVERY
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in names if every else wanted:
                if column not in names:
                    raise _missing(str(path), column, names)
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=None if every else wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: must be a Parquet file ({error})") from None


def _read_text(path: Path, request: Request) -> Iterator[Row]:
    if request.label_column or request.columns:
        asked = [request.label_column, *request.columns]
        raise DataError(
            f"{path}: columns={list(filter(None, asked))}: plain text has none; "
            "set label_column='' for language modelling"
        )
    texts = passages((line for _, line in _lines(path)), request.passage_words)
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


def _missing(where: str, column: str, found: Iterable[str]) -> DataError:
    return DataError(f"{where}: column={column!r}: is missing; found: {', '.join(found)}")


def _get(where: str, row: Mapping[str, Any], column: str) -> Any:
    try:
        return row[column]
    except KeyError:
        raise _missing(where, column, row) from None


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    value = _get(where, row, column)
    if not isinstance(value, str):
        raise DataError(f"{where}: {column}={value!r:.80}: must be a text")
    if not value.strip():
        return ""  # dropped without labels, refused with them: see dataset.build
    return value


def _label(where: str, row: Mapping[str, Any], column: str) -> Value:
    value = value_of(where, row, column)
    if value is None or value == "":
        raise DataError(f"{where}: {column}={value!r}: must be a label")
    return value


def value_of(where: str, row: Mapping[str, Any], column: str) -> Value:
    """Return one value of a row.

    Raises:
        DataError: there is no such column, or its value is a list or an object.
    """
    value = _get(where, row, column)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise DataError(f"{where}: {column}={value!r:.80}: must be a string, a number or a boolean")


SOURCE = Source(splits, read)
