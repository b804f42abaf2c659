"""Delimited text (CSV, TSV and their kin): which delimiter, and whether there is a header line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsplit.data.table import SOURCE_COLUMN, MissingColumn, Request, missing_column
from fedsplit.errors import DataError

DELIMITERS = (",", "\t", ";", "|")

Row = tuple[str, Mapping[str, Any]]  # (where it is: "file:line", the values by column)


def read_delimited(
    path: Path, lines: Callable[[], Iterator[str]], request: Request
) -> Iterator[Row]:
    """Yield a file's rows.

    The delimiter is the request's; where it names none, the suffix's (``.tsv``: tab, else comma),
    or the one of :data:`DELIMITERS` under which the header has every column that is asked for.
    Without a header line, columns are named by their numbers from 1.  With ``quotes`` a field may
    be quoted, and a quote that is not doubled is an error; without, a quote is a character.

    Args:
        path: for messages, and its suffix.
        lines: gives them from the first on, with their ends.
        request: columns, ``delimiter``, ``header``, ``quotes``.

    Raises:
        DataError: a line is malformed, or no delimiter gives the columns; names file and line.
    """
    delimiter = request.delimiter or _delimiter(path, lines, request)
    delimiter = "\t" if delimiter == "tab" else delimiter
    reader = csv.reader(
        lines(),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if request.quotes else csv.QUOTE_NONE,
    )
    header: list[str] | None = None
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                if not request.header:
                    header = [str(n + 1) for n in range(len(fields))]
                if len(set(header)) != len(header):
                    raise DataError(f"{where}: header={header}: names must be distinct")
                _check_columns(where, header, request)
                if request.header:
                    continue
            if len(fields) != len(header):
                raise DataError(
                    f"{where}: fields={len(fields)}: must be {len(header)}, as in the first line "
                    f"(delimiter {delimiter!r})"
                )
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {_reason(str(error), request)}") from None


def _reason(told: str, request: Request) -> str:
    """Return what is wrong with a line, in words that tell what to do."""
    if told.startswith("new-line character"):
        return "a line ends with CR alone: must be LF or CRLF; tr '\\r' '\\n' makes them"
    if not request.quotes:
        return told
    if told.startswith("field larger"):
        told += ": perhaps a quote that is opened and never closed"
    elif told == "unexpected end of data":
        told += ": a quote is opened and never closed"
    return f"{told}; a file that never quotes is read with quotes=false"


def _delimiter(path: Path, lines: Callable[[], Iterator[str]], request: Request) -> str:
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    if not request.header:
        return usual
    first = next((line for line in lines() if line.strip()), "")
    for delimiter in (usual, *DELIMITERS):
        try:
            header = next(csv.reader([first], delimiter=delimiter))
        except csv.Error:
            continue
        if set(request.wanted) <= {*(name.strip() for name in header), SOURCE_COLUMN}:
            return delimiter
    return usual


def _check_columns(where: str, header: list[str], request: Request) -> None:
    for column in request.wanted:
        if column not in (*header, SOURCE_COLUMN):
            error = missing_column(where, column, header)
            if not request.header:
                raise error
            meant = "text-column, label-column"
            if column in request.columns:  # what rows are dealt to owners by
                meant = "data.column, or another data.partition"
            raise MissingColumn(
                f"{error}; name the column that is meant ({meant}); a file "
                "without a header line is read with header=false, its columns "
                "named 1, 2, ...; another delimiter can be named (data.header, data.delimiter; "
                "node config header, delimiter)"
            )
