"""Names of classes: one name for one value in every format, one order for all parties.

A label is normalised by its value, never by the type that a file format gave it: ``1``, ``1.0``,
``"1 "`` and ``true`` are the class ``1``.  An empty cell, ``nan`` and ``null`` are no label, and
``-1`` is a label that is kept back (public test splits), unless the parties named a class so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from fedsplit.data.table import Cell, Table
from fedsplit.errors import DataError, check

HIDDEN = "-1"
MOST_NAMED = 20  # names listed in a message
_MISSING = frozenset({"", "nan", "null", "na", "n/a", "#n/a", "<na>"})
_INTEGER = re.compile(r"([+-]?)(0|[1-9]\d*)(?:\.0*)?")
# Without leading zeros: "007" is a code, and no number.
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?", re.IGNORECASE)
_TRUTH = {"true": "1", "false": "0"}


def class_name(value: Cell) -> str:
    """Return the name of a label by its value; empty where there is no label."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e18:
        value = int(value)
    text = "" if value is None else str(value).strip()
    low = text.casefold()
    if low in _TRUTH:
        return _TRUTH[low]
    match = _INTEGER.fullmatch(text)
    if match:
        return match[2] if match[1] != "-" or match[2] == "0" else f"-{match[2]}"
    if _NUMBER.fullmatch(text):
        number = float(text)
        whole = number.is_integer() and abs(number) < 1e15
        return str(int(number)) if whole else str(number)
    return text


def is_missing(name: str) -> bool:
    """Whether a name stands for an empty cell, unless the parties named a class so."""
    return name.casefold() in _MISSING


def parse_class_names(text: str, setting: str) -> tuple[str, ...]:
    """Return the classes' names, in order, from a setting; empty where it is empty.

    Args:
        text: names separated by commas, or a JSON list of strings where a name holds a comma.
        setting: its name, for messages.

    Raises:
        ConfigError: a name is empty, or two are the same by value.
    """
    names: list[str] = [part.strip() for part in text.split(",")] if text.strip() else []
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        good = isinstance(found, list) and all(isinstance(name, str) for name in found)
        check(good, setting, text, "a JSON list of names")
        names = [name.strip() for name in found or []]
    by_value = [class_name(name) for name in names]
    good = "" not in by_value and len(set(by_value)) == len(by_value)
    check(good, setting, text, "names that differ by value, none of them empty")
    return tuple(names)


def numerals(classes: int) -> tuple[str, ...]:
    """Return the names of classes that nobody named: a label is then its own index."""
    return tuple(str(index) for index in range(classes))


def names_digest(names: Sequence[str]) -> str:
    """Return the SHA-256, in hex, of an agreed list of names; equal lists by value are equal."""
    listed = json.dumps(["fedsplit-classes-v1", *map(class_name, names)])
    return hashlib.sha256(listed.encode()).hexdigest()


def agreed_first(
    tables: Sequence[Table], agreed: Sequence[str] = (), classes: int = 0
) -> tuple[str, ...]:
    """Return the names of all labels in the tables: the agreed ones in their order, then others.

    Without an agreed list, the order is the source's own, or the names are the numerals below
    ``classes`` where every label is one of them, or they are sorted (as numbers where all are
    integers).

    Args:
        tables: of one data set.
        agreed: by the parties; empty: nothing was.
        classes: number of classes; 0: not known.

    Raises:
        DataError: a label is neither a name nor an integer, or is ``-1`` where no class was named
            so; names the row.
    """
    ordered = [*agreed] or next((list(t.label_names) for t in tables if t.label_names), [])
    known = {class_name(name) for name in ordered}
    found: set[str] = set()
    for table in tables:
        for row, label in enumerate(table.labels):
            _check_one(table, row, label)
            name = class_name(label)
            if name in known or name in found:
                continue
            if not is_missing(name) and name != HIDDEN:
                _check_name(table, row, label, name)
                found.add(name)
    if not ordered and found and found <= set(numerals(classes)):
        return numerals(classes)
    try:
        others = sorted(found, key=int)
    except ValueError:
        others = sorted(found)
    return (*ordered, *others)


def class_indices(table: Table, names: Sequence[str]) -> tuple[int, ...]:
    """Return each row's index into ``names``.

    Raises:
        DataError: a row has no label, a hidden one, or one outside ``names``; names the row.
    """
    index = {class_name(name): position for position, name in enumerate(names)}
    found = []
    for row, label in enumerate(table.labels):
        _check_one(table, row, label)
        name = class_name(label)
        if name not in index:
            raise DataError(f"{table.place(row)}: {_fault(label, name, names)}")
        found.append(index[name])
    return tuple(found)


def is_labelled(table: Table, known: Sequence[str] = ()) -> bool:
    """Whether at least one row has a label that is neither missing nor hidden."""
    names = {class_name(name) for name in (*known, *table.label_names)}
    return any(
        name in names or not (is_missing(name) or name == HIDDEN)
        for name in map(class_name, table.labels)
    )


def unknown_class(place: str, name: str, names: Sequence[str]) -> DataError:
    """Return the error of a row whose class the parties did not agree on."""
    return DataError(f"{place}: {_fault(name, name, names)}")


def _fault(label: Cell, name: str, names: Sequence[str]) -> str:
    if is_missing(name):
        return f"label={label!r}: must be a label; the cell is empty"
    if name == HIDDEN:
        return (
            "label=-1: must be a class: labels of public test splits are kept back so, then name "
            "another split or file to test on (data.test-split, data.test-path; node config "
            "test-split, test-path); if it is a class, name all of them (label names)"
        )
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (
        f"label={label!r:.80}: must be one of the agreed classes "
        f"{', '.join(names[:MOST_NAMED])}{more} (model.label-names; node config label-names)"
    )


def _check_one(table: Table, row: int, label: Cell) -> None:
    if isinstance(label, tuple):
        raise DataError(
            f"{table.place(row)}: label={list(label)!r:.80}: must be a string, a number or a "
            "boolean; a task whose labels are lists is named by model.task"
        )


def _check_name(table: Table, row: int, label: Cell, name: str) -> None:
    if name in ("inf", "-inf") or (_NUMBER.fullmatch(name) and not float(name).is_integer()):
        raise DataError(
            f"{table.place(row)}: label={label!r}: must be a name or an integer, or one of the "
            "agreed label names"
        )
