"""Tables that experiments and benchmarks print, and the means in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def make_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    left: int = 1,
    narrow: bool = False,
) -> Table:
    """Return a table for a console.

    Args:
        columns: headings.
        rows: cells of each row, as many as columns or fewer; None is an empty cell.
        title: above the table.
        left: how many of the first columns are aligned left; the others are aligned right.
        narrow: fit many columns into a terminal: headings wrap between words only, and the left
            columns never do.
    """
    style: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)} if narrow else {}
    table = Table(title=title, title_justify="left", **style)
    for number, name in enumerate(columns):
        if number < left:
            table.add_column(name, no_wrap=narrow)
        else:
            width = max(map(len, name.split()), default=None) if narrow else None
            table.add_column(name, justify="right", min_width=width)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    return table


def formatted(row: Mapping[str, Any], formats: Mapping[str, str]) -> list[str]:
    """Return a row's values in those columns, each in its format; empty where there is none."""
    return ["" if row.get(k) is None else format(row[k], how) for k, how in formats.items()]


def mean(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    """Return the mean of a column over the rows that have it."""
    return fmean(float(row[column]) for row in rows if row.get(column) is not None)


def with_interval(name: str, value: float, interval: Sequence[float]) -> dict[str, float]:
    """Return the columns of a value and of both ends of its interval."""
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def grouped(
    rows: Iterable[Mapping[str, Any]], *columns: str
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return rows by their values in ``columns``, in the order in which these first occur."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(dict(row))
    return groups
