"""Data sets of the Hugging Face Hub, or a local folder, through ``datasets.load_dataset``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsplit.data.table import Cell, Request, Source, Table, Value, join_parts, missing_column
from fedsplit.errors import DataError

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?")


def splits(request: Request) -> tuple[str, ...]:
    """Return the names of the data set's splits.

    Raises:
        DataError: if the name is malformed, or the data set cannot be reached.
    """
    path, revision, config = _locate(request.path)
    with _quiet(request.path) as datasets:
        names = datasets.get_dataset_split_names(path, config_name=config, revision=revision)
    return tuple(str(name) for name in names)


def read(request: Request, split: str) -> Table:
    """Read one split.

    ``request.path`` is ``owner/name``, with ``@revision`` and ``:config`` where they are needed
    (``nyu-mll/glue:sst2``), or a local folder in a layout that ``datasets`` knows.  Old names
    without an owner are refused: they could also name one of ``datasets``' own file readers.
    Nothing in the repository is executed (``datasets`` 4 has no loading scripts any more).  Pin a
    revision where owners must have the same rows.

    Raises:
        DataError: if the name is malformed, the data set cannot be reached, or the split or a
            column is missing; lists what was found.
    """
    path, revision, config = _locate(request.path)
    with _quiet(request.path) as datasets:
        rows = datasets.load_dataset(path, name=config, revision=revision, split=split)
    for column in request.wanted:
        if column not in rows.column_names:
            raise missing_column(request.path, column, rows.column_names)
    names: tuple[str, ...] = ()
    labels: tuple[Cell, ...] = ()
    if request.label_column:
        feature = rows.features[request.label_column]
        feature = getattr(feature, "feature", feature)  # of a list: its parts'
        names = tuple(getattr(feature, "names", None) or ())
        labels = tuple(_named(cell, names) for cell in _cells(request, rows, request.label_column))
    return Table(
        texts=_texts(request, rows),
        labels=labels,
        columns={column: _values(request, rows, column) for column in request.columns},
        name=request.path,
        label_names=names,
    )


def rows(request: Request, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, values by column) of every row of a split, with all of its columns.

    Raises:
        DataError: as :func:`read`.
    """
    path, revision, config = _locate(request.path)
    with _quiet(request.path) as datasets:
        found = datasets.load_dataset(path, name=config, revision=revision, split=split)
    for number, row in enumerate(found):
        yield f"{request.path}:row {number}", row


def _texts(request: Request, rows: Any) -> tuple[str, ...]:
    parts = [rows[column] for column in request.text_columns]
    if len(parts) == 1:
        return tuple(parts[0])
    return tuple(
        join_parts(f"{request.path}: row {row}", together)
        for row, together in enumerate(zip(*parts, strict=True))
    )


def _values(request: Request, rows: Any, column: str) -> tuple[Value, ...]:
    return tuple(
        _value(f"{request.path}: row {row}: {column}", value)
        for row, value in enumerate(rows[column])
    )


def _cells(request: Request, rows: Any, column: str) -> tuple[Cell, ...]:
    """Return a column whose values may be lists."""
    found: list[Cell] = []
    for row, value in enumerate(rows[column]):
        where = f"{request.path}: row {row}: {column}"
        listed = isinstance(value, list)
        found.append(tuple(_value(where, x) for x in value) if listed else _value(where, value))
    return tuple(found)


def _value(where: str, value: Any) -> Value:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise DataError(f"{where}={value!r:.80}: must be a string, a number or a boolean")


def _named(cell: Cell, names: tuple[str, ...]) -> Cell:
    """Return a label's name for its index; -1 stays: the labels of that row are kept back."""
    if isinstance(cell, tuple):
        return tuple(names[x] if names and type(x) is int and x >= 0 else x for x in cell)
    return names[cell] if names and type(cell) is int and cell >= 0 else cell


def _locate(path: str) -> tuple[str, str | None, str | None]:
    """Return path or repository, revision and configuration, as ``datasets`` wants them."""
    if path and Path(path).is_dir():
        return str(Path(path).resolve()), None, None
    match = _NAME.fullmatch(path)
    if match is None:
        raise DataError(f"path={path!r}: must be owner/name[@revision][:config] or a local folder")
    return match["repo"], match["revision"], match["config"]


@contextmanager
def _quiet(path: str) -> Iterator[Any]:
    """Give the ``datasets`` module without progress bars; its errors become ``DataError``."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"datasets: {error}: pip install 'fedsplit[data]'") from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise DataError(
            f"datasets={datasets.__version__}: must be >= 4 for the hub: earlier versions can run "
            "a repository's own code"
        )
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    except Exception as error:  # of datasets, huggingface_hub, its HTTP client, file systems ...
        raise DataError(
            f"{path}: cannot be loaded ({type(error).__name__}: {error}); without a network use "
            "a local folder"
        ) from error
    finally:
        if not disabled:
            datasets.enable_progress_bars()


SOURCE = Source(splits, read)
